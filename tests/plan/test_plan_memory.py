"""Bytes that last, as real processes hold them; the peak against a real process's memory (a minute)."""

import dataclasses
from pathlib import Path

import pytest
import torch
import toy
import worlds

from dltrain import flops
from dltrain.optim import adamw
from dltrain.plan import check
from dltrain.plan.memory import Place, lasting, sizes
from dltrain.strategy import _local as local


def work() -> flops.Work:
    return flops.Work(lambda: toy.Toy(0.1), adamw(1e-2), {})


def held(cfg: toy.Config) -> tuple[int, int, int]:
    """Bytes of this rank's weights, gradients (before the update takes them) and optimizer state."""
    seen: list[int] = []
    with toy.Run(cfg) as run:
        task, optimizer = run.prepare(work().task, work().optimizer)
        data = run.batches(toy.ToyRows())
        strategy = run.strategy

        def note(*_: object) -> None:
            seen.append(sum(local(p.grad).nbytes for p in strategy.params if p.grad is not None))

        if cfg.strategy.startswith("zero"):
            return zero(run, data, task)
        optimizer.register_step_pre_hook(note)
        for _ in run.steps():
            for batch in run.lanes(data):
                run.backward(task(batch))
            run.step()
        state = [v for s in optimizer.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
        return sum(local(p).nbytes for p in strategy.params), seen[-1], sum(local(v).nbytes for v in state)


def zero(run, data, task) -> tuple[int, int, int]:
    for _ in run.steps():
        for batch in run.lanes(data):
            run.backward(task(batch))
        run.step()
    engine, inner = run.strategy.optimizer, run.strategy.optimizer.optimizer
    if run.strategy.stage < 3:
        flat = [*engine.bit16_groups_flat, *engine.single_partition_of_fp32_groups]
    else:
        flat = [*engine.fp32_partitioned_groups_flat, *(p.ds_tensor for p in run.strategy.params)]
        flat += [p.data for p in run.strategy.params if p.data.numel() == p.ds_numel]
    state = [v for s in inner.state.values() for v in s.values() if isinstance(v, torch.Tensor)]
    return sum(t.nbytes for t in flat), -1, sum(t.nbytes for t in state)


@pytest.mark.parametrize(
    ("strategy", "world", "local_world", "precision"),
    [
        ("single", 1, 1, "fp32"),
        ("ddp", 3, 3, "fp32"),
        ("ddp", 2, 2, "bf16"),
        ("fsdp", 1, 1, "fp32"),
        ("fsdp", 3, 3, "fp32"),  # no size is a multiple of three
        ("fsdp", 4, 4, "bf16"),
        ("hybrid", 4, 2, "fp32"),
        ("zero1", 2, 2, "fp32"),
        ("zero1", 4, 4, "bf16"),
        ("zero2", 2, 2, "bf16"),
        ("zero3", 2, 2, "fp32"),
        ("zero3", 4, 4, "bf16"),
    ],
)
def test_bytes_that_last_are_exact(tmp_path: Path, strategy: str, world: int, local_world: int, precision: str):
    cfg = toy.Config(out=str(tmp_path / "run"), steps=1, lanes=4, batch=8, save_every=0)
    cfg = dataclasses.replace(cfg, strategy=strategy, precision=precision)  # type: ignore[arg-type]
    real = worlds.launch(world, held, cfg, local_world=local_world)
    found, buffers = sizes(work())
    for rank, (parameters, gradients, optimizer) in enumerate(real):
        planned = lasting(found, buffers, cfg, Place(world, local_world, rank))
        assert (planned.parameters, planned.optimizer) == (parameters, optimizer)
        assert gradients in (planned.gradients, -1)  # DeepSpeed has let go of them


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from Linux's /proc")
def test_the_peak_is_that_of_a_real_process():
    """docs/plan.md has a dozen trainings; here a small one, whose process has a few megabytes of its own."""
    cfg = check.Training(layers=2, batch=4, steps=2)
    assert check.predicted(cfg, gpu=False) == pytest.approx(check.apart(cfg), rel=0.1)
