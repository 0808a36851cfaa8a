"""muP: a learning rate found at a small width holds at a large one. Yang et al. 2022, "Tensor Programs V".

    python recipes/studies/mup_study.py claim      # the sweep, the coordinate check, the verdict and the plots
    sbatch --array=0-57 slurm/array.sbatch recipes/studies/mup_study.py gpu --out /scratch/me/mup

https://arxiv.org/abs/2203.03466. GPTs of several widths are trained at a grid of learning rates, a factor of two apart,
as GPT-2 (standard) and under muP (table 8; dltrain/models/gpt.py, `base_width`). Under muP the best rate stays where it
is; in the standard parametrisation it falls as the width grows (figures 1 and 3). The coordinate check (section D.1)
says why: by how much the first steps move attention, the feed-forward network and the logits, by width. At the base
width both are the same network.

Departs from the paper: bytes of books, one layer, one head, which grows with the width; the weights of the output are
the embedding's; queries do not begin at zero; a coordinate's change is from its first value.

A grid of runs, each resumed exactly, under any strategy; `sbatch --array` deals them (dltrain/grid.py). Measured: from
width 64 to 512 the best rate moves by one factor of two under muP and by two without (docs/scaling.md). `gpu`, which
should show the same to width 2048, is not yet measured.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal

import dltrain

Parametrisation = Literal["muP", "standard"]


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    data: str = ""  # folder of train.jsonl.gz and valid.jsonl.gz, by default $DLTRAIN_DATA/gutenberg-en; or shards
    text: int = 1 << 24  # bytes of the training text; 0: all
    unseen: int = 512  # held-out rows
    widths: tuple[int, ...] = (64, 512)
    exponents: tuple[int, ...] = (-13, -12, -11, -10, -9, -8)  # learning rates, peak: powers of two
    parametrisation: Parametrisation = "muP"  # of one run
    lr: float = 0.0  # of one run
    base_width: int = 512  # muP's
    checked: tuple[int, ...] = (64, 128, 256, 512, 1024)  # widths of the coordinate check
    check_exponent: int = -12  # its learning rate
    row: int = 32  # tokens
    batch: int = 4
    layers: int = 1
    heads: int = 1


PRESETS = {
    "claim": Config(seed=1, steps=300, log_every=100),
    "debug": Config(
        data="embedded:topics", unseen=16, widths=(8, 16), exponents=(-8, -5), base_width=8, checked=(8, 16, 32),
        row=16, batch=8, steps=4, lanes=4, log_every=2, save_every=2,
    ),
    "gpu": Config(
        steps=1000, text=0, unseen=4096, widths=(128, 512, 2048), base_width=128, row=256, batch=64, heads=4, layers=4,
        exponents=(-13, -12, -11, -10, -9, -8, -7, -6), precision="bf16", log_every=100, save_every=1000,
    ),
}  # fmt: skip
PRESETS["paper"] = replace(  # figure 1: widths of the Transformer, on their own text
    PRESETS["gpu"], steps=10_000, widths=(128, 256, 512, 1024, 2048, 4096, 8192), precision="fp32",
    exponents=tuple(range(-16, -5)),
)  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)  # before torch is imported, which takes over a second

import os
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from dltrain.claim import Figure, judge, logged
from dltrain.data.byte_text import VOCAB, byte_windows
from dltrain.data.token_rows import blank
from dltrain.data.windows import Windows
from dltrain.errors import UserError
from dltrain.flops import Work
from dltrain.grid import grid, table
from dltrain.launch import detect
from dltrain.models.gpt import Gpt, GptConfig
from dltrain.optim import Builder, adamw
from dltrain.plot import curves
from dltrain.scaling import power_law
from dltrain.schedules import cosine
from dltrain.seeds import key

PLOTS = ("sweep.png", "coordinates.png")
TUNED_ON = (0, 100)
PARTS = ("attention", "mlp", "logits")

# B rows of a micro-batch, L tokens of a row, V vocabulary


class Predict(nn.Module):
    def __init__(self, cfg: Config, width: int):
        super().__init__()
        self.model = Gpt(model_config(cfg, width))

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Sums over the targets, of which there are batch["count"]."""
        return {"loss": self.model.loss(batch["ids_BL"], batch["targets_BL"])}


def model_config(cfg: Config, width: int) -> GptConfig:
    return GptConfig(
        vocab=VOCAB, layers=cfg.layers, width=width, heads=cfg.heads, positions=cfg.row, dropout=0.0,
        base_width=cfg.base_width if cfg.parametrisation == "muP" else 0,
    )  # fmt: skip


def optimizer_of(cfg: Config, width: int) -> Builder:
    return adamw(cfg.lr, (0.9, 0.95), 1e-8, decay=0.0, hidden_rate=model_config(cfg, width).hidden_rate)


def rows_of(cfg: Config) -> tuple[Windows, Windows]:
    return byte_windows(cfg.data, cfg.row, text=cfg.text, unseen=cfg.unseen)


