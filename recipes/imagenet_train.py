"""Images into classes: shortcuts let deeper networks train. He et al. 2015, https://arxiv.org/abs/1512.03385.

    python recipes/imagenet_train.py gpu                       # ResNet-20 on CIFAR-10
    torchrun --nproc-per-node 8 recipes/imagenet_train.py paper --train 'imagenet-train-{0000..1281}.tar'

`--model` is any of the classic networks (dltrain/models/image.py), LeNet-5 to ResNet-152; presets, what is logged and
LARS are in docs/imagenet.md. `modern` has what came after the paper: cosine, smoothed labels, RandAugment, a running
average of the weights, and LARS for batches of 4,096.

Departs from the paper: every network has Szegedy's crops and one central crop in the test; a micro-batch is normalised
by itself; the rate falls at steps written down beforehand, not "when the error plateaus". `claim` has CIFAR-10 at 16
pixels, 8 channels and 400 steps, too few to get over a bad start, so its residual branches begin at zero (Goyal et al.
2017, https://arxiv.org/abs/1706.02677, section 5.1).

--average and LARS not under zero1 to zero3. Measured: recipes/README.md; `gpu` should reach at least 91.25 % (table 6):
not yet measured, as all other presets.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import dltrain


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    train: str = "embedded:digits/train"  # webdataset pattern (`dltrain shards`), or published:cifar10/train ...
    test: str = "embedded:digits/test"
    classes: int = 10
    subset: int = 0  # train on so many images; 0: all
    held_out: int = 0  # test on so many images; 0: all
    size: int = 32  # pixels
    crop: Literal["pad", "resized"] = "pad"  # of images in memory, shifted by up to `pad`; or of any part of any image
    pad: int = 4  # pixels
    flip: float = 0.5  # probability that an image is mirrored
    alternate: bool = False  # mirror (of images in memory) in every second epoch instead
    mean: tuple[float, float, float] = (0.4914, 0.4822, 0.4465)  # of the channels, in [0, 1]: CIFAR-10's
    std: tuple[float, float, float] = (0.2470, 0.2435, 0.2616)
    rand_augment: float = 0.0  # magnitude of RandAugment's two operations; 0: none
    smoothing: float = 0.0  # part of a label that is spread over all classes
    model: str = "resnet-20"
    width: int = 0  # channels of the first stage; 0: the paper's
    activation: str = ""  # relu or tanh, where the model has a choice
    dropout: float = -1.0  # -1: the paper's
    zero_gamma: bool = False  # residual branches begin at zero
    average: float = 0.0  # decay of a running average of the weights, which is then what is evaluated; 0: none
    batch: int = 128  # images per optimizer step, over all ranks
    optimizer: Literal["sgd", "lars"] = "sgd"
    lr: float = 0.1  # peak
    momentum: float = 0.9
    nesterov: bool = False
    decay: float = 1e-4
    clip: float = 0.0
    schedule: Literal["steps", "cosine", "linear"] = "steps"  # constant, with `drops` to a tenth
    drops: tuple[int, ...] = ()  # optimizer steps
    warmup: int = 0  # optimizer steps


CIFAR = Config(
    train="published:cifar10/train", test="published:cifar10/test", workers=4, log_every=100, eval_every=2000,
    save_every=2000,
)  # fmt: skip
IMAGENET = Config(
    train="imagenet-train-*.tar", test="imagenet-val-*.tar", classes=1000, size=224, crop="resized", batch=256,
    mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), workers=8, log_every=100, eval_every=5000, save_every=5000,
)  # fmt: skip
MODERN = replace(
    IMAGENET, model="resnet-50", schedule="cosine", smoothing=0.1, rand_augment=9.0, zero_gamma=True, nesterov=True,
    average=0.9999, precision="bf16", compile=True,
)  # fmt: skip
PRESETS = {
    "debug": Config(
        model="resnet-8", width=4, size=16, pad=2, batch=24, lanes=4, steps=8, lr=0.05, held_out=48, average=0.9,
        log_every=1, eval_every=4, save_every=4,
    ),
    "claim": replace(
        CIFAR, seed=2, workers=0, size=16, pad=0, flip=0.0, width=8, batch=32, steps=400, held_out=1000, lr=0.05,
        schedule="cosine", warmup=50, log_every=20, eval_every=0, save_every=0,
    ),
    "gpu": replace(CIFAR, steps=64_000, drops=(32_000, 48_000), compile=True),  # section 4.2; at least 91.25 %
    "resnet18-cifar": replace(  # 200 epochs; at least 95 %
        CIFAR, model="resnet-18", steps=78_200, schedule="cosine", decay=5e-4, precision="bf16", compile=True
    ),
    "speedrun": replace(  # 10 epochs; 94 % is the aim
        CIFAR, model="speedrun", batch=1000, steps=500, pad=2, alternate=True, smoothing=0.2, schedule="linear",
        warmup=115, lr=1.5, nesterov=True, momentum=0.85, decay=1.3e-3, average=0.95, precision="bf16", compile=True,
        eval_every=0, save_every=0,
    ),
    "imagenette": replace(  # 200 epochs of 9,469 images
        MODERN, train="published:imagenette128/train", test="published:imagenette128/test", classes=10, size=128,
        batch=64, steps=29_600, warmup=740, lr=0.05, decay=5e-5, average=0.999, eval_every=1480, save_every=1480,
    ),
    "paper": replace(IMAGENET, model="resnet-50", lanes=8, steps=600_000, drops=(150_000, 300_000, 450_000)),
    "modern": replace(  # 90 epochs
        MODERN, optimizer="lars", batch=4096, micro_batch=64, steps=28_151, warmup=1564, lr=10.0, decay=5e-5
    ),
    "alexnet": replace(  # 90 epochs
        IMAGENET, model="alexnet", batch=128, lr=0.01, decay=5e-4, steps=900_820, drops=(300_000, 600_000, 800_000)
    ),
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

import math
from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.average import Average, averaging
from dltrain.claim import Figure, judge, logged
from dltrain.convert.ready import image_shards
from dltrain.data.augment import normalise
from dltrain.data.crops import CentreCrop, RandomResizedCrop
from dltrain.data.decoded import DecodedRows
from dltrain.data.images import ImageRows, blank
from dltrain.data.rand_augment import rand_augment
from dltrain.data.sheet import filter_sheet
from dltrain.errors import UserError
from dltrain.flops import Work
from dltrain.models.image import image_model
from dltrain.models.speedrun import whitening
from dltrain.optim import Builder, lars, sgd
from dltrain.plot import curves
from dltrain.report import conclude, concluded, farewell, figure
from dltrain.rundir import write_atomic
from dltrain.schedules import constant, cosine, linear, staircase

# B rows of a micro-batch, K classes, C channels, H and W pixels


class Classify(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg, self.model = cfg, network(cfg)
        self.average = Average(network(cfg), cfg.average) if cfg.average else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the images, of which there are batch["count"]; in evaluation those of the average, if any."""
        images, labels_B, weights_B = batch["images_BCHW"], batch["labels_B"], batch["weights_B"]
        if self.training and self.cfg.rand_augment and "keys_B" in batch:  # a plan's batch has none
            images = rand_augment(images, batch["keys_B"], m=self.cfg.rand_augment)
        images = normalise(images, self.cfg.mean, self.cfg.std).to(weights_B.dtype)  # as fsdp has cast them
        net = self.model if self.training or self.average is None else self.average
        outputs = net(images)
        logits_BK, *others = outputs if isinstance(outputs, tuple) else (outputs,)  # GoogLeNet's other heads
        spread = self.cfg.smoothing if self.training else 0.0
        loss_B = F.cross_entropy(logits_BK.float(), labels_B, reduction="none", label_smoothing=spread)
        for other_BK in others:
            loss_B = loss_B + 0.3 * F.cross_entropy(other_BK.float(), labels_B, reduction="none")
        hits_B5 = logits_BK.topk(min(5, self.cfg.classes)).indices == labels_B[:, None]
        found = {"loss": loss_B, "top1": hits_B5[:, 0], "top5": hits_B5.any(1)}
        return {name: (value_B * weights_B.float()).sum() for name, value_B in found.items()}


