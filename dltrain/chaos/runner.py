"""Start worlds of processes, harm them, wait for their end. This process imports everything once and forks the rest.

A launch is a launcher and its ranks, in a session of their own, as under torchrun: the launcher hands signals on, and
once a rank has failed it ends the others. Orphans come back to this process, which waits for them too.
"""

import ctypes
import importlib
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dltrain.chaos import victim
from dltrain.chaos.plan import Fault, Launch
from dltrain.errors import UserError

IMPORTED = ("torch._dynamo", "torch.utils.tensorboard", "dltrain.loop")  # beside what this file needs
PATIENCE = 120.0  # seconds that a launch may take
GRACE = 5.0  # seconds between a rank's failure and the end of the others
_PR_SET_CHILD_SUBREAPER = 36  # prctl(2)


@dataclass(frozen=True)
class Prey:
    """A recipe and its arguments."""

    recipe: Path
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Ended:
    """How a launch ended: the ranks' exit codes (minus a signal's number; none where the launcher died before), the
    notes of its ranks, seconds and whether the fault happened."""

    codes: list[int]
    notes: list[list[Any]]
    seconds: float
    struck: bool
    log: Path


def preload(zero: bool) -> None:
    """Import what the ranks need. No threads may come of it."""
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ["DS_ACCELERATOR"] = "cpu"
    for name in (*IMPORTED, *(["deepspeed"] if zero else [])):
        importlib.import_module(name)
    ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)


def run(prey: Prey, out: Path, launch: Launch, folder: Path, calm_seconds: float) -> Ended:
    """One launch of the run in `out`, harmed or not; notes and words go to `folder`, which is made.

    Raises:
        UserError: if it does not end.
    """
    folder.mkdir(parents=True)
    began = time.monotonic()
    pid = os.fork()
    if pid == 0:
        _child(lambda: _launcher(prey, out, launch, folder, calm_seconds), folder / "log")
    if not _wait_for_all(PATIENCE):
        os.killpg(pid, signal.SIGKILL)
        _wait_for_all(PATIENCE)
        raise UserError(f"{launch} did not end in {PATIENCE:.0f} s: see {folder}/log")
    codes = json.loads((folder / "codes").read_text()) if (folder / "codes").exists() else []
    notes = [json.loads(line) for path in sorted(folder.glob("notes-*")) for line in path.read_text().splitlines()]
    struck = any(note[0] == "fault" for note in notes)
    return Ended(codes, notes, time.monotonic() - began, struck, folder / "log")


def call(work: Callable[[], Any]) -> Any:
    """work() in a process of its own, which may start threads. Its result must be JSON.

    Raises:
        UserError: with the last line of its traceback.
    """
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(ours)
        answer: dict[str, Any] = {}
        try:
            answer["result"] = work()
        except BaseException as error:
            traceback.print_exc()
            answer["error"] = f"{type(error).__name__}: {error}"
        with os.fdopen(theirs, "w") as file:
            json.dump(answer, file)
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as file:
        answer = json.loads(file.read() or '{"error": "it died"}')
    os.waitpid(pid, 0)
    if "error" in answer:
        raise UserError(answer["error"])
    return answer["result"]


def _wait_for_all(seconds: float) -> bool:
    """Whether every child and orphan ended in that time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return True
        if pid == 0:
            time.sleep(0.005)
    return False


def _child(work: Callable[[], None], log: Path) -> None:
    """Of a fork: do it, with its words in `log`, and end."""
    code = 1
    try:
        handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        work()
        code = 0
    except SystemExit as exit:
        code = exit.code if isinstance(exit.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _launcher(prey: Prey, out: Path, launch: Launch, folder: Path, calm_seconds: float) -> None:
    os.setsid()
    arguments = [*prey.arguments, "--out", str(out), "--strategy", launch.strategy, "--workers", str(launch.workers)]
    arguments += ["--save-async"] if launch.save_async else []
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    ranks: list[int] = []

    def hand_on(number: int, frame: Any) -> None:
        for pid in ranks:
            os.kill(pid, number)

    for rank in range(launch.world):
        pid = os.fork()
        if pid == 0:
            os.environ |= {
                "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(launch.world), "MASTER_PORT": str(port),
                "LOCAL_WORLD_SIZE": str(launch.world), "MASTER_ADDR": "127.0.0.1", "DLTRAIN_DEVICE": "cpu",
            }  # fmt: skip
            notes = folder / f"notes-{rank}"
            _child(lambda n=notes: victim.play(prey.recipe, arguments, n, launch.fault), folder / "log")
        ranks.append(pid)
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, hand_on)
    codes = _shepherd(ranks, launch.fault, folder, calm_seconds)
    (folder / "codes").write_text(json.dumps(codes))


def _shepherd(ranks: list[int], fault: Fault | None, folder: Path, calm_seconds: float) -> list[int]:
    """Wait for the ranks; harm them when it is time; end those that are left once one has failed."""
    codes: dict[int, int] = {}
    began, failed = time.monotonic(), 0.0
    moment = fault.share * calm_seconds if fault and fault.place == "any" else 0.0
    while len(codes) < len(ranks):
        for pid in set(ranks) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
        now = time.monotonic()
        if fault and moment and now - began >= moment and _begun(folder, len(ranks)) and not codes:
            moment = 0.0
            _strike(fault, ranks, folder)
        failed = failed or (now if any(codes.values()) else 0.0)
        if failed and now - failed > GRACE:
            for pid in set(ranks) - codes.keys():
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.002)
    return [codes[pid] for pid in ranks]


def _begun(folder: Path, world: int) -> bool:
    """Python itself takes a moment to start, in which no program can note a signal: not before every rank can."""
    notes = [path.read_text() for path in folder.glob("notes-*")]
    return len(notes) == world and all("begun" in text for text in notes)


def _strike(fault: Fault, ranks: list[int], folder: Path) -> None:
    number = signal.Signals[fault.how]
    with open(folder / "notes-launcher", "a") as file:
        file.write('["fault"]\n')
    if fault.who == "launcher":
        os.kill(os.getpid(), number)
    elif fault.who == "all":
        os.killpg(0, number)
    else:
        os.kill(ranks[fault.rank % len(ranks)], number)
