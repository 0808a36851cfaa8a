"""An open shard: its bytes, mapped, and where its index says that samples are.

Shapes: M samples asked for.
"""

import mmap
import os
from collections.abc import Callable, Iterator
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from dltrain.data.index import Damage, Index

RECORD = 8  # numbers of a record before those of its members
CHUNK = 384 << 10  # bytes of neighbours that are checked at once: they are still in the processor's cache when copied

# The loops over samples are compiled for the names of the members, as namedtuple does, since a loop over the members
# would double the time that a sample takes.
SCATTERED = """
def read(records, opened, wrong):
    for i, shard, start, end, before, running, key, key_end{bounds} in records:
        content, keys, url = opened[shard]
        content = content[start:end]
        if crc32c(content, before) == running:
            yield {{"__key__": keys[key:key_end], "__url__": url{members}}}
        else:
            yield wrong(i)
"""
NEIGHBOURS = """
def read(chunks, content, keys, url):
    for records, sample in chunks:
        if sample:
            yield sample
        for key, key_end{bounds} in records:
            yield {{"__key__": keys[key:key_end], "__url__": url{members}}}
"""


@cache
def loop(template: str, names: tuple[str, ...]) -> Callable[..., Iterator[dict[str, Any]]]:
    """One of the loops above, for samples with these members."""
    bounds = "".join(f", a{k}, b{k}" for k in range(len(names)))
    members = "".join(f", {name!r}: content[a{k}:b{k}]" for k, name in enumerate(names))
    space: dict[str, Any] = {"crc32c": crc32c}
    exec(template.format(bounds=bounds, members=members), space)
    return space["read"]


def scattered(
    shards: dict[int, "OpenShard"], shard_M: np.ndarray, row_M: np.ndarray, index_M: np.ndarray, wrong: Callable
) -> Iterator[dict[str, Any]]:
    """Samples of several shards of one make; `index_M` is what `wrong` is told."""
    names, width = next((shard.names, shard.width) for shard in shards.values())
    records = np.empty((len(index_M), width), np.int64)
    for s, shard in shards.items():
        where = np.flatnonzero(shard_M == s) if len(shards) > 1 else slice(None)
        records[where] = shard.records[row_M[where]]
    records[:, 0], records[:, 1] = index_M, shard_M
    places = {s: (shard.content, shard.text, shard.url) for s, shard in shards.items()}
    return loop(SCATTERED, names)(records.tolist(), places, wrong)


