"""Is a step good? Told on the device, and known to the host one step later, without waiting for a GPU's queue to drain.

A step is bad where its loss, its gradient's norm or its batch statistics are not finite, or its loss is a spike: more
than `spike` standard deviations above the mean of the last good steps. All processes have the same sums and the same
norm, so all decide alike with nothing exchanged. To go back and leave out the data of a spike is what Chowdhery et al.
2022 did by hand ("PaLM", https://arxiv.org/abs/2204.02311, section 5.1).

Shapes: W good steps.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.skipped import Skipped

WINDOW = 128  # good steps that a loss is compared with
LEAST = 32  # of them before a spike can be told
IN_A_ROW = 8  # bad steps after which skipping has not helped


@dataclass(frozen=True)
class Bad:
    """A step, counted from 1, and what was wrong with it."""

    step: int
    why: str


class Guard:
    """Judges steps in order. Those that `skipped` has are skipped, whatever they look like: an earlier launch did so.

    `at_once`: the host looks at a step's end, since it computes by itself, and not in the midst of the next step.
    """

    def __init__(self, cfg: Config, device: torch.device, skipped: Skipped):
        self.cfg, self.spike, self.device, self.skipped = cfg, cfg.spike, device, skipped
        self.has_norm = cfg.precision != "fp16" and not cfg.strategy.startswith("zero")  # theirs may overflow
        self.at_once = device.type == "cpu"
        self.losses_W = torch.full((WINDOW,), torch.nan, dtype=torch.float64, device=device)
        self._no_limit = torch.tensor(torch.inf, dtype=torch.float64, device=device)
        self.in_a_row = 0
        self._posted: tuple[int, Tensor, torch.cuda.Event | None] | None = None

    def skips(self, step: int) -> bool:
        """Whether `step` is not to be taken if it is bad."""
        return self.cfg.on_bad == "skip" or step in self.skipped.steps

    def judge(self, step: int, loss: Tensor, norm: Tensor, statistics: Tensor) -> Tensor:
        """0-d bool on the device: whether `step` is good. `loss` is its mean per item; `statistics` may be empty."""
        norm = norm.to(self.device)
        good = torch.isfinite(loss) & torch.isfinite(statistics).all()
        if self.has_norm:
            good &= torch.isfinite(norm)
        if step in self.skipped.steps:
            good = torch.zeros_like(good)
        limit = self._no_limit
        if self.spike > 0:
            mean = self.losses_W.nanmean()
            deviation = (self.losses_W - mean).square().nanmean().sqrt()
            limit = torch.where(self.losses_W[-LEAST].isnan(), limit, mean + self.spike * deviation)
            good &= loss <= limit
            self.losses_W = torch.where(good, torch.cat([self.losses_W[1:], loss[None]]), self.losses_W)
        verdict, event = torch.stack([good.double(), loss, norm, limit]), None
        if self.device.type == "cuda":
            verdict, event = verdict.to("cpu", non_blocking=True), torch.cuda.Event()
            event.record()
        self._posted = step, verdict, event
        return good

    def look(self) -> Bad | None:
        """The step judged last if it was bad, once. Waits until the device has judged it.

        Raises:
            UserError: where that is the end of the run: `on_bad` is stop, or has been followed as often as it may be.
        """
        if self._posted is None:
            return None
        (step, verdict, event), self._posted = self._posted, None
        if event is not None:
            event.synchronize()
        good, loss, norm, limit = verdict.tolist()
        self.in_a_row = 0 if good else self.in_a_row + 1
        if good:
            return None
        if step in self.skipped.steps:
            return Bad(step, self.skipped.steps[step])
        why = _why(loss, norm, limit)
        if ending := self._ending():
            raise UserError(f"{why} at step {step}: not saved; earlier checkpoints are whole; {ending}")
        return Bad(step, why)

    def _ending(self) -> str:
        """Why the run cannot go on after a bad step; empty if it can."""
        advice = "lower --lr, or raise --warmup, in a new --out"
        if self.cfg.on_bad == "stop":
            return f"go on from them with --on-bad skip or rollback, or {advice}"
        if self.cfg.on_bad == "skip" and self.in_a_row == IN_A_ROW:
            return f"so were the {IN_A_ROW - 1} steps before, and skipping does not help: {advice}"
        if self.cfg.on_bad == "rollback" and len(self.skipped.windows) >= self.cfg.rollbacks:
            return f"it went back {self.cfg.rollbacks} times (--rollbacks), and that does not help: {advice}"
        return ""

    def state(self) -> dict[str, Any]:
        """To save, after a look."""
        known = self.losses_W[~self.losses_W.isnan()] if self.spike > 0 else self.losses_W[:0]
        return {"losses": known.tolist(), "in_a_row": self.in_a_row}

    def restore(self, state: dict[str, Any]) -> None:
        self._posted, self.in_a_row = None, state.get("in_a_row", 0)
        self.losses_W.fill_(torch.nan)
        if known := state.get("losses", []):
            self.losses_W[-len(known) :] = torch.tensor(known, dtype=torch.float64)


def _why(loss: float, norm: float, limit: float) -> str:
    if loss > limit and math.isfinite(loss):
        return f"the loss, {loss:.6g}, is a spike (over {limit:.6g})"
    if not math.isfinite(loss):
        return f"the loss ({loss}) is not finite"
    return f"the gradient (of norm {norm}) is not finite" if not math.isfinite(norm) else "a batch norm is not finite"
