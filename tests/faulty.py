"""The toy with faults: a NaN in a loss, in a gradient, in a sample; a spike; an update that ruins the weights.

A fault sits in a row, so it comes whenever the row is read, or (`TRANSIENT`) in whatever is read at a step, once.
"""

import dataclasses
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy
from torch import Tensor

from dltrain.data.order import Order
from dltrain.loop import fit
from dltrain.models.batch_norm import BatchNorm
from dltrain.optim import Builder, adamw, sgd
from dltrain.run import Run
from dltrain.schedules import linear
from dltrain.seeds import key

ROWS = 2000
KINDS = {"loss": 1, "gradient": 2, "sample": 3, "spike": 4}


@dataclass(frozen=True, kw_only=True)
class Config(toy.Config):
    steps: int = 12
    save_every: int = 4
    eval_every: int = 6
    optimizer: str = "adamw"
    faults: str = ""  # KIND@STEP ...: in a row that this step (from 0) would read, had nothing been skipped
    transient: str = ""  # the same, in no row: the first time that the step comes


def row_of(step: int, cfg: Config) -> int:
    """The row in the middle of what a step reads."""
    return int(Order(ROWS, key("order", cfg.seed)).at(np.array([step * cfg.batch + cfg.batch // 2]))[1][0])


class FaultyRows(toy.ToyRows):
    def __init__(self, cfg: Config):
        super().__init__(ROWS)
        pairs = [fault.split("@") for fault in cfg.faults.split()]
        self.faults = {row_of(int(step), cfg): KINDS[kind] for kind, step in pairs}

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        fault_M = torch.tensor([self.faults.get(int(i), 0) for i in index_M])
        weight_M = torch.where(fault_M == KINDS["sample"], torch.nan, 1.0)
        return super().batch(epoch_M, index_M) | {"fault_M": fault_M, "weight_M": weight_M}


class _Break(torch.autograd.Function):
    """The identity, whose gradient is NaN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return grad * torch.nan


class Faulty(toy.Toy):
    def __init__(self, dropout: float):
        super().__init__(dropout)
        self.statistics = BatchNorm(toy.D)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        sums = super().forward(batch)
        mean_MD = self.embed(batch["ids_ML"]).mean(1) * batch.get("weight_M", torch.ones(1))[:, None]
        loss = sums["loss"] + 1e-3 * self.statistics(mean_MD).cos().sum()
        fault_M = batch.get("fault_M", torch.zeros(1))
        if (fault_M == KINDS["loss"]).any():
            loss = loss * torch.nan
        if (fault_M == KINDS["gradient"]).any():
            loss = _Break.apply(loss)
        if (fault_M == KINDS["spike"]).any():
            loss = loss * 1000
        return sums | {"loss": loss}  # type: ignore[dict-item]


def build(cfg: Config) -> Builder:
    return sgd(1e-2, momentum=0.9) if cfg.optimizer == "sgd" else adamw(1e-2)


def train(cfg: Config) -> None:
    """With LATE, the host looks as late as on a GPU, and the update goes through the gate."""
    with Run(cfg) as run:
        task, optimizer = run.prepare(lambda: Faulty(cfg.dropout), build(cfg))
        data = run.batches(FaultyRows(cfg))
        if os.environ.get("LATE"):
            be_late(run)

        def schedule(step: int) -> float:
            if str(step) == os.environ.get("DIE_AFTER"):
                os.kill(os.getpid(), signal.SIGKILL)
            return float("nan") if str(step) == os.environ.get("POISON_AT") else linear(2, 200)(step)

        fit(run, task, optimizer, schedule, with_transient(run, cfg, data), evals={"eval": toy.ToyRows(31)})


def with_transient(run: Run, cfg: Config, data: Any) -> Any:
    """The fault of `transient` in the lane that this process has first, if it has lane 0."""
    kind, _, at = cfg.transient.partition("@")
    marker = Path(cfg.out) / f"happened-{run.me.rank}"
    for micros in data:
        if kind and run.step_done == int(at) and micros[0].lane == 0 and not marker.exists():
            marker.touch()
            batch = micros[0].batch | {"fault_M": torch.full_like(micros[0].batch["fault_M"], KINDS[kind])}
            micros = [dataclasses.replace(micros[0], batch=batch), *micros[1:]]
        yield micros


def be_late(run: Run) -> None:
    run.guard.at_once = False
    lanes = run.strategy

    def step(good: Tensor | None = None) -> None:
        if good is None:
            lanes._update()
        else:
            lanes.gate.through(lanes._update, good)
        lanes.optimizer.zero_grad()

    lanes.step = step  # type: ignore[method-assign]


def train_leaving_out(cfg: Config, step: int) -> None:
    """Plain: the optimizer is not asked at `step`, and the batch norm is not told."""
    with Run(cfg) as run:
        task, optimizer = run.prepare(lambda: Faulty(cfg.dropout), build(cfg))
        data = run.batches(FaultyRows(cfg))
        asked, told = optimizer.step, run.statistics.update
        for at in run.steps():
            for group in optimizer.param_groups:
                group["lr"] = group["base_lr"] * linear(2, 200)(at)
            for batch in run.lanes(data):
                run.backward(task(batch))
            optimizer.step = (lambda *a, **k: None) if at == step else asked  # type: ignore[method-assign]
            run.statistics.update = (lambda added: None) if at == step else told  # type: ignore[method-assign]
            run.report(grad_norm=run.step(), lr=optimizer.param_groups[0]["lr"])
            if run.due(cfg.save_every):
                run.save()
