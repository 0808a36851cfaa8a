"""Batch-size warm-up whose clock is samples: which positions a step reads, in closed form, both ways.

Growing the batch where the learning rate would fall: Smith, Kindermans, Ying and Le, "Don't decay the learning rate,
increase the batch size", 2018; from a small start: Brown et al., "Language models are few-shot learners", 2020,
appendix B.
"""

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from dltrain.data.order import require_same_past
from dltrain.errors import UserError


class Ramp:
    """`sizes` are (position, rows of a batch from there on): ((0, 64), (10_000, 128)).

    A step has the size that holds where its first row is. So the last batch of a segment may reach into the next one,
    which then begins where that batch ends; a segment that is reached across whole has no step.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]):
        """UserError unless the positions ascend from 0 and every batch has a row."""
        positions = [position for position, _ in sizes]
        if not positions or positions[0] != 0 or positions != sorted(set(positions)):
            raise UserError(f"batch sizes begin at positions {positions}; begin at 0 and let them ascend")
        if min(size for _, size in sizes) < 1:
            raise UserError(f"batch sizes are {[size for _, size in sizes]}; each must be at least 1")
        self.sizes = tuple((position, size) for position, size in sizes)
        self._first_step, self._start = [0], [0]  # of each segment
        for (_, size), (position, _) in zip(self.sizes, self.sizes[1:]):
            steps = max(0, -(-(position - self._start[-1]) // size))
            self._first_step.append(self._first_step[-1] + steps)
            self._start.append(self._start[-1] + steps * size)

    def batch(self, step: int) -> int:
        """Rows of a step."""
        return self.sizes[bisect_right(self._first_step, step) - 1][1]

    def position(self, step: int) -> int:
        """Position of the first row of a step: how many rows the steps before it have read."""
        i = bisect_right(self._first_step, step) - 1
        return self._start[i] + (step - self._first_step[i]) * self.sizes[i][1]

    def step_at(self, position: int) -> int:
        """The step that reads a position; step_at(position(s)) is s."""
        i = bisect_right(self._start, position) - 1
        return self._first_step[i] + (position - self._start[i]) // self.sizes[i][1]

    def state(self) -> dict[str, Any]:
        return {"batch": [list(pair) for pair in self.sizes]}

    def check(self, state: dict[str, Any], position: int) -> None:
        """UserError if the batches before `position` are not those that `state` tells of; later ones may change."""
        require_same_past("batch sizes", self.state()["batch"], state.get("batch", []), position)