def network(cfg: Config) -> nn.Module:
    asked = {"width": cfg.width, "activation": cfg.activation, "zero_gamma": cfg.zero_gamma}
    options: dict[str, Any] = {name: value for name, value in asked.items() if value}
    options |= {"dropout": cfg.dropout} if cfg.dropout >= 0 else {}
    return image_model(cfg.model, cfg.classes, cfg.size, **options)


def optimizer_of(cfg: Config) -> Builder:
    rule = lars if cfg.optimizer == "lars" else sgd
    build = rule(cfg.lr, cfg.momentum, cfg.decay, nesterov=cfg.nesterov)
    return averaging(build, lambda task: (task.model, task.average)) if cfg.average else build


def schedule_of(cfg: Config) -> Callable[[int], float]:
    if cfg.schedule != "steps":
        return {"cosine": cosine, "linear": linear}[cfg.schedule](cfg.warmup, cfg.steps)
    rise, fall = constant(cfg.warmup), staircase(cfg.drops, 0.1)
    return lambda step: rise(step) * fall(step)


def rows_of(cfg: Config) -> tuple[Any, dict[str, Any]]:
    """Images to train on, and to evaluate on: the test's and, of a subset, those trained on as they are."""
    train, test = image_shards(cfg.train), image_shards(cfg.test)
    few, unseen = (np.arange(min(n, len(s)) if n else len(s)) for n, s in ((cfg.subset, train), (cfg.held_out, test)))
    if cfg.crop == "resized":
        rows = ImageRows(train, cfg.size, RandomResizedCrop(), flip=cfg.flip, seed=cfg.seed, samples=few)
        return rows, {"eval": ImageRows(test, cfg.size, CentreCrop(), samples=unseen)}
    rows = DecodedRows(train, cfg.size, pad=cfg.pad, flip=cfg.flip, alternate=cfg.alternate, seed=cfg.seed, samples=few)
    evals = {"eval": DecodedRows(test, cfg.size, samples=unseen)}
    if (most := int(rows.label_N.max())) >= cfg.classes:
        raise UserError(f"{cfg.train} has a class {most}, counted from 0: give --classes {most + 1}")
    return rows, evals | ({"seen": DecodedRows(train, cfg.size, samples=few)} if cfg.subset else {})


