"""Deep double descent: ever wider networks. Nakkiran et al. 2019, https://arxiv.org/abs/1912.02292, section 5.

    python recipes/studies/deep_double_descent_study.py claim      # perceptrons on MNIST: figures, verdict and plot
    sbatch --array=0-63 slurm/array.sbatch recipes/studies/deep_double_descent_study.py paper

A part of the training labels is wrong, once for all. As a network gets wider, its test error after long training falls,
rises until it is just wide enough to learn the wrong labels too (the interpolation threshold), and falls again.

`--model mlp` has one hidden layer, as in Belkin et al. 2018, https://arxiv.org/abs/1812.11118, figure 3, who have 784
inputs, no label noise and another loss; here images are resized to 14 x 14, so that an input more is fewer parameters
and the threshold has widths on both sides. `--model resnet-18` is the paper's ResNet18-k, with k, 2k, 4k and 8k
channels; the paper's has its normalisation before the convolutions, ours after them, as in He et al. 2015. Test labels
are clean. `claim` and `gpu` train on 2,000 and 5,000 rows, for 200 epochs and at a higher rate.

Every (seed, width) is a run of its own, resumed exactly, under any strategy; `sbatch --array` deals them
(dltrain/grid.py). Several processes train one of them: torchrun ... --widths 64 --seeds 1.

Measured: recipes/README.md (settings and bounds were chosen on seeds 0, 1 and 2). `gpu`, six widths on 5,000 rows of
CIFAR-10, should show a rise and then a fall to below where the rise began: not yet measured.
"""

from dataclasses import dataclass, replace
from typing import Any

import dltrain


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    data: str = "mnist"  # mnist or cifar10, in the folder $DLTRAIN_DATA; or digits, which are drawn
    model: str = "mlp"  # mlp: one hidden layer; or a name of dltrain.models.image, such as resnet-18
    widths: tuple[int, ...] = (3, 5, 8, 12, 24, 32, 64, 128, 1024)  # hidden units; first stage's channels
    rows: int = 2000  # for training; 0: all
    noise: float = 0.2  # part of the training labels that are wrong
    size: int = 14  # pixels
    augment: bool = False  # shifted by up to 4 pixels and mirrored at random
    seeds: int = 3
    batch: int = 200
    lr: float = 0.01  # Adam's, constant
    clip: float = 0.0


RESNET = Config(
    data="cifar10", model="resnet-18", widths=tuple(range(1, 65)), rows=0, noise=0.15, size=32, augment=True, seeds=5,
    batch=128, lr=1e-4, steps=1_562_500, precision="bf16", log_every=1000, save_every=10_000,
)  # fmt: skip
PRESETS = {
    "claim": Config(seed=3, steps=2000, log_every=500),
    "debug": Config(
        data="digits", widths=(2, 16), rows=48, size=8, seeds=1, steps=6, batch=24, lanes=4, log_every=2, save_every=2,
    ),
    "gpu": replace(
        RESNET, widths=(2, 4, 8, 16, 32, 64), rows=5000, noise=0.2, augment=False, seeds=1, lr=1e-3, steps=7800,
        compile=True,
    ),
    "paper": RESNET,
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.claim import Figure, judge, logged
from dltrain.convert.ready import ready
from dltrain.data.decoded import DecodedRows
from dltrain.data.digits import digits
from dltrain.data.shards import Shards
from dltrain.errors import UserError
from dltrain.grid import grid, table
from dltrain.launch import detect
from dltrain.models.image import image_model
from dltrain.optim import adamw
from dltrain.plot import curves
from dltrain.schedules import constant
from dltrain.seeds import key

PLOT = "deep_double_descent.png"
TUNED_ON = (0, 1, 2)
CLASSES = 10

# B rows of a micro-batch, N rows, C channels, H and W pixels, K classes


class NoisyRows:
    """Rows of which a part has a wrong label, any other one, drawn once (section 2 of the paper)."""

    def __init__(self, rows: DecodedRows, noise: float, seed: int):
        random = np.random.Generator(np.random.Philox(key=key("label noise", seed)))
        wrong_N = random.random(len(rows)) < noise
        self.rows, self.shift_N = rows, np.where(wrong_N, random.integers(1, CLASSES, len(rows)), 0)
        self.fingerprint = f"{rows.fingerprint}-{noise}-{seed}"

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Any]:
        batch = self.rows.batch(epoch_M, index_M)
        return batch | {"labels_B": (batch["labels_B"] + torch.from_numpy(self.shift_N[index_M])) % CLASSES}


def rows_of(cfg: Config) -> tuple[NoisyRows, DecodedRows]:
    """`cfg.rows` of the training images, chosen by the seed, with noise; and all test images."""
    train, test = (
        Shards(digits(split) if cfg.data == "digits" else ready(f"{cfg.data}/{split}")) for split in ("train", "test")
    )
    random = np.random.Generator(np.random.Philox(key=key("training rows", cfg.seed)))
    chosen = random.permutation(len(train))[: cfg.rows or None]
    pad, flip = (4, 0.5) if cfg.augment else (0, 0.0)
    images = DecodedRows(train, cfg.size, pad=pad, flip=flip, seed=cfg.seed, samples=chosen)
    return NoisyRows(images, cfg.noise, cfg.seed), DecodedRows(test, cfg.size)


