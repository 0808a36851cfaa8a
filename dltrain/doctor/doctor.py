"""The doctor of one rank: a thread that looks after the main one once a second, and speaks up if a rank hangs."""

import contextlib
import dataclasses
import faulthandler
import linecache
import os
import shutil
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from types import FrameType
from typing import Any

from dltrain import rundir
from dltrain.doctor import note, proc
from dltrain.doctor.board import Board, Dossier, Silent, Worker
from dltrain.doctor.diagnosis import Verdict, diagnose, without, words
from dltrain.doctor.watch import CPU, Line, Watch, loader_workers
from dltrain.launch import Launch

HUNG = 70  # exit code of a run that hangs: EX_SOFTWARE of sysexits.h
COLLECT = 3.0  # seconds that a complaint waits for the other ranks' dossiers


class Doctor:
    """Looks after the thread that makes it, until `stop`. A healthy run costs a few tenths of a millisecond a second,
    writes nothing but a note on its own host, and asks the shared filesystem only whether `<out>/hang` is there.

    A hang is named on stderr and in events.jsonl; `grace` seconds later, unless it moves, all ranks leave with
    `HUNG`. Where the folder cannot be written, the doctor is silent.
    """

    def __init__(self, out: str, me: Launch, step: Callable[[], int], grace: int):
        self.out, self.me, self.grace = out, me, grace
        self.watch = Watch(step)
        self.board = Board(Path(out), me.rank, me.world)
        self.first_complaint: float | None = None
        self.suspected: Verdict | None = None  # at the last look
        self.named_at = 0.0  # by this rank
        self.leave_at = 0.0  # by a verdict that stands
        self.used: dict[int, float] = {}  # CPU seconds of neighbours, by pid
        self.moved_at = time.time()
        self.ended = threading.Event()
        self.note: note.Note | None = None
        if not faulthandler.is_enabled():
            faulthandler.enable()  # gloo aborts the process where collectives do not match: then its lines are told
        self.thread = threading.Thread(target=self._run, name="doctor", daemon=True)
        self.thread.start()

    def last_words(self, error: BaseException) -> int:
        """Say which rank ends of `error`, since the tracebacks of all come mixed. Returns the code to exit with."""
        if self.leave_at:  # of a hang that was named: the others have left
            return HUNG
        time.sleep(0.5)  # a worker that dies closes its connections a moment before
        dead = [
            w.pid for w in _workers(f for f, _ in traceback.walk_tb(error.__traceback__)) if w.state in ("Z", "gone")
        ]
        text = (str(error).splitlines() or [""])[0]
        text = f"fails: {type(error).__name__}: {text}"
        if dead:
            text = f"fails: worker {', '.join(map(str, dead))} of the data loader is dead"
        elif "gloo" in text and any(sign in text for sign in ("by peer", "Broken pipe")):
            text = "has lost another rank, which ended before it"
        who = f"rank {self.me.rank} ({socket.gethostname()}, pid {os.getpid()}, step {self.watch.step()})"
        self.stop()
        _print(f"\ndltrain: {who} {text}\n")
        return 1

    def stop(self) -> None:
        """The main thread is done."""
        self.ended.set()
        self.thread.join(10)

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # then peers know nothing of a rank that is stopped
            self.note = note.Note(self.out, self.me.rank)
        looks, failed, pause = 0, False, 0.0  # at once: a rank that is stopped in its first second has left a note
        while not self.ended.wait(pause):
            looks += 1
            try:
                self._look()
                if looks % self.board.every == 0:
                    self._consult()
            except OSError:  # the folder: full, read-only, gone
                pass
            except Exception:  # peers would take the rank of a doctor that died for one that hangs
                if not failed:
                    traceback.print_exc()
                failed = True
            pause = min(1.0, max(self.leave_at - time.time(), 0.01)) if self.leave_at else 1.0
        if self.note:
            self.note.close()
        with contextlib.suppress(OSError):
            self.board.withdraw()

    def _look(self) -> None:
        self.watch.look()
        if not self.watch.still:
            self.moved_at = time.time()
        if self.note:
            line = self.watch.line
            self.note.write(
                host=socket.gethostname(), step=self.watch.step(), line=[line.file, line.line, line.function]
            )

    # --- an episode ----------------------------------------------------------------------------------------------

    def _consult(self) -> None:
        if not (self.watch.worried or self.board.complaint()):
            if self.named_at:
                self._well()
            self.board.withdraw()
            self.first_complaint = self.suspected = None
            self.used.clear()
            self.leave_at = 0.0
            return
        self._obey()
        now = time.monotonic()
        self.first_complaint = self.first_complaint or now
        self.board.post(self._dossier())
        if self.board.judging():
            self._judge(ripe=now - self.first_complaint >= COLLECT)

    def _dossier(self) -> Dossier:
        main, others = self.watch.stacks()
        return Dossier(
            rank=self.me.rank,
            host=socket.gethostname(),
            pid=os.getpid(),
            step=self.watch.step(),
            still=round(time.time() - self.moved_at, 1),
            worried=self.watch.worried,
            stack=main,
            threads=others,
            calls=_calls(),
            workers=_workers(self.watch.frames()),
            blocked=proc.blocked_on(os.getpid(), self.watch.task),
            gpu=self.watch.spins,
            neighbours=self._neighbours(),
        )

    def _neighbours(self) -> tuple[Silent, ...]:
        """What this host knows of its other ranks."""
        first = self.me.rank - self.me.local_rank
        found = []
        for rank in range(first, first + self.me.local_world):
            if rank != self.me.rank and (word := note.read(self.out, rank)):
                file, number, function = word["line"]
                line = Line(file, number, function, linecache.getline(file, number).strip())
                known = Silent(rank, word["host"], word["pid"], word["step"], line=line, dump=word["dump"])
                late = word["age"] < COLLECT
                state, busy = ("", True) if late else self._pulse(word["pid"])
                found.append(dataclasses.replace(known, state=state, busy=busy))
        return tuple(found)

    def _pulse(self, pid: int) -> tuple[str, bool]:
        """The state of a neighbour's process, and whether it has used CPU time since the last look."""
        process = proc.process(pid)
        if process is None:
            return "gone", False
        before, now = self.used.get(pid), process.cpu + sum(p.cpu for p in proc.family(pid))
        self.used[pid] = now
        return process.state, before is None or now - before >= CPU * self.board.every

    def _judge(self, ripe: bool) -> None:
        """Name who hangs, if that has been clear for two looks, or say that it is over."""
        dossiers = self.board.dossiers()
        silent = without(self.me.world, dossiers)
        before, self.suspected = self.suspected, diagnose(dossiers, silent)
        verdict = self.suspected
        if verdict is None:
            if self.named_at:
                self._well()
            return
        if self.named_at or not ripe or before is None or (before.ranks, before.kind) != (verdict.ranks, verdict.kind):
            return
        if not self.board.publish(dataclasses.asdict(verdict) | {"leave_at": time.time() + self.grace}):
            return
        self.named_at = time.time()
        _print(words(verdict, dossiers, silent))
        _print(
            f"  dumps of all threads: {self.board.folder}\n"
            f"  unless it moves, all ranks leave in {self.grace} s with exit code {HUNG}\n"
        )
        for s in silent:
            if s.dump:
                (self.board.folder / f"rank-{s.rank:05d}.stack").write_text(s.dump)
        rundir.append_event(Path(self.out), "hang", ranks=verdict.ranks, why=verdict.kind, cause=verdict.cause)

    def _obey(self) -> None:
        """Where a verdict stands: write down all threads, and leave when it is time."""
        verdict = self.board.verdict()
        if verdict is None:
            self.leave_at = 0.0
            return
        if not self.leave_at:
            self.leave_at = verdict["leave_at"]
            with (self.board.folder / f"rank-{self.me.rank:05d}.stack").open("w") as file:
                faulthandler.dump_traceback(file)
        if time.time() >= self.leave_at:
            for child in proc.family(os.getpid()):
                if child.parent != os.getpid():  # a loader's worker, which may be stopped and never notice
                    os.kill(child.pid, signal.SIGKILL)
            if self.named_at:
                shutil.rmtree(note.folder(self.out), ignore_errors=True)
            os._exit(HUNG)  # no flush: the main thread may hold a file's lock

    def _well(self) -> None:
        seconds = time.time() - self.named_at
        self.named_at = 0.0
        self.board.clear()
        _print(f"\ndltrain: the run moves again, {seconds:.0f} s after the hang was named\n")
        rundir.append_event(Path(self.out), "hang_over", seconds=round(seconds))


def _print(text: str) -> None:
    """Past sys.stderr, whose lock the main thread may hold."""
    os.write(2, text.encode())


def _workers(frames: Iterable[FrameType]) -> tuple[Worker, ...]:
    found = []
    for pid in loader_workers(frames):
        process = proc.process(pid)
        found.append(Worker(pid, process.state if process else "gone", proc.blocked_on(pid)))
    return tuple(found)


def _calls() -> dict[str, int]:
    """How many collectives this process has begun in every process group."""
    c10d: Any = sys.modules.get("torch.distributed.distributed_c10d")
    if c10d is None or not c10d.is_initialized():
        return {}
    found = {}
    for group in list(c10d._world.pg_map):
        try:
            found[group.group_name] = group._get_sequence_number_for_group()
        except (RuntimeError, AttributeError):  # a backend that does not count
            continue
    return found
