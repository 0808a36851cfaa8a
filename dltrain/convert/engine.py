"""Make webdataset shards out of a source: in parallel, restartable, the same bytes whatever the number of workers.

A source is a sequence of entries and a pure function from an entry to a sample. Shards are made and kept in a work
folder inside the destination, and appear there together, once all of them are whole. Beside them:

    dltrain-shards.json  what made them (options, and name, sizes and digest of the source) and what came of it
    classes.txt          the names of the classes in the order of their numbers, where there are any
"""

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import numpy as np

from dltrain import __version__
from dltrain.convert.archive import Bad, Files, Span, fingerprint, on_disk
from dltrain.data.order import Order
from dltrain.data.shards import write_shard
from dltrain.errors import UserError
from dltrain.files import sync, write_atomic
from dltrain.progress import track

VERSION = 1  # of what the same options and source make
DESCRIPTION = "dltrain-shards.json"
WORK = ".unfinished"


@dataclass(frozen=True, slots=True)
class Entry:
    """One sample to be made. `name` is for messages; `cls` is the number of its class, -1 for none."""

    key: str
    name: str
    span: Span
    cls: int = -1


@dataclass(frozen=True)
class Source:
    """`make` gives {extension: bytes}, and "__key__" if not the entry's own; it is picklable and raises Bad."""

    prefix: str  # of the shards' names
    entries: Sequence[Entry]
    make: Callable[[Entry], dict[str, Any]]
    classes: Sequence[str] = ()
    ignored: Sequence[str] = ()  # names of files that are no samples
    encoder: str = ""  # the library, with its version, that decides the bytes
    size_N: np.ndarray | None = None  # bytes of each entry, where that is known without asking each
    first: dict[str, Any] = field(default_factory=dict)  # further members of the first sample of every shard


@dataclass(frozen=True, kw_only=True)
class Plan:
    """How samples become shards."""

    samples_per_shard: int
    shard_mb: float  # of source; a shard ends before it would have more
    shuffle: int | None = None  # seed of a fixed pseudo-random order
    workers: int = 1
    skip_bad: bool = False
    overwrite: bool = False


def convert(
    source: Path,
    folder: Path,
    kind: str,
    options: dict[str, Any],
    plan: Plan,
    read: Callable[[Path, Files, Path], Source],
) -> dict[str, Any]:
    """Fill `folder` with shards of what `read(source, its files, work folder)` finds, and return its description.

    `options` are what else decides the bytes. A conversion that was killed goes on where it was; one that is done is
    not done again.

    Raises:
        UserError: for a source that is missing, empty or of no use; a folder that is a file, lies inside the source,
            or holds what other options or another source made (unless `overwrite`); a full disk.
    """
    files = on_disk(source)
    if not files:
        raise UserError(f"{source} is an empty folder; give one with something in it")
    if source.is_dir() and folder.resolve().is_relative_to(source.resolve()):
        raise UserError(f"{folder} lies inside {source}, which would become its own source; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file; give a folder for the shards")
    cut = {"shuffle": plan.shuffle, "samples_per_shard": plan.samples_per_shard, "shard_mb": plan.shard_mb}
    stamp: dict[str, Any] = {"version": VERSION, "format": kind, "options": options | cut}
    stamp["source"] = fingerprint(source, files)
    work = folder / WORK
    try:
        before = _description(folder / DESCRIPTION)
        if before and not (plan.overwrite and _difference(before, stamp)):
            _refuse_another(folder, before, stamp)
            if (begun := _description(work / DESCRIPTION)) and not _difference(begun, stamp):
                shutil.rmtree(work, ignore_errors=True)  # it was killed at its very end
            return before
        if not before and next(folder.glob("*.tar"), None) and not (work / DESCRIPTION).exists():
            raise UserError(f"{folder} holds .tar files that were not made by this command; choose another folder")
        with _work_folder(work, stamp, plan.overwrite):
            made = read(source, files, work)
            if not len(made.entries):
                raise UserError(f"{source}: nothing in it is a sample of the format {kind}{_listed(made.ignored)}")
            stamp |= {"encoder": made.encoder} if made.encoder else {}
            _begin(work, stamp)
            records = _write_all(work, made, plan)
            names = [_name(made.prefix, i) for i in range(len(records))]
            description = stamp | {
                "dltrain": __version__,
                "samples": sum(record["samples"] for record in records),
                "shards": len(records),
                "prefix": made.prefix,
                "classes": list(made.classes),
                "skipped": [line for record in records for line in record["skipped"]],
                "ignored": len(made.ignored),
            }
            _publish(folder, work, names, before, description)
        return description
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free the disk or choose another folder, then give "
            "the same command again"
        ) from error


