"""dltrain data index, dltrain data verify: shards against their indexes, many at a time."""

import mmap
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

from dltrain.data.index import Damage, Index, fits, homes, indexed, opened, stored
from dltrain.data.urls import expand, plain
from dltrain.errors import UserError
from dltrain.progress import track

WORK = 1 << 27  # bytes of shards for which starting a process pays

T = TypeVar("T")


@dataclass(frozen=True)
class Checked:
    """What became of one shard. `note` is for people; `index` says whether it was compared with one."""

    shard: str
    samples: int
    note: str
    index: bool = True
    damage: list[Damage] = field(default_factory=list)


def index(pattern: list[str], pipe: bool, force: bool) -> None:
    """Exits with 1 if a shard is damaged or is not what its index says."""
    urls = expand(pattern)
    if force and (remote := [url for url in urls if not plain(url)]):
        raise UserError(f"{remote[0]}: --force is for uncompressed shards of this machine; leave the others out")
    damaged = 0
    for shard in each_shard(partial(_indexed, pipe=pipe, force=force), urls, "indexing shards"):
        print(f"{shard.shard}: {shard.samples:,} samples, {shard.note}")
        _tell(shard.damage)
        damaged += not shard.index or bool(shard.damage)
    if damaged:
        print(f"{damaged:,} of {len(urls):,} shards are damaged or have changed")
        sys.exit(1)


def _indexed(url: str, pipe: bool, force: bool) -> Checked:
    if not plain(url):
        from dltrain.data.shards import Shards

        shards = Shards([url], on_error="skip", pipe=pipe)
        return Checked(url, len(shards), "indexed, in the cache", damage=shards.damage)
    path = Path(url)
    before = None if force else stored(path)
    if force:
        found = indexed(path)
        for home in homes(path):
            home.unlink(missing_ok=True)
        found.save(path)
    else:
        found = opened(path)
    if not fits(found, path):
        note = "not what its index says: see dltrain data verify, or take it as it is with --force"
        return Checked(url, len(found), note, index=False)
    note = "had its index" if before and before.sha256 == found.sha256 else "indexed"
    return Checked(url, len(found), note, damage=_known(found, url))


def verify(pattern: list[str], pipe: bool, json: str | None) -> None:
    """Exits with 1 if there is damage."""
    shards = []
    for shard in each_shard(partial(check, pipe=pipe), expand(pattern), "verifying shards"):
        shards.append(shard)
        _tell(shard.damage)
        if not shard.index:
            print(f"{shard.shard}: {shard.note}")
    samples, damage = sum(shard.samples for shard in shards), [found for shard in shards for found in shard.damage]
    unsure = sum(not shard.index for shard in shards)
    so_far = f", as far as can be told of {unsure:,} without an index" if unsure else ""
    if damage:
        word = "fault" if len(damage) == 1 else "faults"
        print(f"{len(damage):,} {word} in {sum(bool(s.damage) for s in shards):,} of {len(shards):,} shards{so_far}")
    else:
        print(f"{samples:,} samples in {len(shards):,} shards: whole{so_far}")
    if json:
        from dltrain import rundir

        found = {"whole": not damage, "samples": samples, "shards": len(shards), "damage": [vars(d) for d in damage]}
        rundir.write_json(Path(json), found | {"without_index": [s.shard for s in shards if not s.index]})
    if damage:
        sys.exit(1)


def check(url: str, pipe: bool = False) -> Checked:
    """One shard against its index, or, if it has none, against what a tar must be. Writes nothing beside it."""
    if plain(url):
        path, index = Path(url), stored(Path(url))
    else:
        from dltrain.data import remote

        path, index = remote.local(url, pipe=pipe), _published(remote.beside(url, ".idx"))
    try:
        if index is None or (plain(url) and index.damage and not fits(index, path)):  # or it was of a damaged shard
            found = indexed(path, named=url)
            return Checked(url, len(found), "no index: checked as a tar only", False, _known(found, url))
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
            with memoryview(content) as view:
                return Checked(url, len(index), "", damage=list(index.faults(view, url)))
    except UserError as error:  # no tar at all
        return Checked(url, 0, "", damage=[Damage(url, "", 0, str(error).removeprefix(f"{url}: "))])
    except OSError as error:
        raise UserError(f"{url}: {error.strerror}; restore the shard") from error


def _published(content: bytes | None) -> Index | None:
    try:
        return Index.unpack(memoryview(content)) if content else None
    except (ValueError, KeyError, TypeError):
        return None  # of another version


def _known(index: Index, url: str) -> list[Damage]:
    return [Damage(url, *found) for found in index.damage]


def _tell(damage: list[Damage]) -> None:
    for found in damage:
        print(found)


def each_shard(function: Callable[[str], T], urls: list[str], what: str) -> Iterator[T]:
    """`function` of each, in order, by as many processes as there are processors if it is worth while."""
    size = sum(os.stat(url).st_size for url in urls if plain(url))
    workers = min(len(os.sched_getaffinity(0)), len(urls), size // WORK)
    if workers <= 1:
        yield from track(map(function, urls), what, len(urls))
        return
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    leave_ctrl_c_to_us = signal.signal, (signal.SIGINT, signal.SIG_IGN)
    pool = ProcessPoolExecutor(workers, context, *leave_ctrl_c_to_us)
    try:
        yield from track(pool.map(function, urls), what, len(urls))
    except BrokenProcessPool as error:
        raise UserError("a worker was killed, for want of memory perhaps; give fewer shards at a time") from error
    finally:
        pool.shutdown(cancel_futures=True)
