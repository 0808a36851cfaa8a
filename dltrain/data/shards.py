"""Plain webdataset shards, any sample one step away.

A shard is a tar on this machine, or somewhere else (see `remote`), or compressed: what is not a plain file here is
brought into the cache once. Its index (see `index`) says where each sample lies and what its bytes must be; nothing is
handed out that was not checked. webdataset itself drops the rest of a damaged shard without a word.

Shapes: N samples, M samples asked for, S shards.
"""

import contextlib
import hashlib
import itertools
import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dltrain.data.cache import cache_dir, whole
from dltrain.data.compressed import codec_named
from dltrain.data.index import Damage, Index, fits, homes, indexed, opened, stored
from dltrain.data.order import key_hashes
from dltrain.data.shard import OpenShard, scattered
from dltrain.data.urls import expand, plain
from dltrain.errors import UserError
from dltrain.files import write_atomic
from dltrain.progress import track

OPEN = 256  # shards that a process keeps open; the one that was opened first is let go beyond that
BLOCK = 4096  # samples in file order whose places are looked up at a time
ASK = 16  # remote shards that servers are asked for at a time
TOLD = 3  # of what could not be indexed
CATALOG = 64  # from so many shards on, what the indexes say together is kept in one file

OnError = Literal["raise", "skip", "substitute"]


def write_shards(samples: Iterable[dict[str, Any]], folder: Path, prefix: str, samples_per_shard: int) -> list[Path]:
    """Write `folder/prefix-000000.tar`, ...; each appears only whole, with its index; equal samples give equal bytes.

    A sample is {"__key__": str, extension: bytes, str, or what webdataset encodes (json, npy, cls ...)}. UserError for
    a key that webdataset could not read back or that is used twice.
    """
    paths: list[Path] = []
    rest = iter(samples)
    while shard := list(itertools.islice(rest, samples_per_shard)):
        paths.append(folder / f"{prefix}-{len(paths):06d}.tar")
        write_shard(paths[-1], shard)
    return paths


def write_shard(path: Path, samples: Iterable[dict[str, Any]]) -> None:
    """One shard and its index: as `write_shards`."""
    from webdataset.tariterators import base_plus_ext
    from webdataset.writer import TarWriter

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole(path) as temp:
            with open(temp, "wb") as file, TarWriter(file, user="", group="", mtime=0, format="PAX_FORMAT") as writer:
                for sample in samples:
                    key = sample["__key__"]
                    if base_plus_ext(f"{key}.x") != (key, "x"):
                        raise UserError(f"{path}: sample key {key!r} must not be empty or have a dot in its last part")
                    writer.write(sample)
            index = indexed(temp, named=str(path))
            if index.damage:
                raise UserError(f"{Damage(str(path), *index.damage[0])}; give every sample its own key")
            for home in homes(path):
                home.unlink(missing_ok=True)  # of a shard that was here before
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; free the disk or choose another folder") from error
    index.save(path)  # the rename has kept size and mtime


