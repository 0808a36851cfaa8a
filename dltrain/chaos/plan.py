"""Which faults, drawn from a seed: pure functions, so that a plan is run again by its numbers."""

import errno
from dataclasses import dataclass, field, replace

import numpy as np

from dltrain.errors import UserError
from dltrain.seeds import key

# Places in the code where a process can be harmed; "any" is a moment, which no place in the code tells.
PLACES = {
    "start": "the run directory has just been taken",
    "restore": "a checkpoint is about to be loaded",
    "forward": "the forward of a micro-batch begins",
    "backward": "in the backward of a micro-batch",
    "update": "the optimizer's step begins or has ended",
    "log": "a row has been written",
    "flush": "the rows are about to be fsynced",
    "shard": "half of a shard of the checkpoint is on the disk",
    "before rename": "the checkpoint is whole, under its temporary name",
    "after rename": "the checkpoint has its name",
    "prune": "half of an old checkpoint is deleted",
    "evaluation": "a micro-batch of the evaluation",
    "stall": "the data does not come",
    "any": "a moment of the run's time",
}
KILLED = ("forward", "backward", "update", "log", "flush", "shard", "before rename", "after rename", "prune")
KILLED += ("evaluation", "start", "restore", "any", "any", "any")
PREEMPTED = (
    "start",
    "forward",
    "backward",
    "update",
    "shard",
    "after rename",
    "evaluation",
    "stall",
    "any",
    "any",
    "any",
)
FAILED = ("shard", "flush", "before rename")
CODES = (errno.ENOSPC, errno.EIO, errno.EROFS, errno.EDQUOT)
SIGNALS = ("SIGTERM", "SIGUSR1", "SIGUSR2")


@dataclass(frozen=True)
class Fault:
    """`how` is SIGKILL, a signal of SIGNALS, the name of an errno, or quota (files cannot grow); it happens when the
    process of `rank` comes to `place` for the `count`-th time, or after a `share` of the undisturbed run's seconds."""

    how: str
    who: str  # one, all, launcher or worker (of the data)
    place: str
    rank: int = 0
    count: int = 1
    share: float = 0.0

    def __str__(self) -> str:
        when = f"after {self.share:.0%} of the time" if self.place == "any" else f"{self.place} {self.count}"
        return f"{self.how} of {self.who if self.who != 'one' else f'rank {self.rank}'} at {when}"


@dataclass(frozen=True)
class Launch:
    """One launch of a run, harmed or (None) not."""

    strategy: str
    world: int
    fault: Fault | None = None
    workers: int = 0
    save_async: bool = False


@dataclass(frozen=True)
class Round:
    """One run: the launches that are harmed, and then as many of the last as it takes."""

    launches: list[Launch] = field(default_factory=list)
    last: Launch = Launch("single", 1)

    def sooner(self) -> "Round":
        """The same, harmed at the first chance: for a run that ended before its fault could happen."""
        faults = [replace(x.fault, count=1, share=x.fault.share / 3) if x.fault else None for x in self.launches]
        return Round([replace(x, fault=f) for x, f in zip(self.launches, faults, strict=True)], self.last)


def rounds(kind: str, n: int, seed: int, strategies: tuple[str, ...], worlds: tuple[int, ...]) -> list[Round]:
    """`n` runs of a kind: kills, preemptions or errors. ZeRO stays on two processes: its bits are theirs."""
    return [_round(kind, i, seed, strategies, worlds) for i in range(n)]


def _round(kind: str, i: int, seed: int, strategies: tuple[str, ...], worlds: tuple[int, ...]) -> Round:
    draw = np.random.Generator(np.random.Philox(key=key("chaos", kind, seed, i)))

    def one_of(options: tuple) -> object:
        return options[int(draw.integers(len(options)))]

    strategy = str(strategies[i % len(strategies)])

    def launch(harmed: bool, first: bool = False) -> Launch:
        if strategy.startswith("zero"):
            name, world = strategy, 2
        else:
            world = int(one_of(worlds))  # type: ignore[arg-type]
            name = str(one_of(("ddp", "fsdp"))) if i % 2 else strategy  # may change with the world
        fault = _fault(kind, draw, world) if harmed else None
        if fault and first and fault.place == "restore":  # there is nothing to load yet
            fault = replace(fault, place="start", rank=0)
        workers = 2 if fault and fault.who == "worker" else 0
        return Launch(name, world, fault, workers, bool(draw.random() < 0.2))

    harmed = 1 + int(kind == "kills" and draw.random() < 0.25)
    return Round([launch(True, i == 0) for i in range(harmed)], launch(False))


def _fault(kind: str, draw: np.random.Generator, world: int) -> Fault:
    places = {"kills": KILLED, "preemptions": PREEMPTED, "errors": FAILED}[kind]
    place, rank = places[int(draw.integers(len(places)))], int(draw.integers(world))
    if place in ("start", "log", "flush", "before rename", "after rename", "prune"):
        rank = 0  # what only the first process does
    most = {"forward": 20, "backward": 20, "update": 9, "log": 9, "evaluation": 6, "stall": 8}
    most |= {"shard": 2, "flush": 3, "before rename": 3, "after rename": 3, "prune": 1}
    count = int(draw.integers(1, most.get(place, 1) + 1))
    share = float(draw.uniform(0.02, 0.98))
    if kind == "kills":
        who = str(draw.choice(["one", "all", "launcher", "worker"], p=[0.45, 0.35, 0.15, 0.05]))
        place = "update" if who == "worker" else place
        return Fault("SIGKILL", who, place, rank, count, share)
    if kind == "preemptions":
        who = str(draw.choice(["one", "all", "launcher"]))
        return Fault(SIGNALS[int(draw.integers(3))], who, place, rank, count, share)
    if draw.random() < 0.3:
        return Fault("quota", "one", "flush", 0, count)
    return Fault(errno.errorcode[int(draw.choice(CODES))], "one", place, rank, count)


def listed(text: str) -> list[Round]:
    """`SIGKILL:one:backward:3,SIGTERM:launcher:shard` -> one run on two processes for each: how, who, place, count.

    Raises:
        UserError: for what is not of this form.
    """
    found = []
    for part in text.split(","):
        how, who, place, *rest = [*part.split(":"), "", ""]
        known = how in ("SIGKILL", "quota", *SIGNALS) or how in errno.errorcode.values()
        if not known or who not in ("one", "all", "launcher", "worker") or place not in PLACES:
            raise UserError(
                f"{part!r} is no fault: it is HOW:WHO:PLACE[:COUNT], with HOW SIGKILL, SIGTERM, ENOSPC, quota, ..., "
                f"WHO one, all, launcher or worker, PLACE one of {', '.join(PLACES)}"
            )
        fault = Fault(how, who, place, 0, int(rest[0] or 1), 0.5)
        found.append(Round([Launch("ddp", 2, fault, 2 * (who == "worker"))], Launch("ddp", 2)))
    return found