class Perceptron(nn.Module):
    """images_BCHW, of which the mean over the channels is seen -> logits_BK."""

    def __init__(self, pixels: int, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(pixels, width), nn.ReLU(), nn.Linear(width, CLASSES))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.layers(images_BCHW.mean(1).flatten(1))


class Classify(nn.Module):
    def __init__(self, cfg: Config, width: int):
        super().__init__()
        mlp = cfg.model == "mlp"
        self.model = Perceptron(cfg.size**2, width) if mlp else image_model(cfg.model, CLASSES, cfg.size, width=width)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the rows: cross-entropy (nats), and how many are classified wrongly."""
        labels_B, weights_B = batch["labels_B"], batch["weights_B"]
        logits_BK = self.model(batch["images_BCHW"].float() / 255).float()
        loss = (F.cross_entropy(logits_BK, labels_B, reduction="none") * weights_B).sum()
        return {"loss": loss, "error": ((logits_BK.argmax(1) != labels_B) * weights_B).sum()}


def train(cfg: Config, width: int) -> None:
    """One run: the network of this width, from the first step to the last."""

    def build() -> nn.Module:
        return Classify(cfg, width)

    optimizer_of = adamw(cfg.lr, eps=1e-8, decay=0.0)
    if cfg.debug:
        return dltrain.checklist(cfg, build, optimizer_of, constant(), rows_of(cfg)[0], chance=math.log(CLASSES))
    with dltrain.Run(cfg) as run:
        rows, unseen = run.everywhere(lambda: rows_of(cfg))
        task, optimizer = run.prepare(build, optimizer_of)
        dltrain.fit(run, task, optimizer, constant(), run.batches(rows), evals={"eval/train": rows, "eval": unseen})


def main(cfg: Config) -> dict[int, list[dict[str, Any]]]:
    """Train the grid and draw it; the cells by seed, in order of width."""
    if cfg.debug:
        return train(cfg, cfg.widths[0]) or {}

    def measure(seed: int, width: int) -> dict[str, float]:
        out = f"{cfg.out}/runs/seed-{seed}-width-{width}"
        train(replace(cfg, seed=seed, out=out, seeds=1, widths=(width,)), width)
        return {
            "train_error": 100 * logged(out, "eval/train/error")[-1],
            "test_error": 100 * logged(out, "eval/error")[-1],
            "test_loss": logged(out, "eval/loss")[-1],
        }

    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    wanted = [{"seed": seed, "width": width} for seed in seeds for width in cfg.widths]
    if len(wanted) > 1 and detect(os.environ).world > 1:
        raise UserError(f"several processes train one network, not {len(wanted)}: give one of --widths, and --seeds 1")
    cells = grid(cfg, wanted, measure)
    by_seed = {seed: [cell for cell in cells if cell["seed"] == seed] for seed in seeds}

    def panel(k: str) -> dict[str, tuple[list[float], list[float]]]:
        return {f"seed {seed}": ([c["width"] for c in found], [c[k] for c in found]) for seed, found in by_seed.items()}

    panels = {"test error (%)": "test_error", "training error (%)": "train_error", "test loss (nats)": "test_loss"}
    curves(Path(cfg.out) / PLOT, {title: panel(k) for title, k in panels.items()}, x="width")
    print(f"{table(cells)}\nsee {Path(cfg.out) / PLOT}", flush=True)
    return by_seed


def claim(cfg: Config) -> None:
    """The test error rises as the network gets wider, up to where it learns the wrong labels, and then falls again."""
    rise, fall, gain, before, fitted = ({} for _ in range(5))
    for seed, cells in main(cfg).items():
        error = [cell["test_error"] for cell in cells]
        pairs = [(valley, peak) for peak in range(1, len(cells)) for valley in range(peak)]
        valley, peak = max(pairs, key=lambda pair: error[pair[1]] - error[pair[0]])
        rise[seed], fall[seed] = error[peak] - error[valley], error[peak] - error[-1]
        gain[seed] = error[valley] - error[-1]
        before[seed], fitted[seed] = cells[valley]["train_error"], cells[peak]["train_error"]
    judge(
        cfg,
        [
            Figure(
                "test error, greatest rise from a width to a greater one (points)", rise, "7.3 (ResNet18-k)", least=3
            ),
            Figure("test error, fall from there to the widest (points)", fall, "12.2 (ResNet18-k)", least=4.5),
            Figure(
                "test error, the widest below where the rise began (points)",
                gain,
                "4.9 (ResNet18-k)",
                least=1,
                of="median",
            ),
            Figure("training error where the rise began (%)", before, "above the peak's", least=15),
            Figure("training error at the peak (%)", fitted, "8.3 (ResNet18-k)", most=15),
        ],
        tuned_on=TUNED_ON,
        pictures=[Path(cfg.out) / PLOT],
    )


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
