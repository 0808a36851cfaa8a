"""Evaluation: sums over every row once, on any number of processes, the same bits."""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from dltrain import rundir
from dltrain.data.loader import Rows, n_micro, nth
from dltrain.lanes import all_gather
from dltrain.run import Run

LOOK = 8  # rounds of an evaluation between two looks at whether to leave


@torch.no_grad()
def evaluate(run: Run, task: nn.Module, rows: Rows, may_leave: bool = False) -> dict[str, float]:
    """Means of the task's sums over all `rows`: micro-batches dealt round-robin, gathered once, added in order.

    With `may_leave` a signal to any process ends the run here; the caller begins the next launch with this evaluation
    where `run.unevaluated` is set.
    """
    micro = run.cfg.micro_batch or run.cfg.batch // run.strategy.lanes
    world, rank = run.me.world, run.me.rank
    names: list[str] = []
    mine: list[Tensor] = []
    task.eval()
    rounds = -(-n_micro(rows, micro) // world)
    # As many for every rank, since a sharded model's forward takes all: rows -1 are padding and count for nothing.
    for j in run.track(range(rank, rounds * world, world), "evaluating"):
        if may_leave and j // world % LOOK == 0:
            run.leave_unevaluated()
        batch = nth(rows, micro, j)
        run.left_out.note(run.step_done, batch.pop("damaged", []))
        sums = task({k: v.to(run.device) for k, v in batch.items()})
        names = sorted(sums)
        mine.append(torch.stack([*(sums[k].double() for k in names), batch["count"].to(run.device).double()]))
    task.train()
    run.share_damage(always=True)
    values_NK = torch.stack(mine)
    if world > 1:
        everyone = values_NK.new_empty(world * len(mine), values_NK.shape[1])
        all_gather(everyone, values_NK)
        order = [j % world * rounds + j // world for j in range(n_micro(rows, micro))]
        values_NK = everyone[order]
    total = values_NK.sum(0)
    return dict(zip(names, (total[:-1] / total[-1]).tolist(), strict=True))


def evaluate_all(run: Run, task: nn.Module, evals: Mapping[str, Rows]) -> dict[str, dict[str, float]]:
    """Evaluate and log each of `evals`. A signal may end the run here; the next launch has `run.unevaluated` set."""
    figures = {name: evaluate(run, task, rows, may_leave=True) for name, rows in evals.items()}
    for name, means in figures.items():
        run.report_eval(name, means)
    run.unevaluated = False
    return figures


def evaluated(run: Run, evals: Mapping[str, Rows]) -> dict[str, dict[str, float]]:
    """What `evaluate_all` logged after the last step, of a run that is done; {} of any other."""

    def read() -> dict[str, dict[str, float]]:
        rows = [row for row in rundir.read_rows(Path(run.cfg.out) / "metrics.jsonl") if row["step"] == run.cfg.steps]
        values = {k: float(v) for row in rows for k, v in row.items()}
        return {name: {k[len(name) + 1 :]: v for k, v in values.items() if k.startswith(f"{name}/")} for name in evals}

    return run.first(read) if run.step_done == run.cfg.steps else {}
