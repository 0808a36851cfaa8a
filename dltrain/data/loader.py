"""Micro-batches by position: which rows, on which lane, at which step. Workers only prefetch; their number changes
nothing.

Shapes: M rows of a micro-batch.
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader

from dltrain.data.index import Damage
from dltrain.data.order import Ordering
from dltrain.data.ramp import Ramp
from dltrain.errors import UserError

Batch = dict[str, Any]  # tensors, and "damaged"


class Rows(Protocol):
    """What a recipe trains on. Picklable; equal arguments give equal tensors, in any process."""

    fingerprint: str  # of everything a row is made from

    def __len__(self) -> int:
        """Rows in an epoch."""
        ...

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray, /) -> Batch:
        """int64 [M], [M] -> one micro-batch, of a shape that depends on M alone. Row -1 is padding, weighing nothing.

        Includes "count", a 0-d int64: the number of items that sums over this batch will be divided by. A row whose
        sample is damaged is as padding, and then "damaged" is a list of `Damage`; otherwise there is no such key.
        """
        ...


@dataclass(frozen=True)
class Micro:
    """Micro-batch `part` of the `parts` of a lane."""

    lane: int
    part: int
    parts: int
    batch: dict[str, torch.Tensor]
    damaged: list[Damage]


class Loader:
    """Rows for training. Step s reads the next `batch` positions of `order`, of which lane l has its n-th part.

    `jumps` are (step, rows), any number of them for a step: from it on, all is read so many positions further on.
    """

    def __init__(
        self,
        rows: Rows,
        order: Ordering,
        *,
        batch: int | Ramp,
        lanes: int,
        micro_batch: int,
        workers: int,
        pin: bool = False,
        jumps: Sequence[tuple[int, int]] = (),
    ):
        """`batch` rows per step over all lanes, `micro_batch` rows per forward; `workers` processes (0: in this one).

        UserError for no rows, or a batch that cannot be cut like this.
        """
        if not len(rows):
            raise UserError("the training data has no rows; check the shards")
        self.rows, self.order, self.lanes, self.micro_batch = rows, order, lanes, micro_batch
        self.workers, self.pin, self.jumps = workers, pin, list(jumps)
        self.ramp = batch if isinstance(batch, Ramp) else Ramp(((0, batch),))
        for _, size in self.ramp.sizes:
            if size % (lanes * micro_batch):
                raise UserError(
                    f"batch ({size} rows) must be a multiple of {lanes * micro_batch} = lanes ({lanes}) x "
                    f"micro_batch ({micro_batch})"
                )

    def parts(self, step: int) -> int:
        """Micro-batches of a lane."""
        return self.ramp.batch(step) // self.lanes // self.micro_batch

    def start(self, step: int) -> int:
        """Position of the first row that `step` reads."""
        return self.ramp.position(step) + sum(rows for at, rows in self.jumps if at <= step)

    def end(self, step: int) -> int:
        """Position behind the last row that the steps before `step` have read: without the jumps that begin there."""
        return self.ramp.position(step) + self._jumped(step)

    def _jumped(self, step: int) -> int:
        return sum(rows for at, rows in self.jumps if at < step)

    def steps(self, first: int, last: int, mine: Sequence[int]) -> Generator[list[Micro], None, None]:
        """The micro-batches of the lanes `mine`, in order, of each of the steps first ... last - 1.

        Nothing before `first` is read. Close the iterator to stop early: its workers end with it.
        """
        batches = self._batches(first, last, mine)
        try:
            for s in range(first, last):
                step: list[Micro] = []
                parts = self.parts(s)
                for lane in mine:
                    for part in range(parts):
                        batch = next(batches)
                        if isinstance(batch, UserError):
                            raise batch
                        damaged = batch.pop("damaged", [])
                        step.append(Micro(lane, part, parts, batch, damaged))
                yield step
        finally:
            del batches  # ends the workers; left to a traceback and the collector, that would take 5 s

    def padding(self, step: int, mine: Sequence[int]) -> list[Micro]:
        """Micro-batches of the shape of those of `step`, without a row in them, and without a read."""
        parts, none_M = self.parts(step), np.full(self.micro_batch, -1)
        batch = self.rows.batch(np.zeros_like(none_M), none_M)
        return [Micro(lane, part, parts, batch, []) for lane in mine for part in range(parts)]

    def state(self, step: int) -> dict[str, Any]:
        """Where the next step, `step`, begins and in which order: all there is to resume."""
        data = {"fingerprint": self.rows.fingerprint, "rows": len(self.rows), "lanes": self.lanes}
        data |= {"order": self.order.state(), "position": self.end(step), "skipped": self._jumped(step)}
        return data | self.ramp.state()

    def check(self, state: dict[str, Any]) -> None:
        """UserError naming what differs if a run with `state` would not go on with the rows it left off at."""
        position = state["position"]
        for name, now in (("fingerprint", self.rows.fingerprint), ("rows", len(self.rows))):
            if state.get(name) != now:
                raise UserError(
                    f"the data has changed: {name} is {now}, the checkpoint has {state.get(name)}; restore it or start "
                    "a new run"
                )
        self.order.check(state["order"], position)
        skipped = state.get("skipped", 0)
        self.ramp.check(state, position - skipped)
        if (now := self._jumped(self.ramp.step_at(position - skipped))) != skipped:
            raise UserError(
                f"skipped.json tells of {now} rows that the run left out before its checkpoint, and the checkpoint of "
                f"{skipped}: restore the file"
            )

    def _starts(self, first: int, last: int, mine: Sequence[int]) -> Iterator[int]:
        """The position of the first row of each micro-batch."""
        for step in range(first, last):
            start, parts = self.start(step), self.parts(step)
            for lane in mine:
                for part in range(parts):
                    yield start + (lane * parts + part) * self.micro_batch

    def _batches(self, first: int, last: int, mine: Sequence[int]) -> Iterator[Batch | UserError]:
        source: Any = _Positions(self.rows, self.order, self.micro_batch)
        return iter(
            DataLoader(
                source,
                batch_size=None,  # the sampler's items are whole micro-batches
                sampler=self._starts(first, last, mine),  # type: ignore[arg-type]
                num_workers=self.workers,
                multiprocessing_context=_context() if self.workers else None,
                worker_init_fn=_begin,
                pin_memory=self.pin,
                generator=torch.Generator(),  # or it would draw from, and so change, the global one
            )
        )


class _Positions:
    """position of the first row -> micro-batch; the dataset that workers hold."""

    def __init__(self, rows: Rows, order: Ordering, micro_batch: int):
        self.rows, self.order, self.micro_batch = rows, order, micro_batch

    def __getitem__(self, start: int) -> Batch | UserError:
        try:
            return self.rows.batch(*self.order.at(np.arange(start, start + self.micro_batch)))
        except UserError as error:  # raised by the reader: torch would bury its one line in a traceback
            return error


def _begin(worker: int) -> None:
    """A signal to all processes of a job is for the trainer, which saves and then ends its workers. If it is killed
    they end by themselves: torch's own watchdog asks for the fork server, which lives as long as they do."""
    threading.Thread(target=_end_with_trainer, daemon=True).start()
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _end_with_trainer() -> None:
    if trainer := multiprocessing.parent_process():
        trainer.join()
        os._exit(1)


def _context() -> Any:
    """Workers come from a server process that has imported torch and never runs threads, so forking it is safe."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "dltrain.data.loader"])
    return context


def n_micro(rows: Rows, micro_batch: int) -> int:
    """Micro-batches in one pass over all rows."""
    return -(-len(rows) // micro_batch)


def nth(rows: Rows, micro_batch: int, j: int) -> Batch:
    """Micro-batch j of one pass in order, for evaluation; where the rows have run out, rows -1 fill it up."""
    index_M = np.arange(j * micro_batch, (j + 1) * micro_batch)
    index_M[index_M >= len(rows)] = -1
    return rows.batch(np.zeros_like(index_M), index_M)
