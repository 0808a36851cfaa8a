"""The cache of shards: one folder for all processes of a machine, bounded in bytes, the least recently used go first.

    <identity>.tar        a whole shard; its access time, which we set, is when a process last asked for it
    <identity>.part       a download under way or broken off, of full length from the start: what it lacks are holes
    <identity>.plain      a decompression under way
    <identity>.journal    locked (flock) by the process that makes the entry; CRC-32 of each block in .part

`$DLTRAIN_CACHE_GB` (10^9 bytes, 50 by default) bounds the sum of lengths of the first three, and so does the disk.
A shard may be evicted while others read it: on Linux an unlinked file lives on for who has it open or mapped. Only to
open it again, ask for it again.
"""

import fcntl
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from dltrain.data.cache import cache_dir
from dltrain.errors import UserError

GROWTH = 64 << 20  # bytes reserved at a time for a file of unknown length


def folder() -> Path:
    """Where the shards are; made on first use."""
    path = cache_dir() / "shards"
    path.mkdir(parents=True, exist_ok=True)
    return path


def used(path: Path) -> bool:
    """Whether the entry is there; from now on it is the most recently used."""
    try:
        os.utime(path, ns=(time.time_ns(), path.stat().st_mtime_ns))  # mtime is what an index knows the shard by
    except FileNotFoundError:
        return False
    return True


@contextmanager
def making(path: Path) -> Iterator[BinaryIO]:
    """The journal of an entry, ours alone: who else wants to make it waits here, and should then look again."""
    with open(path.with_suffix(".journal"), "a+b", buffering=0) as journal:
        fcntl.flock(journal, fcntl.LOCK_EX)
        yield journal  # type: ignore[misc]


def pour(blocks: Iterable[bytes], path: Path) -> None:
    """Write a file of unknown length in the cache, reserving room as it grows."""
    with open(path, "wb") as file:
        room = 0
        for block in blocks:
            if file.tell() + len(block) > room:
                room = file.tell() + len(block) + GROWTH
                reserve(path, room)
            file.write(block)
        file.truncate()


def reserve(path: Path, size: int) -> None:
    """Make `path` `size` bytes long (a hole), evicting what was not used for longest to stay within the bound.

    UserError if bound or disk are too small for it, in which case nothing has been evicted.
    """
    with open(path.with_name("lru.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        entries = []
        on_disk = 0
        for entry in path.parent.iterdir():
            if entry.suffix in (".tar", ".part", ".plain"):
                try:
                    stat = entry.stat()
                except FileNotFoundError:  # renamed just now
                    continue
                on_disk += 512 * stat.st_blocks
                if entry != path:
                    entries.append((max(stat.st_atime_ns, stat.st_mtime_ns), stat.st_size, entry))
        bound = min(_limit(), on_disk + shutil.disk_usage(path.parent).free)
        excess = size + sum(length for _, length, _ in entries) - bound
        evicted = []
        for _, length, entry in sorted(entries):
            if excess > 0 and not _in_making(entry):
                evicted.append(entry)
                excess -= length
        if excess > 0:
            raise UserError(
                f"the cache {path.parent} has no room for a shard of {size / 1e9:.3f} GB within {bound / 1e9:.3f} GB; "
                "free the disk, raise DLTRAIN_CACHE_GB or set DLTRAIN_CACHE to another folder"
            )
        for entry in evicted:
            entry.unlink(missing_ok=True)
        with open(path, "ab") as file:
            file.truncate(size)


def _limit() -> float:
    told = os.environ.get("DLTRAIN_CACHE_GB") or "50"
    try:
        if float(told) > 0:
            return float(told) * 1e9
    except ValueError:
        pass
    raise UserError(f"DLTRAIN_CACHE_GB is {told!r}; give a positive number, of 10^9 bytes")


def _in_making(entry: Path) -> bool:
    if entry.suffix == ".tar":
        return False
    try:
        with open(entry.with_suffix(".journal"), "ab") as journal:
            fcntl.flock(journal, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    return False
