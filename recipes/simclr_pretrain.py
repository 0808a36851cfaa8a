"""SimCLR: two views of an image must find each other among all others. Chen et al. 2020, https://arxiv.org/abs/2002.05709.

    python recipes/simclr_pretrain.py claim        # CIFAR-10 at 16 pixels: crops, with and without colour
    torchrun --nproc-per-node 8 recipes/simclr_pretrain.py paper --train 'imagenet-train-*.tar'

NT-Xent (equation 1) couples all rows of a step: each process has the loss of all of them and its gradient, through the
negatives of other processes too, and the memory of one micro-batch (dltrain/coupled.py).

Departs from the paper: batch normalisation takes the statistics of a micro-batch (both views together), not of the
whole batch, so let micro-batches be large; inputs are 2x - 1; no running average of weights. Features are judged by
logistic regression (L-BFGS) and by 200 nearest neighbours, on views that are the whole image, without augmentation.

The same bits under single, ddp, fsdp and hybrid. LARS is not for zero1 to zero3.

Measured: `claim`, seeds 1 and 2, in points of accuracy: linear 8.3 and 8.8 above random weights and 3.8 and 2.9 above
training without jitter; neighbours 3.9 and 6.9, and 4.4 and 7.5. `gpu` (docs/simclr.md has what it should reach) and
`paper`: not yet measured.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import dltrain


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    train: str = "published:cifar10/train"  # webdataset pattern of images with a .cls; published: in $DLTRAIN_DATA
    test: str = "published:cifar10/test"
    subset: int = 0  # images to train on; 0: all
    probe: int = 0  # of them, images whose labels the judges of the features learn from; 0: all
    held_out: int = 0  # images to judge them on; 0: all
    size: int = 32  # pixels
    area: float = 0.08  # least part of an image that a view shows; 1: the whole image
    jitter: float = 0.5  # strength of the colour jitter; 0: no jitter and no grey views
    blur: bool = False  # half of the views; for images of 224 pixels
    model: str = "resnet-18"
    width: int = 0  # channels of the first stage; 0: the paper's
    projection: int = 128  # numbers of a projection
    temperature: float = 0.5
    batch: int = 512  # images per step, over all ranks; each has two views
    optimizer: Literal["lars", "adamw"] = "lars"
    lr: float = 1.0  # peak
    decay: float = 1e-6
    warmup: int = 0  # steps
    clip: float = 0.0


CIFAR = Config(workers=8, log_every=50, save_every=1000)
PRESETS = {
    "debug": Config(
        train="embedded:digits/train", test="embedded:digits/test", subset=240, probe=96, held_out=96, size=16,
        model="resnet-8", width=4, projection=8, batch=24, lanes=4, steps=8, log_every=1, eval_every=4, save_every=4,
    ),
    "claim": Config(
        seed=3, subset=20_000, probe=10_000, held_out=5000, size=16, area=0.2, model="resnet-8", projection=64,
        temperature=0.2, batch=256, steps=120, lr=3.0, warmup=12,
    ),
    "gpu": replace(CIFAR, batch=1024, steps=4900, warmup=490, precision="bf16"),
    "cifar10": replace(CIFAR, batch=1024, steps=49_000, warmup=490),
    "paper": Config(
        train="imagenet-train-*.tar", test="imagenet-val-*.tar", size=224, jitter=1.0, blur=True, model="resnet-50",
        temperature=0.1, batch=4096, steps=312_800, lr=4.8, warmup=3128, workers=8, log_every=100, save_every=1000,
    ),
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dltrain.claim import Figure, judge, logged
from dltrain.convert.ready import image_shards
from dltrain.coupled import couple, coupled
from dltrain.data.crops import CentreCrop, Crop, RandomResizedCrop
from dltrain.data.decoded import DecodedRows
from dltrain.data.images import ImageRows
from dltrain.data.sheet import contact_sheet
from dltrain.data.views import CroppedRows, ViewRows, blur, colour_jitter, greyscale, view_seed
from dltrain.errors import UserError
from dltrain.flops import Work
from dltrain.models.image import image_model
from dltrain.models.simclr import ProjectionHead, nt_xent
from dltrain.optim import adamw, lars
from dltrain.probe import features, linear, nearest, neighbours
from dltrain.report import conclude, concluded
from dltrain.rundir import write_atomic
from dltrain.schedules import cosine

QUERIES, NEAREST = 8, 7  # of the picture

# M rows of a micro-batch, N = 2 M views, view after view; D features, Z numbers of a projection; C, H, W of an image


def rows_of(cfg: Config) -> tuple[ViewRows, Any, Any]:
    """Pairs of views to train on; whole images to learn from, and to be judged on."""
    train, test = image_shards(cfg.train), image_shards(cfg.test)
    seen, unseen = (np.arange(min(n or len(s), len(s))) for n, s in ((cfg.subset, train), (cfg.held_out, test)))
    crop: Crop = RandomResizedCrop((cfg.area, 1.0)) if cfg.area < 1 else CentreCrop(1.0)
    kept = cfg.size <= 64  # small images are decoded once
    whole = DecodedRows if kept else partial(ImageRows, crop=CentreCrop())
    cropped = partial(CroppedRows if kept else ImageRows, train, cfg.size, crop, flip=0.5, samples=seen)
    views = ViewRows([cropped(seed=view_seed(cfg.seed, view)) for view in range(2)])
    return views, whole(train, cfg.size, samples=seen[: cfg.probe or None]), whole(test, cfg.size, samples=unseen)


def views_of(cfg: Config, batch: dict[str, Tensor]) -> Tensor:
    """Both views of every image with their colours, in 0 ... 1 (appendix A)."""
    images_NCHW, keys_N = batch["images_NCHW"].float() / 255, batch["keys_N"]
    if cfg.jitter:
        images_NCHW = greyscale(colour_jitter(images_NCHW, keys_N, cfg.jitter), keys_N)
    return blur(images_NCHW, keys_N) if cfg.blur else images_NCHW


class SimCLR(nn.Module):
    def __init__(self, cfg: Config):
        super().__init__()
        self.encoder: Any = image_model(cfg.model, 1, cfg.size, **({"width": cfg.width} if cfg.width else {}))
        self.head = ProjectionHead(self.encoder.fc.in_features, cfg.projection)
        self.encoder.fc = nn.Identity()

    def forward(self, images_NCHW: Tensor) -> tuple[Tensor, Tensor]:
        """Images in 0 ... 1 -> features h_ND and projections z_NZ."""
        h_ND = self.encoder((2 * images_NCHW - 1).contiguous(memory_format=torch.channels_last))
        return h_ND, self.head(h_ND)


def judged(run: dltrain.Run, cfg: Config, task: nn.Module, learn: Any, unseen: Any) -> tuple[dict[str, float], bytes]:
    """Accuracies on the features h and on the projections z; PNG: some images beside their nearest neighbours."""

    def encode(batch: dict[str, Tensor]) -> Tensor:
        return torch.cat([part.float() for part in task(batch["images_BCHW"].float() / 255)], 1)

    task.eval()
    (known, labels), (new, truth) = (features(run, encode, rows) for rows in (learn, unseen))
    task.train()
    h, z, h_new, z_new = (part for both in (known, new) for part in both.tensor_split([-cfg.projection], 1))

    def judge_them() -> tuple[dict[str, float], bytes]:
        figures = {"linear": linear((h, labels), (h_new, truth)), "nearest": nearest((h, labels), (h_new, truth))}
        figures["linear_on_z"] = linear((z, labels), (z_new, truth))
        seen = neighbours(h, h_new[:QUERIES], NEAREST)[1].tolist()
        sheet = [image for t, like in enumerate(seen) for image in (*pixels(unseen, [t]), *pixels(learn, like))]
        return figures, contact_sheet(sheet, columns=1 + NEAREST)

    return run.first(judge_them)


def pixels(rows: Any, index_M: list[int]) -> list[np.ndarray]:
    images_BCHW = rows.batch(np.zeros(len(index_M), np.int64), np.array(index_M))["images_BCHW"]
    return list(images_BCHW.permute(0, 2, 3, 1).numpy())


def work(cfg: Config) -> Work:
    rule = lars if cfg.optimizer == "lars" else adamw

    def loss(task: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        z_B2Z = task(batch["images_NCHW"].float() / 255)[1].unflatten(0, (-1, 2))
        return nt_xent(z_B2Z, batch["weights_B"], cfg.temperature)["loss"].sum()

    row = {"images_NCHW": torch.zeros(2, 3, cfg.size, cfg.size, dtype=torch.uint8), "weights_B": torch.ones(1)}
    return Work(lambda: SimCLR(cfg), rule(cfg.lr, decay=cfg.decay), row, steps=(loss,))


def main(cfg: Config) -> None:
    if cfg.debug:
        raise UserError(
            "the checklist of --debug is for losses of single rows, this one couples them: use preset debug"
        )
    with dltrain.Run(cfg) as run:
        if run.cfg.strategy.startswith("zero") and cfg.optimizer == "lars":
            raise run.alike(UserError("--optimizer lars needs whole tensors: not under zero1 to zero3; use ddp"))
        rows, learn, unseen = run.everywhere(lambda: rows_of(cfg))
        does = work(cfg)
        run.measure(does)
        task, optimizer = run.prepare(does.task, does.optimizer)
        data, schedule = run.batches(rows), cosine(cfg.warmup, cfg.steps)
        objective, picture = partial(nt_xent, temperature=cfg.temperature), b""

        def project(batch: dict[str, Tensor]) -> Tensor:
            """[M, 2, Z]"""
            return task(views_of(cfg, batch))[1].unflatten(0, (2, -1)).transpose(0, 1)

        for step in run.steps():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * schedule(step)
            micros = run.fetch(data)
            couple(run, micros, project, objective)
            for batch in run.each(micros):
                run.backward(coupled(project, batch))
            norm = run.step()
            if run.due(cfg.log_every):
                run.report(grad_norm=norm, lr=optimizer.param_groups[0]["lr"])
            if run.due(cfg.eval_every):
                figures, picture = judged(run, cfg, task, learn, unseen)
                run.report_eval("eval", figures)
            if run.due(cfg.save_every):
                run.save()
        if not concluded(run):
            picture = picture or judged(run, cfg, task, learn, unseen)[1]
            run.first(lambda: write_atomic(Path(cfg.out) / "neighbours.png", picture))
            conclude(run, lambda: {"figures": [], "samples": [], "pictures": ["neighbours.png"]})
        run.say(f"\nNeighbours     {cfg.out}/neighbours.png\nReport         {cfg.out}/report.html")


def claim(cfg: Config) -> None:
    """Features beside those of random weights, and beside those of views without colour jitter, on CIFAR-10."""
    seeds = range(cfg.seed, cfg.seed + 2)
    unmoved = replace(cfg, lr=0.0, steps=20)  # batch norm finds its statistics
    trainings = {"simclr": cfg, "no-jitter": replace(cfg, jitter=0.0), "random": unmoved}
    for (name, training), seed in product(trainings.items(), seeds):
        main(replace(training, seed=seed, out=f"{cfg.out}/{name}-{seed}"))

    def points(name: str, judge: str, seed: int) -> float:
        return 100 * logged(f"{cfg.out}/{name}-{seed}", f"eval/{judge}")[-1]

    def gain(judge: str, name: str) -> dict[int, float]:
        return {seed: points("simclr", judge, seed) - points(name, judge, seed) for seed in seeds}

    figures = [
        Figure("linear, minus random weights' (points)", gain("linear", "random"), paper="above", least=4),
        Figure("neighbours, minus random weights' (points)", gain("nearest", "random"), paper="above", least=2.5),
        Figure("linear, minus no jitter's (points)", gain("linear", "no-jitter"), paper="far above", least=1.5),
        Figure("neighbours, minus no jitter's (points)", gain("nearest", "no-jitter"), paper="no figure", least=2.5),
    ]
    judge(cfg, figures, tuned_on=(0, 1, 2), pictures=[Path(cfg.out) / f"simclr-{cfg.seed}" / "neighbours.png"])


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
