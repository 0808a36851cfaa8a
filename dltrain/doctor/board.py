"""The folder in which worried ranks leave their dossiers: `<out>/hang`, on the filesystem that all of them share.

    rank-00003.still.json  a rank that has not moved        verdict.json      who hangs and why, by the judge alone
    rank-00004.json        one that moves, since it was     rank-00003.stack  every thread of a rank, once a verdict
                           asked                                              stands

A dossier is written anew as long as its rank lives, so one that does not change for FRESH seconds is its rank's last
word, and one that never changes is an earlier launch's. The clock is the reader's.
"""

import contextlib
import dataclasses
import json
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain.doctor.watch import Line

FRESH = 4.0  # seconds, and twice the time between two posts


@dataclass(frozen=True)
class Worker:
    """A process of the data loader. `state` as in /proc, "gone" if there is none; `blocked` as in "read of FILE"."""

    pid: int
    state: str
    blocked: str = ""


@dataclass(frozen=True)
class Silent:
    """What is known of a rank that has no dossier, by its neighbours; an empty host: there was no word from it."""

    rank: int
    host: str = ""
    pid: int = 0
    step: int = -1
    state: str = ""  # of its process, as a worker's
    busy: bool = False  # it may be well: it uses CPU time, or is only late
    line: Line | None = None  # its main thread's last known place
    dump: str = ""  # what faulthandler wrote when the GIL could not be had


@dataclass(frozen=True)
class Dossier:
    """What a rank says of itself. Stacks have the innermost function first."""

    rank: int
    host: str
    pid: int
    step: int
    still: float  # seconds since its last sign of life
    worried: bool
    stack: tuple[Line, ...]
    threads: dict[str, tuple[Line, ...]] = dataclasses.field(default_factory=dict)
    calls: dict[str, int] = dataclasses.field(default_factory=dict)  # collectives begun, by process group
    workers: tuple[Worker, ...] = ()
    blocked: str = ""  # the main thread, as a worker's
    gpu: bool = False
    neighbours: tuple[Silent, ...] = ()  # the other ranks of its host, as far as they have left a note there


class Board:
    """One rank's view of it. Raises OSError where it cannot be written."""

    def __init__(self, out: Path, rank: int, world: int):
        self.folder, self.rank = out / "hang", rank
        self.every = 1 + world // 128  # seconds between two looks: many ranks must not load the filesystem
        self.fresh_for = max(FRESH, 2.5 * self.every)
        self.stale = {name: _identity(self.folder / name) for name in self._names()}
        self.seen: dict[str, tuple[Any, float]] = {}
        self.posted: Path | None = None

    def _names(self) -> list[str]:
        try:
            return os.listdir(self.folder)
        except OSError:
            return []

    def _fresh(self, name: str) -> bool:
        identity = _identity(self.folder / name)
        if identity is None or self.stale.get(name) == identity:
            return False
        now = time.monotonic()
        if self.seen.get(name, (None, 0.0))[0] != identity:
            self.seen[name] = (identity, now)
        return now - self.seen[name][1] < self.fresh_for

    def complaint(self) -> bool:
        """Whether a rank that lives is worried; a failed look-up of one folder, in a healthy run."""
        return any(name.endswith(".still.json") and self._fresh(name) for name in self._names())

    def post(self, dossier: Dossier) -> None:
        """Leave one's own dossier, instead of the last."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"rank-{self.rank:05d}{'.still' if dossier.worried else ''}.json"
        beside = path.with_name(f".{path.name}.tmp")
        beside.write_text(json.dumps(dataclasses.asdict(dossier)))
        os.replace(beside, path)  # no fsync: the machine's death is no hang
        if self.posted not in (None, path):
            self.posted.unlink(missing_ok=True)
        self.posted = path

    def withdraw(self) -> None:
        """Take one's dossier back; the last one takes the folder."""
        if self.posted is not None:
            self.posted.unlink(missing_ok=True)
            self.posted = None
            with contextlib.suppress(OSError):
                self.folder.rmdir()

    def judging(self) -> bool:
        """Whether no lower rank lives: the lowest judges."""
        names = set(self._names())
        lower = (f"rank-{r:05d}{kind}.json" for r in range(self.rank) for kind in ("", ".still"))
        return not any(name in names and self._fresh(name) for name in lower)

    def dossiers(self) -> dict[int, Dossier]:
        """Those of the ranks that live."""
        found = {}
        for name in self._names():
            if name.startswith("rank-") and name.endswith(".json") and self._fresh(name):
                with contextlib.suppress(OSError, ValueError):  # taken back, meanwhile
                    dossier = _dossier(json.loads((self.folder / name).read_bytes()))
                    found[dossier.rank] = dossier
        return found

    def publish(self, verdict: dict[str, Any]) -> bool:
        """Write the verdict; False if another rank was first."""
        path, beside = self.folder / "verdict.json", self.folder / f".verdict-{self.rank}.tmp"
        if self.stale.get(path.name) == _identity(path):
            path.unlink(missing_ok=True)
        beside.write_text(json.dumps(verdict, indent=1))
        try:
            os.link(beside, path)
        except FileExistsError:
            return False
        finally:
            beside.unlink(missing_ok=True)
        return True

    def verdict(self) -> dict[str, Any] | None:
        """The verdict that stands in this launch."""
        path = self.folder / "verdict.json"
        if self.stale.get(path.name) == _identity(path):  # of an earlier launch, or none
            return None
        try:
            return json.loads(path.read_bytes())
        except (OSError, ValueError):
            return None

    def clear(self) -> None:
        """The run moves again."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.posted = None


def _identity(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns


def _dossier(fields: dict[str, Any]) -> Dossier:
    def lines(stack: list[dict[str, Any]]) -> tuple[Line, ...]:
        return tuple(Line(**line) for line in stack)

    fields["stack"] = lines(fields["stack"])
    fields["threads"] = {name: lines(stack) for name, stack in fields["threads"].items()}
    fields["workers"] = tuple(Worker(**worker) for worker in fields["workers"])
    fields["neighbours"] = tuple(
        Silent(**neighbour | {"line": Line(**neighbour["line"])}) for neighbour in fields["neighbours"]
    )
    return Dossier(**fields)