def train(cfg: Config, width: int) -> None:
    """One run, from the first step to the last."""
    with dltrain.Run(cfg) as run:
        rows, unseen = run.everywhere(lambda: rows_of(cfg))
        does = Work(lambda: Predict(cfg, width), optimizer_of(cfg, width), blank(cfg.row), tokens=cfg.row, causal=True)
        run.measure(does)
        task, optimizer = run.prepare(does.task, does.optimizer)
        schedule = cosine(max(1, cfg.steps // 10), cfg.steps, 0.1)
        dltrain.fit(run, task, optimizer, schedule, run.batches(rows), evals={"eval": unseen})


def coordinates(cfg: Config, width: int, steps: int = 4) -> dict[str, float]:
    """By how much `steps` steps on one batch move the last layer's parts and the logits: root mean squares."""
    torch.manual_seed(key("coordinates", cfg.seed))
    task = Predict(cfg, width)
    optimizer, index_B = optimizer_of(cfg, width)(task), np.arange(cfg.batch) * cfg.row
    batch = rows_of(cfg)[0].batch(np.zeros_like(index_B), index_B)
    now: dict[str, Tensor] = {}
    first: dict[str, Tensor] = {}

    def note(name: str, module: nn.Module, inputs: Any, output: Tensor) -> None:
        now[name] = output.detach()

    for name, part in (("attention", "out"), ("mlp", "down")):
        module = task.model.get_submodule(f"layers.{cfg.layers - 1}.{part}")
        module.register_forward_hook(partial(note, name))
    task.model.register_forward_hook(partial(note, "logits"))
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"]
    for step in range(steps + 1):
        task.model(batch["ids_BL"])
        first = first or dict(now)
        if step < steps:
            optimizer.zero_grad()
            (task(batch)["loss"] / batch["count"]).backward()
            optimizer.step()
    return {name: float((now[name] - first[name]).square().mean().sqrt()) for name in PARTS}


def main(cfg: Config) -> dict[str, Any]:
    """The sweep and the check: {"best": exponent of the best rate by parametrisation and width, "growth": ...}."""
    if cfg.debug:
        raise UserError("the checklist of --debug is for one run, here are many: use preset debug")
    if detect(os.environ).world > 1:
        raise UserError("a sweep is many small runs: start it with python, or as an array of jobs")
    torch.set_num_threads(int(os.environ.get("DLTRAIN_THREADS", 1)))  # their number changes the bits
    names: tuple[Parametrisation, ...] = ("muP", "standard")

    def measure(kind: str, parametrisation: Parametrisation, width: int, exponent: int) -> dict[str, float]:
        place = f"{cfg.out}/runs/{parametrisation}-{width}-{exponent}"
        one = replace(cfg, out=place, parametrisation=parametrisation, lr=2.0**exponent, widths=(), exponents=())
        if kind == "check":
            return coordinates(one, width)
        train(one, width)
        return {"loss": logged(place, "eval/loss")[-1]}

    cells = [
        {"kind": kind, "parametrisation": name, "width": width, "exponent": exponent}
        for kind, widths, exponents in (
            ("sweep", cfg.widths, cfg.exponents), ("check", cfg.checked, (cfg.check_exponent,))
        )
        for name in names for width in widths for exponent in exponents
    ]  # fmt: skip
    cells = grid(cfg, cells, measure)
    print(table(cells))
    sweep, check = ([c for c in cells if c["kind"] == kind] for kind in ("sweep", "check"))
    losses = {
        name: {
            w: [c["loss"] for c in sweep if (c["parametrisation"], c["width"]) == (name, w)] for w in cfg.widths
        }
        for name in names
    }  # fmt: skip
    rates = [2.0**e for e in cfg.exponents]
    panels = {f"{n}: loss (nats)": {f"width {w}": (rates, y) for w, y in by.items()} for n, by in losses.items()}
    curves(Path(cfg.out) / PLOTS[0], panels, x="learning rate")
    moved = {part: {n: [c[part] for c in check if c["parametrisation"] == n] for n in names} for part in PARTS}
    panels = {
        f"{part}, moved": {n: (list(cfg.checked), y) for n, y in by.items()} for part, by in moved.items()
    }  # fmt: skip
    curves(Path(cfg.out) / PLOTS[1], panels, x="width", log=list(panels))
    best = {n: {w: cfg.exponents[int(np.argmin(y))] for w, y in by.items()} for n, by in losses.items()}
    growth = {n: {part: power_law(cfg.checked, moved[part][n]).exponent for part in PARTS} for n in names}
    for n in names:
        said = ", ".join(f"width {w}: 2^{e}" for w, e in best[n].items())
        grown = ", ".join(f"{part} width^{g:.2f}" for part, g in growth[n].items())
        print(f"{n:>8}: best rate at {said}; the first steps move {grown}", flush=True)
    return {"best": best, "growth": growth}


def claim(cfg: Config) -> None:
    """How far the best learning rate moves from the smallest width to the largest, under muP and without it."""
    found = main(cfg)
    moved = {n: abs(by[min(by)] - by[max(by)]) for n, by in found["best"].items()}
    change = {n: max(abs(g) for g in by.values()) for n, by in found["growth"].items()}
    what = f"from width {min(cfg.widths)} to {max(cfg.widths)}, factors of two"
    changes = "what the first steps move changes with the width, largest exponent"
    figures = [
        Figure(f"muP: best learning rate moves {what}", {cfg.seed: moved["muP"]}, "0", most=1),
        Figure(f"standard: best learning rate moves {what}", {cfg.seed: moved["standard"]}, "many", least=2),
        Figure(f"muP: {changes}", {cfg.seed: change["muP"]}, "0", most=0.5),
        Figure(f"standard: {changes}", {cfg.seed: change["standard"]}, "1", least=0.75),
    ]
    judge(cfg, figures, tuned_on=TUNED_ON, pictures=[Path(cfg.out) / name for name in PLOTS])


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