class Shards:
    """Samples of all shards that `pattern` names, by number, in their order. Picklable; opens files lazily.

    `on_error`: what to do about a damaged sample. "raise": UserError with shard, key and byte. "skip": it is handed out
    as {"__key__", "__url__", "__damage__": Damage} and nothing else. "substitute": with the members of the next intact
    sample. `pipe` allows urls `pipe:COMMAND`, which run a shell command.

    Raises:
        UserError: for a pattern that names nothing, a shard that is no tar or cannot be had; under "raise" for a shard
            that is damaged or no longer what was indexed.
    """

    def __init__(self, pattern: str | Sequence[str], *, on_error: OnError = "raise", pipe: bool = False):
        if on_error not in ("raise", "skip", "substitute"):
            raise UserError(f"on_error {on_error!r} is none of raise, skip and substitute")
        self.urls = expand(pattern)
        self.on_error, self.pipe = on_error, pipe
        self._open: dict[int, OpenShard] = {}  # in order of opening
        self._known: dict[int, tuple[int | None, str]] = {}  # what remote shards are, so that no server is asked twice
        self.damage: list[Damage] = []  # of samples that no index has: they were damaged when it was made
        counts, sums = self._catalog()
        for damage in self.damage[:TOLD]:
            print(f"left out: {damage}", file=sys.stderr)
        if len(self.damage) > TOLD:
            print(f"left out: {len(self.damage) - TOLD:,} more, which dltrain data verify lists", file=sys.stderr)
        self.counts_S = np.array(counts, np.int64)
        self._start = np.concatenate([[0], np.cumsum(self.counts_S)])
        self.fingerprint = hashlib.sha256("".join(sums).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._start[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        return self._slowly(i)

    def __iter__(self) -> Iterator[dict[str, Any]]:
        """All samples in file order."""
        bounds = zip(self._start, self._start[1:])
        runs = (range(a, min(a + BLOCK, stop)) for start, stop in bounds for a in range(start, stop, BLOCK))
        return self.stream(np.arange(run.start, run.stop) for run in runs)

    def stream(self, blocks: Iterable[np.ndarray]) -> Iterator[dict[str, Any]]:
        """The samples with these numbers, one block after the other; blocks of a few thousand are fastest."""
        return itertools.chain.from_iterable(map(self._samples, blocks))

    def read(self, index_M: np.ndarray | range) -> list[dict[str, Any]]:
        """The samples with these numbers, in this order: {"__key__": str, "__url__": str, extension: bytes}."""
        return list(self._samples(np.asarray(index_M, np.int64)))

    def _samples(self, index_M: np.ndarray) -> Iterator[dict[str, Any]]:
        """One by one, so that the memory of the last is warm for the next."""
        if not len(index_M):
            return iter(())
        if index_M.min() < 0 or index_M.max() >= len(self):
            raise IndexError(f"samples {index_M.min()} ... {index_M.max()} of {len(self)}")
        shard_M = np.searchsorted(self._start, index_M, side="right") - 1
        row_M = index_M - self._start[shard_M]
        used = np.unique(shard_M).tolist()
        if len(used) > OPEN:
            return map(self._slowly, index_M.tolist())
        opened = {s: self._shard(s) for s in used}
        if not all(shard.plain() and shard.names == opened[used[0]].names for shard in opened.values()):
            return map(self._slowly, index_M.tolist())
        if len(used) == 1 and len(row_M) > 1 and (np.diff(row_M) == 1).all():
            start = int(self._start[used[0]])
            return opened[used[0]].neighbours(int(row_M[0]), int(row_M[-1]) + 1, lambda row: self._slowly(start + row))
        return scattered(opened, shard_M, row_M, index_M, self._slowly)

    def _slowly(self, i: int) -> dict[str, Any]:
        """One sample of any make, or what `on_error` asks for if it is damaged."""
        s, j = self._at(i)
        sample = self._shard(s).one(j)
        if "__damage__" not in sample or self.on_error == "skip":
            return sample
        if self.on_error == "raise":
            raise UserError(f"{sample['__damage__']}; {self._advice(s)}")
        for step in range(1, len(self)):
            s, j = self._at((i + step) % len(self))
            if "__damage__" not in (other := self._shard(s).one(j)):
                return other | sample
        raise UserError(f"{self.urls[0]} and all other shards have no intact sample; restore them")

    def _at(self, i: int) -> tuple[int, int]:
        """Shard, and number in it."""
        s = int(np.searchsorted(self._start, i, side="right")) - 1
        return s, int(i - self._start[s])

    def parts(
        self, index_P: np.ndarray, extension: str, start_P: np.ndarray, stop_P: np.ndarray
    ) -> list[bytes | Damage]:
        """Of each of these samples bytes start ... stop - 1 (fewer where it ends before) of one member.

        For members too large to read whole: one is checked whole the first time that this process reads of it, and not
        again. Damage, and a sample without that member, is a UserError under "raise", else the Damage.
        """
        shard_P = np.searchsorted(self._start, index_P, side="right") - 1
        readers = {s: self._shard(s).member(extension) for s in set(shard_P.tolist())}
        spans = (index_P - self._start[shard_P]).tolist(), start_P.tolist(), stop_P.tolist()
        found: list[bytes | Damage] = []
        for s, j, start, stop in zip(shard_P.tolist(), *spans):
            blob = readers[s](j, start, stop)
            if not isinstance(blob, bytes):
                blob = Damage(self.urls[s], self._shard(s).index.key_of(j), *blob)
                if self.on_error == "raise":
                    raise UserError(f"{blob}; {self._advice(s)}")
            found.append(blob)
        return found

    def broken(self, i: int, reason: str) -> Damage:
        """For a sample whose bytes are right and useless (they cannot be decoded): UserError under "raise", or the
        Damage to record."""
        s, j = self._at(i)
        index = self._shard(s).index
        damage = Damage(self.urls[s], index.key_of(j), int(index.span_start[j]), reason)
        if self.on_error == "raise":
            raise UserError(f"{damage}; restore the sample, or leave such out with on_error skip")
        return damage

    def name(self, i: int) -> str:
        """Shard and key of a sample, for messages."""
        return f"{self.urls[self._at(i)[0]]}: sample {self.key(i)!r}"

    def key(self, i: int) -> str:
        s, j = self._at(i)
        return self._shard(s).index.key_of(j)

    def keys(self) -> Iterator[str]:
        return (index.key_of(j) for index in self.indexes() for j in range(len(index)))

    def key_hashes(self) -> np.ndarray:
        """uint64 [N], for `order.split`."""
        return key_hashes(self.keys())

    def lengths(self, extension: str) -> np.ndarray:
        """int64 [N]: bytes of the member with this extension, -1 where a sample has none. From the indexes alone."""
        found = []
        for index in self.indexes():
            of_sample = np.full(len(index), -1, np.int64)
            if extension in index.extensions:
                members = np.flatnonzero(index.extension == index.extensions.index(extension))
                of_sample[np.searchsorted(index.member_end, members, side="right")] = index.length[members]
            found.append(of_sample)
        return np.concatenate(found)

    # --- shards and their indexes --------------------------------------------------------------------------------

    def _catalog(self) -> tuple[list[int], list[str]]:
        """(samples, SHA-256) of every shard. Of many shards it is kept in one file, so that no index need be opened."""
        known = None
        if len(self.urls) >= CATALOG and all(map(plain, self.urls)):
            stats = [os.stat(url) for url in self.urls]
            identity = [[os.path.abspath(u), s.st_size, s.st_mtime_ns] for u, s in zip(self.urls, stats)]
            name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
            known = cache_dir() / "catalog" / f"{name}.json"
            try:
                counts, sums = json.loads(known.read_bytes())
                return counts, sums
            except (OSError, ValueError):
                pass  # not there, or torn
        if far := [s for s, url in enumerate(self.urls) if not plain(url)]:
            with ThreadPoolExecutor(ASK) as pool:  # a server may take a tenth of a second to answer
                for _ in track(pool.map(self._ask, far), "asking for shards", len(far)):
                    pass
        counts, sums, exact = [], [], True
        for s, index in enumerate(track(self.indexes(), "indexing shards", len(self.urls))):
            counts.append(len(index))
            sums.append(index.sha256)
            found = [Damage(self.urls[s], *damage) for damage in index.damage]
            if plain(self.urls[s]):
                changed = not fits(index, Path(self.urls[s]))
                exact = exact and not changed
                if changed and self.on_error == "raise":
                    found += OpenShard(Path(self.urls[s]), index, "").faults(self.urls[s])
            if found and self.on_error == "raise":
                more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
                raise UserError(f"{found[0]}{more}; {self._advice(s)}")
            self.damage += found
        if known and exact and not self.damage:
            try:
                known.parent.mkdir(parents=True, exist_ok=True)
                write_atomic(known, json.dumps([counts, sums]).encode())
            except OSError:
                pass  # it only saves time
        return counts, sums

    def indexes(self) -> Iterator[Index]:
        """Of the shards, in their order."""
        return (self._open[s].index if s in self._open else self._index(s) for s in range(len(self.urls)))

    def _index(self, s: int) -> Index:
        url = self.urls[s]
        if plain(url):
            return opened(Path(url))
        size, identity = self._remote(s)
        home = cache_dir() / "index" / f"{identity[:32]}.idx"
        index = known_index(url, size, home)
        if index is None:
            index = indexed(self._path(s), named=url)
            _keep(index, home)
        return index

    def _path(self, s: int) -> Path:
        """Where the shard lies on this machine; a remote one that the cache has lost is fetched again."""
        if plain(self.urls[s]):
            return Path(self.urls[s])
        from dltrain.data.remote import local

        return local(self.urls[s], pipe=self.pipe, known=self._remote(s))

    def _ask(self, s: int) -> None:
        size, identity = self._remote(s)
        known_index(self.urls[s], size, cache_dir() / "index" / f"{identity[:32]}.idx")

    def _remote(self, s: int) -> tuple[int | None, str]:
        if s not in self._known:
            from dltrain.data.remote import size_and_identity

            self._known[s] = size_and_identity(self.urls[s], pipe=self.pipe)
        return self._known[s]

    def _shard(self, s: int) -> OpenShard:
        if s not in self._open:
            if len(self._open) >= OPEN:
                self._open.pop(next(iter(self._open)))
            try:
                known = stored(Path(self.urls[s])) if plain(self.urls[s]) else None
                self._open[s] = OpenShard(self._path(s), known or self._index(s), self.urls[s])
            except OSError as error:
                raise UserError(f"{self.urls[s]}: {error.strerror}; restore the shard") from error
        return self._open[s]

    def _advice(self, s: int) -> str:
        name = os.path.basename(self.urls[s])
        return f"restore the shard, delete {name}.idx if it was replaced on purpose, or leave such out (on_error skip)"

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def known_index(url: str, size: int | None, home: Path) -> Index | None:
    """The index of a shard that is not a plain file here, from before (`home`) or published beside the shard."""
    from dltrain.data import remote

    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return Index.unpack(memoryview(home.read_bytes()))
    with contextlib.suppress(ValueError, KeyError, TypeError):  # of another version
        if (published := remote.beside(url, ".idx")) is not None:
            index = Index.unpack(memoryview(published))
            if codec_named(url) or size in (None, index.size):
                _keep(index, home)
                return index
    return None


def _keep(index: Index, home: Path) -> None:
    try:
        home.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(home, index.pack())
    except OSError as error:
        problem = f"cannot write {home}: {error.strerror}; set DLTRAIN_CACHE to a folder with room"
        raise UserError(problem) from error
