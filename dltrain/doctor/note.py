"""A rank's last place, on its own host: the only word of one that was stopped, killed or does not get the GIL.

A file in /dev/shm, written in place once a second; beside it a file into which faulthandler's own thread, which needs
no GIL, writes all stacks once the doctor has not been able to put it off for DUMP_AFTER seconds.
"""

import contextlib
import faulthandler
import hashlib
import json
import os
import tempfile
import time
from pathlib import Path
from typing import Any

DUMP_AFTER = 5  # seconds


def folder(out: str) -> Path:
    """Where the ranks of this host of the run in `out` keep their notes."""
    local = "/dev/shm" if os.access("/dev/shm", os.W_OK) else tempfile.gettempdir()
    return Path(local) / f"dltrain-{os.getuid()}-{hashlib.sha256(os.path.abspath(out).encode()).hexdigest()[:16]}"


class Note:
    """This rank's. Raises OSError where it cannot be kept."""

    def __init__(self, out: str, rank: int):
        self.folder = folder(out)
        self.folder.mkdir(mode=0o700, exist_ok=True)
        self.paths = [self.folder / f"rank-{rank}", self.folder / f"rank-{rank}.stack"]
        self.file, self.dump = (path.open("w+b", buffering=0) for path in self.paths)

    def write(self, **fields: Any) -> None:
        """Replace the note, and put the dump off."""
        faulthandler.dump_traceback_later(DUMP_AFTER, file=self.dump)  # type: ignore[arg-type]  # a file with fileno()
        if os.fstat(self.dump.fileno()).st_size:  # the process was stopped for a while
            self.dump.truncate(0)
            self.dump.seek(0)
        text = json.dumps({"pid": os.getpid(), "beat": time.monotonic(), **fields})
        os.pwrite(self.file.fileno(), f"{text}\n".encode(), 0)

    def close(self) -> None:
        """Leave nothing behind."""
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            self.file.close()
            self.dump.close()
            for path in self.paths:
                path.unlink(missing_ok=True)
            self.folder.rmdir()  # by the last one


def read(out: str, rank: int) -> dict[str, Any]:
    """A rank's note, "age" its seconds and "dump" its stacks, if it lives or lived on this host; else {}."""
    path = folder(out) / f"rank-{rank}"
    try:
        found = json.loads(path.read_bytes().split(b"\n")[0])
        dump = path.with_suffix(".stack").read_text(errors="replace")
    except (OSError, ValueError):
        return {}
    return found | {"age": time.monotonic() - found["beat"], "dump": dump}
