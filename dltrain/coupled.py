"""Losses that couple all rows of a step, such as contrastive ones: exact, in the memory of one micro-batch.

Gao et al. 2021, https://arxiv.org/abs/2101.06983, section 3.2: a first pass over the micro-batches, without gradients,
gives the outputs of all rows; the loss and its gradient with respect to these outputs are then one small computation,
the same on every process; a second pass takes each micro-batch's gradient from there. Outputs of other processes thus
count with their gradients, and the bits do not depend on the number of processes.

    micros = run.fetch(data)
    couple(run, micros, project, objective)
    for batch in run.each(micros):
        run.backward(coupled(project, batch))

A step that is a single micro-batch is gone over once.

Legend: B rows of the step, M of a micro-batch; `...` is what an output has.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from dltrain.data.loader import Micro
from dltrain.run import Run

Project = Callable[[dict[str, Tensor]], Tensor]  # a micro-batch on the device -> outputs [M, ...]
Objective = Callable[[Tensor, Tensor], dict[str, Tensor]]  # outputs [B, ...], weights_B -> [B] each, "loss" among them


def couple(run: Run, micros: list[Micro], project: Project, objective: Objective) -> None:
    """The first pass: leave in each micro-batch its part of the objective's sums, and the gradient of the whole loss
    with respect to its outputs. All processes call it. `project` must give the same in both passes, so no dropout. The
    objective is computed in float32, whatever the precision of the task."""
    parts, lanes = micros[0].parts, run.strategy.lanes
    alone = lanes * parts == 1
    for micro in micros:
        micro.batch.update({name: value.to(run.device, non_blocking=True) for name, value in micro.batch.items()})
        with torch.set_grad_enabled(alone):
            micro.batch["output"] = project(micro.batch)

    def gathered(name: str) -> Tensor:
        mine = [micro.batch[name].detach().float() for micro in micros]
        return run.gather_lanes([torch.stack(mine[i : i + parts]) for i in range(0, len(mine), parts)]).flatten(0, 2)

    outputs = gathered("output").requires_grad_()
    sums = objective(outputs, gathered("weights_B"))
    (slope,) = torch.autograd.grad(sums["loss"].sum(), outputs)
    for micro in micros:
        M, at = len(micro.batch["weights_B"]), micro.lane * parts + micro.part
        rows = slice(at * M, (at + 1) * M)
        micro.batch.update({f"sum/{name}": value_B.detach()[rows].sum() for name, value_B in sums.items()})
        micro.batch["slope"] = slope[rows]


def coupled(project: Project, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """The second pass: sums for `run.backward`, the loss with the value and the gradient that the first pass found."""
    output = batch["output"] if batch["output"].requires_grad else project(batch)
    taken = (output.float() * batch["slope"]).sum()
    sums = {name.removeprefix("sum/"): value for name, value in batch.items() if name.startswith("sum/")}
    return sums | {"loss": sums["loss"] + (taken - taken.detach())}
