"""The loop. Meant to be read, and to be copied by a recipe whose paper has another one."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from dltrain.data.loader import Rows
from dltrain.evaluation import evaluate_all, evaluated
from dltrain.run import Run


def fit(
    run: Run,
    task: nn.Module,
    optimizer: Optimizer,
    schedule: Callable[[int], float],
    data: Iterator[list[Any]],
    evals: Mapping[str, Rows] | None = None,
) -> dict[str, dict[str, float]]:
    """Train until `cfg.steps`, from wherever the run was. Returns the evaluations after the last step.

    A task maps a micro-batch to sums, "loss" among them; `batch["count"]` says over how many items. `schedule` maps a
    step to a multiplier of the learning rate. `evals` are held-out rows by the name under which their means are logged.
    """
    cfg, evals = run.cfg, evals or {}
    figures = evaluate_all(run, task, evals) if run.unevaluated else evaluated(run, evals)
    for step in run.steps():
        multiplier = schedule(step)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * multiplier
        for batch in run.lanes(data):
            run.backward(task(batch))
        norm = run.step()
        if run.due(cfg.log_every):
            run.report(grad_norm=norm, lr=optimizer.param_groups[0]["lr"])
        if run.due(cfg.eval_every):
            figures = evaluate_all(run, task, evals)
        if run.due(cfg.save_every):
            run.save()
    return figures
