"""A running average of a model's weights, beside the model: Polyak and Juditsky 1992, "Acceleration of stochastic
approximation by averaging"; with a decay as in Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 8.

    self.model, self.average = Net(), Average(Net(), decay=0.999)     # in the task's __init__
    averaging(sgd(0.1), lambda task: (task.model, task.average))      # the builder of its optimizer

Parameters and buffers of the average are the task's own, so they are sharded, saved and restored as all others.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dltrain.kernels.adamw import local
from dltrain.optim import Builder


class Average(nn.Module):
    """`model`, whose weights and buffers become an average of another's. At first it is a plain mean."""

    steps: Tensor

    def __init__(self, model: nn.Module, decay: float):
        super().__init__()
        self.model, self.decay = model.requires_grad_(False), decay
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def reset_parameters(self) -> None:
        self.steps.zero_()

    def forward(self, *args: Any) -> Any:
        return self.model(*args)

    @torch.no_grad()
    def update(self, other: nn.Module) -> None:
        """Take in the weights of `other` as they are now: average = d average + (1 - d) weights, d = min(decay,
        n / (n + 1)) after n updates. Integers are copied."""
        n = self.steps.double()
        part = 1 - (n / (n + 1)).clamp(max=self.decay)
        mine, theirs = (map(local, m.state_dict().values()) for m in (self.model, other))
        for average, now in zip(mine, theirs, strict=True):
            if average.is_floating_point():
                average.lerp_(now, part.to(average.dtype))
            else:
                average.copy_(now)
        self.steps += 1


def averaging(build: Builder, of: Callable[[Any], tuple[nn.Module, Average]]) -> Builder:
    """The optimizer of `build`, after each of whose steps the average follows; `of` finds both in the task."""

    def with_average(task: nn.Module) -> torch.optim.Optimizer:
        optimizer = build(task)
        model, average = of(task)
        optimizer.register_step_post_hook(lambda *_: average.update(model))
        return optimizer

    return with_average