def _description(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path} is damaged ({error}); remove its folder and convert again") from error


def _difference(before: dict[str, Any], stamp: dict[str, Any]) -> str:
    """The first field of `stamp` that was another, in words."""
    for name, now in stamp.items():
        was = before.get(name)
        if was != now and name == "options":
            return _difference(was or {}, now)
        if was != now and name == "source":
            return f"source (or {now['name']} has changed)"
        if was != now:
            return f"{name} ({was}, now {now})"
    return ""


def _refuse_another(folder: Path, before: dict[str, Any], stamp: dict[str, Any], how: str = "was made") -> None:
    if difference := _difference(before, stamp):
        raise UserError(f"{folder} {how} with another {difference}; choose another folder, or pass --overwrite")


@contextmanager
def _work_folder(work: Path, stamp: dict[str, Any], overwrite: bool) -> Iterator[None]:
    """Have the work folder to oneself: what another conversion left in it is refused, or cleared to overwrite."""
    new = not work.parent.exists()
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another conversion is writing to {work.parent}; wait for it") from None
        begun = _description(work / DESCRIPTION)
        if begun and _difference(begun, stamp):
            if not overwrite:
                _refuse_another(work.parent, begun, stamp, "was begun")
            begun = None
        for path in work.iterdir():  # what a killed process was writing, or all that is left
            if path.name.startswith(".") or (not begun and path.name != "lock"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        try:
            yield
        finally:
            if not (work / DESCRIPTION).exists():  # nothing begun, or all done
                shutil.rmtree(work, ignore_errors=True)
                if new and work.parent.exists() and not any(work.parent.iterdir()):
                    work.parent.rmdir()


def _begin(work: Path, stamp: dict[str, Any]) -> None:
    """Remember what is being made; a conversion that goes on has the same encoder too."""
    if begun := _description(work / DESCRIPTION):
        _refuse_another(work.parent, begun, stamp, "was begun")
    else:
        write_atomic(work / DESCRIPTION, _json(stamp))


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _listed(names: Sequence[str]) -> str:
    return f" (files of other kinds: {len(names)}, such as {names[0]})" if names else "; see the command's --help"


def _name(prefix: str, i: int) -> str:
    return f"{prefix}-{i:06d}.tar"


def cuts(size_N: np.ndarray, samples_per_shard: int, shard_bytes: float) -> np.ndarray:
    """Where shards end: each takes entries until it would have more of either; an entry too large is alone."""
    end_N = np.cumsum(size_N, dtype=np.int64)
    ends, start = [], 0
    while start < len(size_N):
        before = end_N[start - 1] if start else 0
        stop = int(np.searchsorted(end_N, before + shard_bytes, side="right"))
        start = min(max(stop, start + 1), start + samples_per_shard, len(size_N))
        ends.append(start)
    return np.array(ends, np.int64)


@dataclass(frozen=True)
class _Task:
    path: Path
    entries: list[Entry]
    make: Callable[[Entry], dict[str, Any]]
    first: dict[str, Any]
    skip_bad: bool
    skipped: list[str] = field(default_factory=list)

    def samples(self) -> Iterator[dict[str, Any]]:
        more = self.first
        for entry in self.entries:
            try:
                yield {"__key__": entry.key} | self.make(entry) | more
                more = {}
            except Bad as error:
                if not self.skip_bad:
                    raise UserError(f"{error}; mend it, or pass --skip-bad to go on without it") from error
                self.skipped.append(str(error))


def _write(task: _Task) -> dict[str, Any]:
    """Make one shard; its record is written last, and says that it is whole."""
    write_shard(task.path, task.samples())
    record = {"samples": len(task.entries) - len(task.skipped), "skipped": task.skipped}
    write_atomic(_record(task.path), _json(record))
    return record


def _record(path: Path) -> Path:
    return path.with_suffix(".json")


def _write_all(work: Path, source: Source, plan: Plan) -> list[dict[str, Any]]:
    """The records of all shards, made now or before."""
    n = len(source.entries)
    index_N = np.arange(n) if plan.shuffle is None else Order(n, plan.shuffle).at(np.arange(n))[1]
    size_N = source.size_N
    if size_N is None:
        size_N = np.fromiter((entry.span.size for entry in source.entries), np.int64, n)
    end_S = cuts(size_N[index_N], plan.samples_per_shard, plan.shard_mb * 1e6)

    def tasks() -> Iterator[_Task | dict[str, Any]]:
        for i, end in enumerate(end_S):
            path = work / _name(source.prefix, i)
            if record := _description(_record(path)):
                yield record
                continue
            start = end_S[i - 1] if i else 0
            entries = [source.entries[int(j)] for j in index_N[start:end]]
            yield _Task(path, entries, source.make, source.first, plan.skip_bad)

    return list(track(_in_order(tasks(), min(plan.workers, len(end_S))), "writing shards", len(end_S)))


def _in_order(tasks: Iterable[_Task | dict[str, Any]], workers: int) -> Iterator[dict[str, Any]]:
    """A record of each task, in their order, with a few tasks at a time on their way."""
    if workers <= 1:
        yield from (_write(task) if isinstance(task, _Task) else task for task in tasks)
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_begin_worker)
    waiting: deque[Any] = deque()
    try:
        for task in tasks:
            waiting.append(pool.submit(_write, task) if isinstance(task, _Task) else task)
            if len(waiting) > 2 * workers:
                yield _result(waiting.popleft())
        while waiting:
            yield _result(waiting.popleft())
    except BrokenProcessPool as error:
        raise UserError(
            "a worker was killed, for want of memory perhaps; the same command goes on, with fewer --workers"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def _result(done: Any) -> dict[str, Any]:
    return done if isinstance(done, dict) else done.result()


def _begin_worker() -> None:
    """Leave Ctrl-C to the parent, and do not outlive it: it may be killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent

    def watch() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _publish(
    folder: Path, work: Path, names: list[str], before: dict[str, Any] | None, description: dict[str, Any]
) -> None:
    """Put the shards in place of those of `before`, their indexes first, and the description last."""
    for name in names:
        for path in sorted(work.glob(f"{name}*"), reverse=True):  # none, if it was killed here
            os.replace(path, folder / path.name)
    if before:
        (folder / "classes.txt").unlink(missing_ok=True)
        for name in {_name(before["prefix"], i) for i in range(before["shards"])} - set(names):
            for suffix in ("", ".idx"):
                (folder / f"{name}{suffix}").unlink(missing_ok=True)
    if description["classes"]:
        text = "\n".join(description["classes"]) + "\n"
        write_atomic(folder / "classes.txt", text.encode("utf-8", "surrogateescape"))
    write_atomic(folder / DESCRIPTION, _json(description))
    sync(folder)
    (work / DESCRIPTION).unlink()


def keys(names: Iterable[str]) -> Iterator[str]:
    """For each file name a key that webdataset reads back and no other has: no ending, no dot in the last part."""
    seen: set[str] = set()
    for name in names:
        folder, _, last = name.rpartition("/")
        last = (os.path.splitext(last)[0] or last).replace(".", "_")
        key = f"{folder}/{last}" if folder else last
        if key.startswith("__"):  # webdataset keeps names such as __this__ to itself
            key = f"x{key}"
        while key in seen:
            key += "_"
        seen.add(key)
        yield key


def digest(path: Path) -> str:
    """What stands for the content of a small file among the options."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
