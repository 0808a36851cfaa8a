"""What runs in a process that is to be harmed: it notes what it does, and harms itself at the place that was drawn.

The code under test has no hooks for this: its functions are wrapped from outside, before the recipe is run. Notes are
one JSON list a line: ["rows", step, [[lane, part, digest], ...]], ["done", step], ["fault"], ["begun"].
"""

import errno
import hashlib
import json
import os
import resource
import runpy
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dltrain import checkpoint, evaluation, signals, strategy, zero
from dltrain.chaos.plan import Fault
from dltrain.data import loader
from dltrain.fence import Fence
from dltrain.log import Log
from dltrain.run import Run


def play(recipe: Path, arguments: list[str], notes: Path, fault: Fault | None) -> None:
    """Run the recipe as `python RECIPE ARGUMENTS` would, in this process."""
    victim = Victim(notes)
    victim.watch()
    if fault and fault.place != "any" and fault.rank == int(os.environ["RANK"]):
        victim.arm(fault)
    sys.argv = [str(recipe), *arguments]
    sys.path.insert(0, str(recipe.parent))
    runpy.run_path(str(recipe), run_name="__main__")


class Victim:
    def __init__(self, notes: Path):
        self.file = os.open(notes, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        self.workers: list[int] = []
        self.seen = 0

    def note(self, *what: Any) -> None:
        os.write(self.file, json.dumps(what).encode() + b"\n")

    def watch(self) -> None:
        """Note the rows of each step before they are trained on, and each step when it is done."""
        steps, step, listen = loader.Loader.steps, Run.step, signals.listen

        def noted_steps(this: Any, first: int, last: int, mine: Any) -> Any:
            source = steps(this, first, last, mine)
            try:
                for number, micros in enumerate(source, first):
                    self.note("rows", number, [[m.lane, m.part, _digest(m.batch)] for m in micros])
                    yield micros
            finally:
                source.close()

        def noted_step(this: Any) -> Any:
            norm = step(this)
            self.note("done", this.step_done)
            return norm

        def noted_listen() -> None:
            listen()
            self.note("begun")

        for owner, name, noted in ((loader.Loader, "steps", noted_steps), (Run, "step", noted_step)):
            setattr(owner, name, noted)
        signals.listen = noted_listen

    def arm(self, fault: Fault) -> None:
        """Have `fault` happen when this process comes to its place."""

        def here() -> bool:
            self.seen += 1
            if self.seen == fault.count:
                self.note("fault")
                self.strike(fault)
            return self.seen == fault.count

        PLACES[fault.place](here)
        if fault.who == "worker":
            self._watch_workers()

    def strike(self, fault: Fault) -> None:
        if fault.how == "quota":
            return resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
        if not fault.how.startswith("SIG"):
            raise OSError(getattr(errno, fault.how), os.strerror(getattr(errno, fault.how)))
        number = signal.Signals[fault.how]
        if fault.who == "worker":
            for pid in self.workers[:1]:
                os.kill(pid, number)
        elif fault.who == "launcher":
            os.kill(os.getppid(), number)
        elif fault.who == "all":
            os.killpg(0, number)  # the launcher among them
        else:
            os.kill(os.getpid(), number)

    def _watch_workers(self) -> None:
        from torch.utils.data import dataloader

        made = dataloader._MultiProcessingDataLoaderIter.__init__

        def noted(this: Any, *args: Any) -> None:
            made(this, *args)
            self.workers = [worker.pid for worker in this._workers]

        dataloader._MultiProcessingDataLoaderIter.__init__ = noted  # type: ignore[method-assign]


def _digest(batch: dict[str, Any]) -> str:
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(name.encode() + batch[name].contiguous().numpy().tobytes())
    return digest.hexdigest()[:16]


# --- places --------------------------------------------------------------------------------------------------------

Here = Callable[[], bool]  # whether the fault has just happened


def _around(owner: Any, name: str, before: Callable | None = None, after: Callable | None = None) -> None:
    """Wrap a function: `before` and `after` are called with its arguments."""
    original = getattr(owner, name)

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if before:
            before(*args)
        result = original(*args, **kwargs)
        if after:
            after(*args)
        return result

    setattr(owner, name, wrapped)


def _hook(here: Here) -> Callable[..., None]:
    """For torch, which takes what a hook returns in place of what it was given."""

    def hook(*_: Any) -> None:
        here()

    return hook


def _forward(here: Here) -> None:
    for kind in (strategy.Lanes, zero.Zero):
        _around(kind, "forward_of", before=lambda *_: here())


def _backward(here: Here) -> None:
    for kind in (strategy.Lanes, zero.Zero):
        _around(kind, "backward", before=lambda _, loss, *__: loss.register_hook(_hook(here)))


def _update(here: Here) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    register_optimizer_step_pre_hook(_hook(here))
    register_optimizer_step_post_hook(_hook(here))


def _shard(here: Here) -> None:
    def half(handle: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{handle}"))
        if path.name.startswith("__"):
            whole = path.read_bytes()
            os.truncate(path, len(whole) // 2)
            here()
            path.write_bytes(whole)  # not harmed after all

    _around(os, "fsync", before=half)


def _flush(here: Here) -> None:
    def rows(handle: int) -> None:
        if os.readlink(f"/proc/self/fd/{handle}").endswith("/metrics.jsonl"):
            here()

    _around(os, "fsync", before=rows)


def _rename(when: str) -> Callable[[Here], None]:
    def wrap(here: Here) -> None:
        _around(os, "rename", **{when: lambda _, to: here() if Path(to).name.startswith("step-") else None})

    return wrap


def _prune(here: Here) -> None:
    def half(path: Any, *_: Any) -> None:
        if Path(path).name.endswith(".old.tmp") and Path(path).exists():
            for file in sorted(Path(path).iterdir())[::2]:
                file.unlink()
            here()

    _around(shutil, "rmtree", before=half)


def _stall(here: Here) -> None:
    def blocked(*_: Any) -> None:
        if here():
            time.sleep(3600)

    _around(loader._Positions, "__getitem__", before=blocked)


PLACES: dict[str, Callable[[Here], None]] = {
    "start": lambda here: _around(Fence, "__init__", after=lambda *_: here()),
    "restore": lambda here: _around(checkpoint, "load", before=lambda *_: here()),
    "forward": _forward,
    "backward": _backward,
    "update": _update,
    "log": lambda here: _around(Log, "metrics", before=lambda *_: here()),
    "flush": _flush,
    "shard": _shard,
    "before rename": _rename("before"),
    "after rename": _rename("after"),
    "prune": _prune,
    "evaluation": lambda here: _around(evaluation, "nth", before=lambda *_: here()),
    "stall": _stall,
}