def work(cfg: Config) -> Work:
    return Work(lambda: Classify(cfg), optimizer_of(cfg), blank(cfg.size))


def main(cfg: Config) -> None:
    does, schedule = work(cfg), schedule_of(cfg)
    if cfg.debug:
        rows, _ = rows_of(cfg)
        return dltrain.checklist(cfg, does.task, does.optimizer, schedule, rows, chance=math.log(cfg.classes))
    with dltrain.Run(cfg) as run:
        if run.cfg.strategy.startswith("zero") and (cfg.average or cfg.optimizer == "lars"):
            raise run.alike(UserError("--average and --optimizer lars need whole tensors: not under zero1 to zero3"))
        rows, evals = run.everywhere(lambda: rows_of(cfg))
        run.measure(does)
        whiten = partial(first_layer, cfg, rows) if cfg.model == "speedrun" else None
        task, optimizer = run.prepare(does.task, does.optimizer, whiten)
        means = dltrain.fit(run, task, optimizer, schedule, run.batches(rows), evals)
        if not concluded(run):
            conclude(run, lambda: results(cfg, run.weights(), means["eval"]))
        farewell(run)


def first_layer(cfg: Config, rows: Any) -> dict[str, Tensor]:
    index_N = np.arange(min(5000, len(rows)))
    images = normalise(rows.batch(np.zeros_like(index_N), index_N)["images_BCHW"], cfg.mean, cfg.std)
    return {"model.whiten.weight": whitening(images)}


def results(cfg: Config, weights: dict[str, Tensor], means: dict[str, float]) -> dict[str, Any]:
    """Accuracy beside chance, and a picture of the first layer's filters."""
    filters = next(w for name, w in weights.items() if name.startswith("model.") and w.ndim == 4)
    write_atomic(Path(cfg.out) / "filters.png", filter_sheet(filters.expand(-1, 3, -1, -1).numpy()))
    top1 = figure("top-1 accuracy", means["top1"], 1 / cfg.classes, "higher")
    return {"figures": [top1], "samples": [], "pictures": ["filters.png"]}


def claim(cfg: Config) -> None:
    """Training losses of 20 and 56 layers, without and with shortcuts, over the last 100 steps."""
    seeds, steps = (cfg.seed, cfg.seed + 1), range(cfg.log_every, cfg.steps + 1, cfg.log_every)
    lines, loss = {}, dict[tuple[str, int], float]()
    for seed, model in product(seeds, ("plain-20", "plain-56", "resnet-20", "resnet-56")):
        out = f"{cfg.out}/{model}-{seed}"
        main(replace(cfg, model=model, zero_gamma=model.startswith("resnet"), seed=seed, out=out))
        losses = logged(out, "loss")
        lines[f"{model}, seed {seed}"], loss[model, seed] = (steps, losses), float(np.mean(losses[-5:]))
    plain, residual = ({s: loss[f"{k}-56", s] - loss[f"{k}-20", s] for s in seeds} for k in ("plain", "resnet"))
    figures = [
        Figure("plain-56's training loss above plain-20's (nats)", plain, paper="above", least=0.12),
        Figure("ResNet-56's training loss above ResNet-20's (nats)", residual, paper="below", most=0.05),
    ]
    picture = curves(Path(cfg.out) / "depth.png", {"training loss": lines}, x="step")
    judge(cfg, figures, tuned_on=(0, 1), pictures=[picture])


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
