"""What a run had to leave out: damaged samples, the same list on every rank and in every checkpoint."""

import sys
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from dltrain.data.index import Damage


class LeftOut:
    """Damaged samples that training or evaluation met, and how often."""

    def __init__(self) -> None:
        self.times: dict[Damage, int] = {}
        self._mine: list[tuple[int, Damage]] = []  # since the ranks last told one another

    def note(self, step: int, damaged: list[Damage]) -> None:
        """This process has met them at `step`."""
        self._mine += [(step, damage) for damage in damaged]

    def share(self, gather: Callable[[Any], list[Any]]) -> list[tuple[int, Damage]]:
        """What all processes have met since the last time, in one order. All must call it."""
        found = sorted((note for notes in gather(self._mine) for note in notes), key=lambda n: (n[0], astuple(n[1])))
        self._mine = []
        for _, damage in found:
            self.times[damage] = self.times.get(damage, 0) + 1
        return found

    def state(self) -> list[list[Any]]:
        return [[list(astuple(damage)), times] for damage, times in sorted(self.times.items(), key=str)]

    def restore(self, state: list[list[Any]]) -> None:
        self.times = {Damage(*damage): times for damage, times in state}


def tell(found: list[tuple[int, Damage]], event: Callable[..., None] | None) -> None:
    """One line on stderr and in events.jsonl for each, by the process that has the log (`event`)."""
    for step, damage in found if event else []:
        print(f"left out at step {step}: {damage}", file=sys.stderr, flush=True)
        assert event
        event("left_out", step=step, **vars(damage))
