"""What a checkpoint costs a run with `--save-async`: the step that saves, and those during which it is written."""

import contextlib
import dataclasses
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dltrain import checkpoint
from dltrain.loop import fit
from dltrain.progress import track
from dltrain.run import Run
from dltrain.throughput.compare import quartiles, settings
from dltrain.throughput.phases import synchronise
from dltrain.throughput.workloads import Workload

STEPS = 20  # after a checkpoint, and as many that none touches


class _Enough(SystemExit):
    """All was measured."""


def stall(name: str, load: Workload, rounds: int, at: torch.device) -> dict[str, Any]:
    """A record of plain values, quartiles over the rounds: seconds by which a step that saves is longer, how many times
    the usual time the next `STEPS` steps take, seconds from then on until the checkpoint is published.

    A round is `STEPS` steps behind a checkpoint, `STEPS` without one, and a step that saves.
    """
    period = 2 * STEPS + 1
    begins, ends = [], []  # of each step
    clock, commits = [], []  # the calendar's time at each end; seconds from there until a checkpoint is published
    with tempfile.TemporaryDirectory() as folder:
        cfg = dataclasses.replace(settings(load, f"{folder}/run"), save_every=period, save_async=True, keep=1)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(_Enough), Run(cfg) as run:
            shown = iter(track(range((rounds + 1) * period + 1), f"checkpoint of {name}, steps"))

            def schedule(step: int) -> float:
                synchronise(at)
                ends.append(time.perf_counter())
                clock.append(time.time())
                next(shown)
                if step == (rounds + 1) * period:
                    raise _Enough
                if step > period and step % period == STEPS:
                    run.settle()
                    path = checkpoint.steps(Path(cfg.out) / "checkpoints")[-1]
                    commits.append((path / "manifest.json").stat().st_mtime - clock[step - STEPS])  # its last file
                begins.append(time.perf_counter())
                return 1.0

            task, optimizer = run.prepare(load.task, load.optimizer)
            size = sum(t.nbytes for t in run.strategy.tensors().values())
            fit(run, task, optimizer, schedule, run.batches(load.rows()))
    seconds = [end - begin for begin, end in zip(begins, ends[1:], strict=True)]
    stalls, slowdowns = [], []
    for start in range(period, (rounds + 1) * period, period):  # the first round has no checkpoint before it
        usual = seconds[start - 1 - STEPS : start - 1]
        stalls.append(seconds[start - 1] - statistics.median(usual))
        slowdowns.append(sum(seconds[start : start + STEPS]) / sum(usual))
    return {
        "size": name, "what": load.what, "precision": load.precision, "rounds": rounds, "checkpoint_bytes": size,
        "step_seconds": statistics.median(seconds), "stall_seconds": quartiles(stalls), "stall_goal": 0.1,
        "next_steps_times": quartiles(slowdowns), "next_steps_goal": 1.02,
        "published_after_seconds": quartiles(commits),
    }  # fmt: skip
