"""--debug: one process, one device, deterministic; a checklist with a verdict per line, in about a minute.

Each line is a bug that trains without a word: a wrong loss scale, a detached parameter, rows that see each other, a
mask that shows the future, state that a resume forgets.
"""

import contextlib
import dataclasses
import hashlib
import io
import math
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dltrain import checkpoint
from dltrain.config import Config
from dltrain.data.loader import Loader, Rows
from dltrain.data.order import Order
from dltrain.loop import fit
from dltrain.run import Run
from dltrain.seeds import seed_step

Batch = dict[str, Tensor]


def checklist(
    cfg: Config,
    build: Callable[[], nn.Module],
    optimizer_of: Callable[[nn.Module], Optimizer],
    schedule: Callable[[int], float],
    rows: Rows,
    *,
    chance: float,
    decode: Callable[[Batch], str] = lambda batch: "",
    causal: bool = False,
) -> None:
    """Print a verdict per line; exit code 1 if one fails.

    `chance` is the mean loss (nats) that a model which knows nothing should have. `decode` shows a batch as the model
    sees it. A `causal` task has "ids_BL" and "targets_BL" (-100: not predicted) in its batches.
    """
    few = min(cfg.batch, 8)  # rows, so that a large preset too takes about a minute
    lanes = 2 if few % 2 == 0 else 1
    cfg = dataclasses.replace(
        cfg, strategy="single", batch=few, lanes=lanes, micro_batch=0, workers=0, compile=False, debug=False,
        save_async=False, wandb="",
    )  # fmt: skip
    loader = Loader(rows, Order(len(rows), cfg.seed), batch=few, lanes=1, micro_batch=few, workers=0)
    batch = next(loader.steps(0, 1, [0]))[0].batch
    verdicts: list[bool] = []

    def line(what: str, good: bool, detail: str) -> None:
        verdicts.append(good)
        print(f"{'ok  ' if good else 'FAIL'}  {what:<44} {detail}", flush=True)

    with tempfile.TemporaryDirectory() as folder, Run(dataclasses.replace(cfg, out=f"{folder}/probe")) as run:
        batch = {k: v.to(run.device) for k, v in batch.items()}
        sample = decode(batch)
        line("a row as the model sees it", True, sample)
        with contextlib.redirect_stdout(io.StringIO()):
            task, optimizer = run.prepare(build, optimizer_of)
        seed_step(cfg.seed, 0, 0, 0)
        loss = float(_mean(task, batch).detach())
        line(
            "loss at initialisation is that of chance",
            abs(loss - chance) < 0.1 * chance,
            f"{loss:.3f}, chance {chance:.3f}",
        )
        _mean(task, batch).backward()
        without = [name for name, p in task.named_parameters() if p.grad is None or not bool(_whole(p.grad).any())]
        line(
            "every parameter has a gradient",
            not without,
            ", ".join(without[:5]) or f"{len(list(task.parameters()))} of them",
        )
        leak = _leak(task, batch)
        line("rows do not see each other", leak < 1e-4, f"a row alone and among others: {leak:.1e} apart")
        if causal:
            leak = _future(task, batch)
            line("no position sees the future", leak < 1e-4, f"with other tokens after the middle: {leak:.1e} apart")
        first, last, steps = _overfit(task, optimizer, batch)
        line("overfits one batch", last < 0.2 * first, f"loss {first:.3f} -> {last:.3f} in {steps} steps")
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        short = dataclasses.replace(cfg, log_every=1, save_every=3, eval_every=0)

        def train(name: str, steps: int) -> str:
            with Run(dataclasses.replace(short, out=f"{folder}/{name}", steps=steps)) as run:
                task, optimizer = run.prepare(build, optimizer_of)
                fit(run, task, optimizer, schedule, run.batches(rows))
            return _digest(Path(folder) / name)

        six, again = train("six", 6), train("again", 6)
        train("halves", 3)
        halves = train("halves", 6)
    line("the same seed gives the same bits", six == again, six if six == again else f"{six} and {again}")
    line("3 + 3 steps equal 6", six == halves, six if six == halves else f"{halves} instead of {six}")
    if not all(verdicts):
        raise SystemExit(1)


def _mean(task: nn.Module, batch: Batch) -> Tensor:
    return task(batch)["loss"] / batch["count"]


def _whole(tensor: Tensor) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


@torch.no_grad()
def _leak(task: nn.Module, batch: Batch) -> float:
    """How far the loss of two halves of the rows together is from their losses apart, or from another order's."""
    task.eval()
    size = next(v.shape[0] for v in batch.values() if v.ndim)
    half = max(size // 2, 1)

    def loss(index: list[int]) -> float:
        picked = {k: v[index] if v.ndim and v.shape[0] == size else v for k, v in batch.items()}
        return float(task(picked)["loss"].double())

    a, b = list(range(half)), list(range(size - half, size))
    together, apart = loss(a + b), loss(a) + loss(b)
    again = loss(b + a)
    task.train()
    return max(abs(together - apart), abs(together - again)) / max(abs(apart), 1e-9)


@torch.no_grad()
def _future(task: nn.Module, batch: Batch) -> float:
    """How far the loss of the first half of every row changes, relatively, with other tokens in the second half."""
    task.eval()
    ids_BL, targets_BL = batch["ids_BL"], batch["targets_BL"].clone()
    middle = ids_BL.shape[1] // 2
    targets_BL[:, middle:] = -100
    other_BL = ids_BL.clone()
    other_BL[:, middle + 1 :] = ids_BL.flip(0, 1)[:, middle + 1 :]
    losses = [float(task({**batch, "ids_BL": i, "targets_BL": targets_BL})["loss"]) for i in (ids_BL, other_BL)]
    task.train()
    return abs(losses[0] - losses[1]) / max(abs(losses[0]), 1e-9)


def _overfit(task: nn.Module, optimizer: Optimizer, batch: Batch, most: int = 400) -> tuple[float, float, int]:
    """Loss (dropout off) before and after training on one batch alone, until a tenth is left or `most` steps."""
    task.eval()
    first = last = float(_mean(task, batch).detach())
    for step in range(most):
        optimizer.zero_grad()
        loss = _mean(task, batch)
        loss.backward()
        nn.utils.clip_grad_norm_(task.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = max(group["base_lr"], 1e-3) * min(1.0, (step + 1) / 20)
        optimizer.step()
        last = float(loss.detach())
        if not math.isfinite(last) or last < 0.1 * first:
            break
    task.train()
    return first, last, step + 1


def _digest(out: Path) -> str:
    """Of the newest checkpoint's tensors and the logged rows."""
    newest = checkpoint.steps(out / "checkpoints")[-1]
    digest = hashlib.sha256((out / "metrics.jsonl").read_bytes())
    for name, tensor in sorted(checkpoint.read(newest, "").items()):
        digest.update(name.encode() + tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