class OpenShard:
    def __init__(self, path: Path, index: Index, url: str):
        self.index, self.url = index, url
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        size = os.fstat(self._file).st_size
        self.content: Any = mmap.mmap(self._file, 0, access=mmap.ACCESS_READ) if size else b""
        self._view = memoryview(self.content)
        self._columns: dict[str, tuple[np.ndarray, np.ndarray, np.ndarray, bytearray]] = {}  # see `_column`
        n, members = len(index), len(index.offset)
        each = members // n if n else 0
        self.width = RECORD + 2 * each  # of a record
        extension = index.extension.reshape(n, each) if n and each * n == members else index.extension[:0]
        self._alike = bool(
            len(extension)
            and (extension == extension[0]).all()
            and (index.member_end == np.arange(each, members + 1, each)).all()
        )
        self.names = tuple(index.extensions[e] for e in extension[0]) if self._alike else ()

    def __del__(self):
        """Nobody closes a shard: samples may still be taken from it. Its map goes with the last who holds it."""
        if "_file" in self.__dict__:
            os.close(self._file)

    def now(self) -> memoryview:
        """What can be read without a fault (SIGBUS) should the file have shrunk since it was mapped."""
        return self._view[: os.fstat(self._file).st_size]

    def plain(self) -> bool:
        """Whether all samples have the same members in the same order, and the file has kept its size: the fast way."""
        return self._alike and len(self._view) == os.fstat(self._file).st_size == self.index.size

    def faults(self, shard: str) -> Iterator[Damage]:
        return self.index.faults(self.now(), shard)

    def neighbours(self, first: int, last: int, wrong: Callable[[int], dict[str, Any]]) -> Iterator[dict[str, Any]]:
        """The samples first ... last - 1; `wrong` is told which of the shard."""
        chunks = self._chunks(first, last, wrong)
        return loop(NEIGHBOURS, self.names)(chunks, self.content, self.text, self.url)

    def _chunks(
        self, first: int, last: int, wrong: Callable[[int], dict[str, Any]]
    ) -> Iterator[tuple[list[list[int]], dict[str, Any] | None]]:
        """Records of samples that have just been checked, or what stands for one that is not intact."""
        index, records = self.index, self.records[first:last]
        lean = np.empty((len(records), self.width - RECORD + 2), np.int64)  # bounds of the key and of members
        lean[:, :2], lean[:, 2:] = records[:, 6:8], records[:, RECORD:] + records[:, 2:3]
        start = first
        while start < last:
            many = int(np.searchsorted(index.span_end, index.span_start[start] + CHUNK))
            stop = min(max(many, start + 1), last)
            if index.intact(self.now(), start, stop):
                yield lean[start - first : stop - first].tolist(), None
            else:
                for j in range(start, stop):
                    good = index.intact(self.now(), j, j + 1)
                    yield (lean[j - first : j - first + 1].tolist(), None) if good else ([], wrong(j))
            start = stop

    @cached_property
    def records(self) -> np.ndarray:
        """int64 [samples, width]: two numbers left free, bounds of the span, checksum before and after it, bounds of
        the key in `text`, and for each member its bounds in the span."""
        index = self.index
        columns = np.empty((len(index), self.width), np.int64)
        columns[:, 2], columns[:, 3] = index.span_start, index.span_end
        columns[0, 4], columns[1:, 4], columns[:, 5] = 0, index.running[:-1], index.running
        columns[:, 7] = self._key_ends()
        columns[0, 6], columns[1:, 6] = 0, columns[:-1, 7]
        columns[:, RECORD::2] = index.offset.reshape(len(index), -1) - index.span_start[:, None]
        columns[:, RECORD + 1 :: 2] = columns[:, RECORD::2] + index.length.reshape(len(index), -1)
        return columns

    @cached_property
    def text(self) -> str:
        """All keys."""
        return self.index.key.decode("utf-8", "surrogateescape")

    def _key_ends(self) -> np.ndarray:
        """In letters of `text`, where the index counts bytes."""
        index = self.index
        if len(self.text) == len(index.key):
            return index.key_end
        return np.cumsum([len(index.key_of(j)) for j in range(len(index))])

    def one(self, j: int) -> dict[str, Any]:
        """A sample of any make, checked; {"__key__", "__url__", "__damage__"} if it is damaged."""
        index, view, key = self.index, self.now(), self.index.key_of(j)
        sample: dict[str, Any] = {"__key__": key, "__url__": self.url}
        if not index.intact(view, j, j + 1):
            return sample | {"__damage__": Damage(self.url, key, *index.fault(view, j))}
        for m in index.members_of(j):
            offset = int(index.offset[m])
            sample[index.extensions[index.extension[m]]] = bytes(view[offset : offset + int(index.length[m])])
        return sample

    def member(self, extension: str) -> Callable[[int, int, int], bytes | tuple[int, str]]:
        """(sample, start, stop) -> that part of its member, or (byte, what is wrong). To be used at once: it takes the
        file to be as large as it is now."""
        index, content, view = self.index, self.content, self.now()
        size = len(view)
        offset_N, end_N, crc_N, checked_N = self._columns.get(extension) or self._column(extension)

        def part(j: int, start: int, stop: int) -> bytes | tuple[int, str]:
            offset, end = offset_N.item(j), end_N.item(j)
            if end > size:
                return index.fault(view, j)
            if not checked_N[j]:
                if offset < 0:
                    return int(index.span_start[j]), f"has no .{extension}"
                if crc32c(view[offset:end]) != crc_N[j]:
                    return index.fault(view, j)
                checked_N[j] = 1
            return content[offset + start : min(offset + stop, end)]

        return part

    def _column(self, extension: str) -> tuple[np.ndarray, np.ndarray, np.ndarray, bytearray]:
        """Per sample: where its member with this extension begins (-1: nowhere) and ends, its CRC, whether it has been
        checked."""
        index = self.index
        number = index.extensions.index(extension) if extension in index.extensions else -1
        members = np.flatnonzero(index.extension == number)
        sample = np.searchsorted(index.member_end, members, side="right")
        offset_N, end_N, crc_N = np.full(len(index), -1), np.full(len(index), -1), np.zeros(len(index), np.uint32)
        offset_N[sample], crc_N[sample] = index.offset[members], index.crc[members]
        end_N[sample] = index.offset[members] + index.length[members]
        self._columns[extension] = offset_N, end_N, crc_N, bytearray(len(index))
        return self._columns[extension]
