"""Rates of things that take turns in one process, so that a busy machine slows all of them alike."""

import itertools
import statistics
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

SECONDS = 0.5  # of a turn, at least


@dataclass(frozen=True)
class Side:
    """An endless iterator, of which `chunk` items are taken between looks at the clock; each is `units` of work."""

    name: str
    items: Iterator[Any]
    units: float = 1.0
    chunk: int = 1


@dataclass(frozen=True)
class Rates:
    """Units of one side in each turn: per second, and per second of processor time that the process had."""

    per_second: list[float] = field(default_factory=list)
    per_cpu_second: list[float] = field(default_factory=list)

    @property
    def cpu(self) -> float:
        """The median per second of processor time, which does not depend on what else the machine does."""
        return statistics.median(self.per_cpu_second)


def rates(sides: list[Side], turns: int) -> dict[str, Rates]:
    """Of each side in each turn, after a turn that only warms up."""
    found = {side.name: Rates() for side in sides}
    for turn in range(turns + 1):
        for side in sides if turn % 2 else reversed(sides):
            done, start, cpu = 0, time.perf_counter(), time.process_time()
            while (spent := time.perf_counter() - start) < SECONDS or not done:
                deque(itertools.islice(side.items, side.chunk), maxlen=0)
                done += side.chunk
            if turn:
                found[side.name].per_second.append(done * side.units / spent)
                found[side.name].per_cpu_second.append(done * side.units / (time.process_time() - cpu))
    return found
