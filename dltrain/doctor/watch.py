"""Is this rank still? Its main thread is in the same call, its step is the same, and nobody here computes or reads.

Legend: a frame is the interpreter's; a `Line` is what is left of it on paper.
"""

import linecache
import os
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from types import FrameType

from dltrain.doctor import proc

PATIENCE = 5  # seconds without a sign of life before a rank complains
PATIENCE_GPU = 20  # a thread that waits for queued kernels does nothing else
PATIENCE_LIMIT = 60
CPU, BYTES = 0.05, 1 << 16  # a second: below both, a process does nothing
_LIBRARY = os.path.dirname(os.__file__) + os.sep  # the standard library, and site-packages in it
_C10D = ("distributed/distributed_c10d.py", "distributed/c10d_logger.py", "distributed/_functional_collectives.py")
_PACKAGES = ("site-packages", "dist-packages")


@dataclass(frozen=True)
class Line:
    """Where a thread is in one of its functions."""

    file: str
    line: int
    function: str
    text: str = ""

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.function}" + (f": {self.text}" if self.text else "")


def standard(file: str) -> bool:
    """Whether a file is the standard library's."""
    return file.startswith("<frozen") or (file.startswith(_LIBRARY) and not any(p in file for p in _PACKAGES))


def stack(frame: FrameType | None, text: bool = True) -> tuple[Line, ...]:
    """The innermost function first."""
    lines = []
    while frame is not None:
        file, number = frame.f_code.co_filename, frame.f_lineno or 0
        source = linecache.getline(file, number).strip() if text else ""
        lines.append(Line(file, number, frame.f_code.co_name, source))
        frame = frame.f_back
    return tuple(lines)


def collective(stack: Sequence[Line]) -> str:
    """The collective in which a thread waits for other ranks, from its stack; empty if it does not."""
    names = [line.function for line in stack if line.file.endswith(_C10D) and line.function != "wrapper"]
    if names or not stack:
        return names[-1] if names else ""
    inner = stack[0]
    if inner.function == "_engine_run_backward":
        return "backward"  # whose collectives are C++
    return "wait" if ".wait(" in inner.text and not standard(inner.file) else ""


def anchor(frame: FrameType) -> FrameType:
    """The innermost function that is no mere means of waiting, which may be called again and again by one wait."""
    inner: FrameType | None = frame
    while inner is not None and (standard(inner.f_code.co_filename) or inner.f_code.co_name == "_try_get_data"):
        inner = inner.f_back
    return inner or frame


@dataclass
class Watch:
    """Signs of life of the thread that makes it, looked for by another one, once a second.

    CPU time counts for nothing on a GPU (`spins`): a thread that waits for the device may do so at 100 %.
    """

    step: Callable[[], int]
    spins: bool = False
    thread: int = field(default_factory=threading.get_ident)
    task: int = field(default_factory=threading.get_native_id)
    still: int = 0  # seconds without a sign of life
    longest: float = 0.0  # such spell that ended well, waits for other ranks aside

    def __post_init__(self) -> None:
        self.place: tuple = ()
        self.held: FrameType | None = None
        self.before: tuple[float, int, float, int] | None = None
        self.at = time.monotonic()
        self.waits = False
        self.line = Line("", 0, "")

    @property
    def patience(self) -> float:
        """Twice what was once overcome: storage that is slow at times is not dead."""
        return min(max(PATIENCE_GPU if self.spins else PATIENCE, 2 * self.longest), PATIENCE_LIMIT)

    @property
    def worried(self) -> bool:
        return self.still >= self.patience

    def look(self) -> None:
        """Once a second. The thread is in the same call if its frame is the same object, so that one is held on to;
        not before a second look, since that keeps the function's variables alive."""
        frame = sys._current_frames().get(self.thread)
        if frame is None:
            return
        late, self.at = time.monotonic() - self.at > 2.5, time.monotonic()
        inner = anchor(frame)
        self.line = Line(inner.f_code.co_filename, inner.f_lineno or 0, inner.f_code.co_name)
        place = (inner.f_code, inner.f_lasti, self.step())
        same = place == self.place and self.held in (None, inner)
        self.place, self.held = place, inner if same else None
        alive = self._alive() if same else True
        if not same:
            self.before = None
        alive = alive or _excused(frame)
        if alive:
            if not self.waits:
                self.longest = max(self.longest, self.still)
            self.still = 0
        elif not late:  # a process that was stopped, or a machine that was asleep, has missed seconds of others' too
            self.still += 1
            self.waits = bool(collective(stack(frame)))

    def _alive(self) -> bool:
        """Whether this process or its children did anything since the last look, this thread's own doings aside."""
        me, pid = threading.get_native_id(), os.getpid()
        own, moved = time.process_time() - time.thread_time(), proc.moved(pid) - proc.moved(pid, me)
        before = self.before
        if before and ((own - before[0] >= CPU and not self.spins) or moved - before[1] >= BYTES):
            self.before = (own, moved, *before[2:])  # and no need to ask the children
            return True
        children = proc.family(pid)
        theirs, theirs_moved = sum(p.cpu for p in children), sum(proc.moved(p.pid) for p in children)
        self.before = (own, moved, theirs, theirs_moved)
        return before is None or theirs - before[2] >= CPU or theirs_moved - before[3] >= BYTES

    def stacks(self) -> tuple[tuple[Line, ...], dict[str, tuple[Line, ...]]]:
        """Of the thread watched, and of all others that are Python's, by name."""
        frames, names = sys._current_frames(), {t.ident: t.name for t in threading.enumerate()}
        others = {
            names.get(ident, str(ident)): stack(frame)
            for ident, frame in frames.items()
            if ident not in (self.thread, threading.get_ident())
        }
        return stack(frames.get(self.thread)), others

    def frames(self) -> list[FrameType]:
        """Of the thread watched, the innermost first."""
        frame, found = sys._current_frames().get(self.thread), []
        while frame is not None:
            found.append(frame)
            frame = frame.f_back
        return found


def loader_workers(frames: Iterable[FrameType]) -> list[int]:
    """The pids of the data loader's workers, if one of the functions is torch's that waits for them."""
    for frame in frames:
        if frame.f_code.co_filename.endswith("dataloader.py"):
            found = getattr(frame.f_locals.get("self"), "_workers", [])
            return [pid for w in found if (pid := w.pid)]
    return []


def _excused(frame: FrameType | None) -> bool:
    """Whether a debugger waits for someone to type, Triton compiles (which a spinning GPU process cannot tell from
    waiting), or a launch waits for the end of the one before, which has its limit."""
    while frame is not None:
        file, function = frame.f_code.co_filename, frame.f_code.co_name
        if file.endswith(("/pdb.py", "/bdb.py")) or "/triton/compiler/" in file or "/triton/backends/" in file:
            return True
        if function == "_wait_for_my_turn" and file.endswith("fence.py"):
            return True
        frame = frame.f_back
    return False
