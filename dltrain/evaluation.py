"""Evaluation: sums over every row once, on any number of processes, the same bits."""

import torch
from torch import Tensor, nn

from dltrain.data.loader import Rows, n_micro, nth
from dltrain.lanes import all_gather
from dltrain.run import Run


@torch.no_grad()
def evaluate(run: Run, task: nn.Module, rows: Rows) -> dict[str, float]:
    """Means of the task's sums over all `rows`: micro-batches dealt round-robin, gathered once, added in order."""
    micro = run.cfg.micro_batch or run.cfg.batch // run.strategy.lanes
    world, rank = run.me.world, run.me.rank
    names: list[str] = []
    mine: list[Tensor] = []
    task.eval()
    rounds = -(-n_micro(rows, micro) // world)
    # As many for every rank, since a sharded model's forward takes all: rows -1 are padding and count for nothing.
    for j in run.track(range(rank, rounds * world, world), "evaluating"):
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
