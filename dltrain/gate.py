"""An optimizer's step that moves nothing where a tensor on the device says so, without waiting for the device.

What is on the device (weights, buffers, moments) keeps its bits at once. An optimizer's `step`, which the host counts,
is counted all the same, and taken back when the host learns that the step was not good: before the next one.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dltrain.kernels.adamw import AdamW, local
from dltrain.kernels.lamb import Lamb


class Gate:
    """The gate of one optimizer of one module."""

    def __init__(self, module: nn.Module, optimizer: Optimizer):
        self.module, self.optimizer = module, optimizer
        self.counts: list[tuple[Tensor, float]] = []  # what the host has counted, and from where

    @torch.no_grad()
    def through(self, step: Callable[[Tensor | None], None], good: Tensor) -> None:
        """Take `step`, which is given `good` (0-d bool) if it can see to it by itself, where `good` is true.

        AdamW's and LAMB's kernels can. Other optimizers, and those with hooks after the step (which may move anything),
        are let through, and put back: the copies take as much memory as weights and moments.
        """
        before = {id(n): float(n) for n in self._counts()}
        if isinstance(self.optimizer, AdamW | Lamb) and not self.optimizer._optimizer_step_post_hooks:
            step(good)
        else:
            kept = {_place(t): t.clone() for t in self._moved()}
            step(None)
            for t in self._moved():  # moments that this step has made were zero before it
                t.copy_(torch.where(good, t, kept.get(_place(t), torch.zeros_like(t))))
        self.counts = [(n, before.get(id(n), 0.0)) for n in self._counts()]

    def take_back(self) -> None:
        """The step was not good: put back what the host has counted."""
        for n, before in self.counts:
            n.fill_(before)

    def _counts(self) -> list[Tensor]:
        steps = (state.get("step") for state in self.optimizer.state.values())
        return [step for step in steps if isinstance(step, Tensor) and step.device.type == "cpu"]

    def _moved(self) -> Iterator[Tensor]:
        """All that a step may move on the device."""
        counts = {id(n) for n in self._counts()}
        state = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, Tensor)]
        for tensor in [*self.module.parameters(), *self.module.buffers(), *state]:
            if id(tensor) not in counts:
                yield local(tensor.detach())


def _place(tensor: Tensor) -> tuple[int, torch.Size]:
    """Where a tensor lies: `detach` and `to_local` make another object of the same one."""
    return tensor.data_ptr(), tensor.shape
