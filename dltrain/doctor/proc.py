"""What /proc tells of a process (man 5 proc). Where there is no /proc: nothing, which is no sign of life or death."""

import os
import platform
from dataclasses import dataclass

_TICKS = os.sysconf("SC_CLK_TCK")

# System calls that work on an open file, by number: include/uapi/asm-generic/unistd.h, arch/x86/entry/syscalls.
_ON_FILES = {
    "x86_64": {0: "read", 1: "write", 17: "pread", 18: "pwrite", 73: "flock", 74: "fsync", 75: "fdatasync"},
    "aarch64": {63: "read", 64: "write", 67: "pread", 68: "pwrite", 32: "flock", 82: "fsync", 83: "fdatasync"},
}.get(platform.machine(), {})


@dataclass(frozen=True)
class Process:
    pid: int
    parent: int
    state: str  # R runs, S sleeps, D waits for a disk, T stopped, Z dead and not yet buried
    cpu: float  # seconds of its own and of children that it has waited for


def _read(path: str) -> str:
    try:
        with open(path) as file:
            return file.read()
    except (OSError, UnicodeDecodeError):
        return ""


def process(pid: int) -> Process | None:
    """None if there is no such process."""
    fields = _read(f"/proc/{pid}/stat").rpartition(")")[2].split()
    if not fields:
        return None
    return Process(pid, int(fields[1]), fields[0], sum(map(int, fields[11:15])) / _TICKS)


def family(pid: int) -> list[Process]:
    """The children of a process, theirs, and so on: loader workers, compilers, the servers that start them."""
    found, parents = [], [pid]
    while parents:
        children = [p for parent in parents for p in _children(parent)]
        found, parents = found + children, [p.pid for p in children]
    return found


def _children(pid: int) -> list[Process]:
    tasks = f"/proc/{pid}/task"
    try:
        if os.path.exists(f"{tasks}/{pid}/children"):
            names = [name for task in os.listdir(tasks) for name in _read(f"{tasks}/{task}/children").split()]
        else:  # a kernel without CONFIG_PROC_CHILDREN: look at every process there is
            names = [name for name in os.listdir("/proc") if name.isdigit()]
    except OSError:
        return []
    return [found for name in names if (found := process(int(name))) and found.parent == pid]


def moved(pid: int, task: int = 0) -> int:
    """Bytes read and written by system calls, to the page cache and pipes too; of one thread, if `task` is given."""
    lines = _read(f"/proc/{pid}/task/{task}/io" if task else f"/proc/{pid}/io").splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(("rchar", "wchar")))


def blocked_on(pid: int, task: int = 0) -> str:
    """What a thread (0: the main one) waits for, where that is a file: "read of /data/0.tar"; else empty."""
    fields = _read(f"/proc/{pid}/task/{task or pid}/syscall").split()
    if len(fields) < 2 or not fields[0].isdigit() or int(fields[0]) not in _ON_FILES:
        return ""
    try:
        target = os.readlink(f"/proc/{pid}/fd/{int(fields[1], 16)}")
    except OSError:
        return ""
    return f"{_ON_FILES[int(fields[0])]} of {target}"
