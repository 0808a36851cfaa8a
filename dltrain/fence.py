"""One run directory, one run: who holds it, whether the holder lives, and how one that was superseded ends.

`lease.json` says who holds the directory: a token, one higher at each launch, and host, pid and time. On one host a
file lock, which dies with its process, keeps a second launch out. From another host nothing but the file's age tells
whether the holder lives: its heart beats every BEAT seconds, and after SILENT seconds without one it is given up.

A holder that was given up may be alive all the same, cut off from the others and not from the disk. So it looks for its
token at every beat and right before whatever it publishes; where it finds another's, it publishes nothing and ends.
A Slurm job that was requeued takes its own earlier incarnation's directory at once, whatever became of that one.
What remains: between that look and the rename that publishes it may be paused for as long as one likes, and then a
checkpoint of its own appears, whole, and of a step that its successor takes again, to the same bits.
"""

import contextlib
import fcntl
import json
import os
import socket
import sys
import threading
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dltrain import files, slurm
from dltrain.config import leave
from dltrain.errors import UserError

BEAT, SILENT = 5.0, 30.0  # seconds
SUPERSEDED = 69  # exit code of a run whose directory another launch has taken: EX_UNAVAILABLE of sysexits.h


class Fence:
    """This launch's hold on the run directory `out`, which exists; of one process, the first.

    Raises:
        UserError: where another launch holds it and lives, naming host and pid.
    """

    def __init__(self, out: Path, host: str = ""):
        self.path, self.host = out / "lease.json", host or socket.gethostname()
        self._lock = os.open(out / "lease.lock", os.O_RDWR | os.O_CREAT)
        self._ended, self._looking = threading.Event(), threading.Lock()
        try:
            before = self._wait_for_my_turn()
        except BaseException:
            os.close(self._lock)
            raise
        since = datetime.now(UTC).isoformat(timespec="seconds")
        self.token: int = before.get("token", 0) + 1
        mine = {"token": self.token, "host": self.host, "pid": os.getpid(), "since": since, "held": True}
        mine |= slurm.facts(os.environ)
        self._mine = json.dumps(mine).encode()
        files.write_atomic(self.path, self._mine)
        self._heart = threading.Thread(target=self._beat, name="fence", daemon=True)
        self._heart.start()

    def _wait_for_my_turn(self) -> dict[str, Any]:
        """The lease of the launch before, once that launch is known to be over."""
        began, heard = time.monotonic(), self._heard()
        while True:
            lease = read(self.path)
            locked = self._try_lock()
            if _requeued(lease, slurm.facts(os.environ)):
                return lease
            if locked and (not lease.get("held") or lease["host"] == self.host):
                return lease  # given back, or its process has died
            if not locked and lease.get("host") == self.host:
                raise self._refusal(lease)
            if self._heard() != heard:
                raise self._refusal(lease)  # another host's, and its heart beats
            if time.monotonic() - began > SILENT:
                return lease
            time.sleep(0.2)

    def _try_lock(self) -> bool:
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError:  # a file system without locks: the lease decides alone
            return _over(read(self.path), self.host)
        return True

    def _heard(self) -> int:
        return self.path.stat().st_mtime_ns if self.path.exists() else 0

    def _refusal(self, lease: dict[str, Any]) -> UserError:
        who = f"process {lease['pid']} on {lease['host']} since {lease['since']}" if lease else "another launch"
        return UserError(f"{self.path.parent} is held by {who}: let it end, or choose another run directory with --out")

    def check(self) -> None:
        """Right before something is published: end this process, with one line, if the directory is another's now."""
        with self._looking:  # the line is said once
            found = read(self.path)
            if (found.get("token"), found.get("host"), found.get("pid")) == (self.token, self.host, os.getpid()):
                return
            who = f"process {found.get('pid')} on {found.get('host')}" if found else "somebody who left no lease"
            said = f"{self.path.parent} was taken over by {who}: this launch publishes nothing more and ends"
            print(said, file=sys.stderr)
            leave(SUPERSEDED)

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                self.check()
                os.utime(self.path)
            except OSError:  # cut off: nothing can be published either
                continue

    def release(self) -> None:
        """Give the directory back."""
        self._ended.set()
        self._heart.join()
        with contextlib.suppress(OSError):  # a full disk: the lock is given back, and the lease grows old
            if read(self.path).get("token") == self.token:
                files.write_atomic(self.path, self._mine.replace(b'"held": true', b'"held": false'))
        os.close(self._lock)


def read(path: Path) -> dict[str, Any]:
    """The lease; {} where there is none, or one that cannot be read."""
    try:
        found = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _requeued(lease: dict[str, Any], mine: dict[str, Any]) -> bool:
    """Whether the holder is an earlier incarnation of this very job."""
    return bool(mine) and lease.get("job") == mine["job"] and lease.get("restarts", 0) < mine["restarts"]


def _over(lease: dict[str, Any], host: str) -> bool:
    """Whether the holder is known to have ended, from the lease alone."""
    if not lease.get("held"):
        return True
    return lease["host"] == host and not Path(f"/proc/{lease['pid']}").exists()
