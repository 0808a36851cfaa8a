"""Scaling laws of a GPT on books. Hoffmann et al. 2022, "Training compute-optimal large language models".

    python recipes/scaling_study.py claim                         # the grid, the fits, the verdict, the plots
    python recipes/scaling_study.py fit --points runs.csv         # anybody's runs: columns params, tokens, loss
    sbatch --array=0-31 slurm/array.sbatch recipes/scaling_study.py gpu --out /scratch/me/scaling

https://arxiv.org/abs/2203.15556. For each budget of compute C = 6 N D (section 3.2) GPTs of several widths are trained
on as many tokens as it pays for, each with a schedule of its own length. To the final losses are fitted: a parabola for
each budget and the power law of the minima, L(N, D) = E + A / N^alpha + B / D^beta with intervals (section 3.3), and
Kaplan et al.'s power law of the best loss by compute (2020, https://arxiv.org/abs/2001.08361, equation 1.3). They then
predict the loss of the largest model, which none of them has seen. Beside it: the critical batch by the gradient noise
scale (McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1) and Sutton's "bitter lesson" (2019) as a
table: the same compute spent on a wider model, on more data, or on attention and positions.

Departs from the papers: tokens are bytes, of Project Gutenberg's English books; width alone grows, with muP's rates
(Yang et al. 2022, https://arxiv.org/abs/2203.03466), so that one learning rate serves all; N is all parameters.

A grid of runs, each resumed exactly, under any strategy; `sbatch --array` deals them (dltrain/grid.py), and several
processes train one of them: torchrun ... --widths 64 --budgets 1e11 --left-out 0 0. Measured: R^2 0.995, the largest
model 0.06 % off the prediction (docs/scaling.md); `gpu`, which should be within 2 % too, is not yet measured.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import dltrain

Architecture = Literal["gpt", "no attention", "no positions"]


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    points: str = ""  # .csv with the columns params, tokens, loss: fit these, train nothing
    data: str = ""  # folder of train.jsonl.gz and valid.jsonl.gz, by default $DLTRAIN_DATA/gutenberg-en; or shards
    text: int = 1 << 24  # bytes of the training text; 0: all
    unseen: int = 2048  # held-out rows, from all over the held-out text
    widths: tuple[int, ...] = (6, 8, 12, 16, 20, 24, 28)
    budgets: tuple[float, ...] = (1.2e10, 3.6e10, 1.1e11, 3.3e11)  # FLOPs, 6 N D
    ratio: tuple[float, float] = (30, 350)  # D / N: of a budget those widths are trained for which it lies between
    left_out: tuple[int, float] = (32, 6.6e11)  # width and FLOPs of the run that the others predict; 0 0: none
    weaker: tuple[int, ...] = (12, 24)  # widths that are also trained without attention, and without positions
    architecture: Architecture = "gpt"  # of one run
    row: int = 64  # tokens
    batch: int = 4  # rows per optimizer step, over all ranks
    layers: int = 2
    heads: int = 2
    base_width: int = 32  # muP's, for which lr holds
    lr: float = 4e-3  # peak


PRESETS = {
    "claim": Config(seed=1, log_every=200),
    "debug": Config(
        data="embedded:topics", text=0, unseen=24, widths=(8, 12, 16, 24), budgets=(2e7, 4e7, 8e7), ratio=(0, 1e9),
        left_out=(32, 1.6e8), weaker=(8, 16), row=16, batch=8, lanes=4, log_every=2, save_every=2,
    ),
    "gpu": Config(
        text=0, widths=(64, 96, 128, 192, 256, 384), budgets=(2.5e13, 1e14, 4e14, 1.6e15), ratio=(2, 150),
        left_out=(512, 6.4e15), weaker=(64, 128), unseen=16384, row=256, batch=128, layers=6, heads=4, base_width=128,
        lr=2e-3, precision="bf16", log_every=100,
    ),
    "fit": Config(points="points.csv"),
}  # fmt: skip
PRESETS["paper"] = replace(
    PRESETS["gpu"], widths=(512, 640, 768, 1024, 1280, 1536, 2048, 2560), layers=12, heads=16, row=2048, batch=256,
    budgets=(6e18, 1e19, 3e19, 6e19, 1e20, 3e20, 6e20), ratio=(2, 400), left_out=(4096, 3e21), weaker=(512, 1024),
)  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

import csv
import io
import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dltrain import checkpoint, rundir
from dltrain.claim import Figure, judge, logged
from dltrain.data.byte_text import VOCAB, byte_windows
from dltrain.data.token_rows import blank
from dltrain.data.windows import Windows
from dltrain.errors import UserError
from dltrain.flops import Work
from dltrain.grid import Cell, grid, table
from dltrain.launch import detect
from dltrain.models.gpt import Gpt, GptConfig
from dltrain.optim import adamw
from dltrain.scaling import Points, critical_batch, read_points
from dltrain.scaling_report import PLOTS, fitted
from dltrain.schedules import cosine

TUNED_ON = (0, 100)

# B rows of a micro-batch, L tokens of a row; N parameters, D tokens, C = 6 N D


class Predict(nn.Module):
    """The next byte. A cheaper network by what it is not told: positions, or any byte but the last."""

    def __init__(self, cfg: Config, width: int):
        super().__init__()
        self.architecture, self.model = cfg.architecture, Gpt(model_config(cfg, width))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the targets, of which there are batch["count"]."""
        ids_BL = batch["ids_BL"]
        apart_BL = torch.arange(ids_BL.shape[1], device=ids_BL.device).expand_as(ids_BL)  # each its own document
        known = {"documents_BL": apart_BL} if self.architecture == "no attention" else {}
        known |= {} if self.architecture == "gpt" else {"positions_BL": torch.zeros_like(ids_BL)}
        return {"loss": self.model.loss(ids_BL, batch["targets_BL"], **known)}


def model_config(cfg: Config, width: int) -> GptConfig:
    return GptConfig(
        vocab=VOCAB, layers=cfg.layers, width=width, heads=cfg.heads, positions=cfg.row, dropout=0.0,
        base_width=cfg.base_width,
    )  # fmt: skip


def params(cfg: Config, width: int) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in Gpt(model_config(cfg, width)).parameters())


def rows_of(cfg: Config) -> tuple[Windows, Windows]:
    return byte_windows(cfg.data, cfg.row, text=cfg.text, unseen=cfg.unseen)


def train(cfg: Config, width: int) -> None:
    """One run, from the first step to the last."""
    optimizer_of = adamw(cfg.lr, (0.9, 0.95), 1e-8, decay=0.0, hidden_rate=model_config(cfg, width).hidden_rate)
    schedule = cosine(max(1, cfg.steps // 10), cfg.steps, 0.1)

    def build() -> nn.Module:
        return Predict(cfg, width)

    if cfg.debug:
        return dltrain.checklist(
            cfg, build, optimizer_of, schedule, rows_of(cfg)[0], chance=math.log(VOCAB), causal=True
        )
    with dltrain.Run(cfg) as run:
        rows, unseen = run.everywhere(lambda: rows_of(cfg))
        run.measure(Work(build, optimizer_of, blank(cfg.row), tokens=cfg.row, causal=True))
        task, optimizer = run.prepare(build, optimizer_of)
        dltrain.fit(run, task, optimizer, schedule, run.batches(rows), evals={"eval": unseen})


def noise_scale(cfg: Config, width: int, batches: int = 64, rows: int = 4) -> float:
    """The critical batch (tokens) where the run in `cfg.out` ended: squared norms of the gradients of few rows and of
    all of them."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    task, windows = Predict(cfg, width).to(device), rows_of(cfg)[0]
    task.load_state_dict(checkpoint.read(checkpoint.steps(Path(cfg.out) / "checkpoints")[-1]))
    index_N, total, square = np.linspace(0, len(windows) - 1, batches * rows).astype(int), 0.0, 0.0
    for index_M in index_N.reshape(rows, batches).T:  # rows from all over the text
        task.zero_grad()
        batch = {k: v.to(device) for k, v in windows.batch(np.zeros_like(index_M), index_M).items()}
        (task(batch)["loss"] / batch["count"]).backward()
        gradient = torch.cat([p.grad.flatten() for p in task.parameters() if p.grad is not None]).double()
        total, square = total + gradient / batches, square + float(gradient.square().sum()) / batches
    small = rows * cfg.row
    return critical_batch(small, small * batches, square, float(total.square().sum()))  # type: ignore[union-attr]


def spent(cfg: Config) -> dict[str, tuple[int, float]]:
    """Width and FLOPs of what is compared: the first budget, and the second in two ways. Nothing, for one budget."""
    if len(cfg.budgets) == 1:
        return {}
    (narrow, wide), (less, more, *_) = cfg.weaker, cfg.budgets
    return {"before": (narrow, less), "on data": (narrow, more), "on width": (wide, more)}


def cells_of(cfg: Config) -> list[Cell]:
    """The grid, the largest model, and what is compared."""
    low, high = cfg.ratio
    sizes = {width: params(cfg, width) for width in cfg.widths}
    wanted = [(w, c, "gpt") for c in cfg.budgets for w, n in sizes.items() if low <= c / 6 / n**2 <= high]
    wanted += [(*cfg.left_out, "gpt")] * bool(cfg.left_out[0])
    wanted += [(*one, architecture) for architecture in get_args(Architecture) for one in spent(cfg).values()]
    return [dict(zip(("width", "flops", "architecture"), one, strict=True)) for one in dict.fromkeys(wanted)]


def main(cfg: Config) -> dict[str, Any]:
    """Train the grid, fit it, predict the largest: the fits, with the `lesson` of `spent`."""
    out = Path(cfg.out)
    out.mkdir(parents=True, exist_ok=True)
    if cfg.points:
        return fitted(read_points(Path(cfg.points)), out)

    def measure(width: int, flops: float, architecture: Architecture) -> dict[str, float]:
        n, place = params(cfg, width), f"{cfg.out}/runs/{architecture.replace(' ', '-')}-{width}-{flops:.3g}"
        steps = max(1, round(flops / 6 / n / cfg.row / cfg.batch))
        one = replace(cfg, out=place, steps=steps, architecture=architecture, widths=(width,), budgets=(flops,))
        train(one, width)
        found = {"params": n, "tokens": steps * cfg.batch * cfg.row, "loss": logged(place, "eval/loss")[-1]}
        return found | {"critical_batch": noise_scale(one, width)}

    cells = cells_of(cfg)
    if cfg.debug:
        return train(cfg, cells[0]["width"]) or {}
    if len(cells) > 1 and detect(os.environ).world > 1:
        raise UserError(f"{len(cells)} networks, and several processes train one: give one width, budget, no left_out")
    cells = grid(cfg, cells, measure)
    text = io.StringIO()
    writer = csv.DictWriter(text, cells[0])
    writer.writeheader()
    writer.writerows(cells)
    rundir.write_atomic(out / "points.csv", text.getvalue().encode())
    print(f"{table(cells)}\ncritical_batch: tokens, where the run ended", flush=True)
    if not (lesson := spent(cfg)):
        return {}
    loss = {(c["architecture"], c["width"], c["flops"]): c["loss"] for c in cells}
    told = [
        {"compute": how, "width": w, "flops": c} | {kind: loss[kind, w, c] for kind in get_args(Architecture)}
        for how, (w, c) in lesson.items()
    ]
    print(f"\nWhat more compute buys, and what the architecture (nats):\n{table(told)}")
    known = [c for c in cells if c["architecture"] == "gpt" and c["width"] != cfg.left_out[0]]
    largest = [c for c in cells if c["width"] == cfg.left_out[0]]
    points = Points(*(np.array([float(c[k]) for c in known]) for k in ("params", "tokens", "loss")))
    found = fitted(points, out, *((c["params"], c["tokens"]) for c in largest))
    for c in largest:
        print(f"it has {c['loss']:.4f}")
    print(f"see {', '.join(str(out / name) for name in PLOTS)}", flush=True)
    return found | {"lesson": told, "largest": largest[0]["loss"] if largest else None}


def claim(cfg: Config) -> None:
    """The least loss by compute is a power law, and L(N, D) predicts the largest model, which it has not seen."""
    found = main(cfg)
    r2, off = found["by_compute"]["r2"], abs(found["predicted"] / found["largest"] - 1)
    before, on_data, _ = found["lesson"]
    bought = {kind: before[kind] - on_data[kind] for kind in ("gpt", "no attention")}
    with_it = f"{on_data['flops'] / before['flops']:g} x the compute, on data, buys with attention more by (nats)"
    figures = [
        Figure(f"least loss by compute, {found['runs']} runs: R^2", {cfg.seed: r2}, "a line", least=0.98),
        Figure("loss of the left-out largest model, off L(N, D) (%)", {cfg.seed: 100 * off}, "none", most=2),
        Figure(with_it, {cfg.seed: bought["gpt"] - bought["no attention"]}, "none", least=0.08),
    ]
    judge(cfg, figures, tuned_on=TUNED_ON, pictures=[Path(cfg.out) / name for name in PLOTS])


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
