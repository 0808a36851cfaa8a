"""The side index of one shard: where every sample lies, and what its bytes must be.

Shards are plain tars (USTAR, PAX or GNU) as webdataset has them. Neighbouring members that differ only in what follows
the first dot of the file name are one sample: `a/b.jpg` and `a/b.cls` are {"__key__": "a/b", "jpg": ..., "cls": ...}.

The index of `name.tar` is `name.tar.idx` beside it (in the cache folder where that one is read-only). Little-endian:

    8 bytes    the letters dltidx02
    uint32     CRC-32C of all that follows
    uint32     bytes of JSON: samples, members, extensions, size, mtime_ns and sha256 of the shard, tail (where the last
               sample ends), damage (what was found when the index was made: [key, offset, reason])
    JSON, filled up with spaces to a multiple of 8 bytes, then the arrays of `FIELDS`, each filled up with zeros

A sample's span are its members with their headers and padding, and what lies before them that is no sample (folders,
links, metadata), so that spans and the tail make up the whole shard and nothing in it can change unseen. Checksums run
on: the one of span j begins with the one of span j - 1, and so one call checks one sample or a thousand neighbours.
"""

import contextlib
import hashlib
import json
import mmap
import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from crc32c import crc32c

from dltrain.data.cache import cache_dir, whole
from dltrain.errors import UserError

MAGIC = b"dltidx02"
FIELDS = {  # name -> (type, whether it is per member, else per sample)
    "span_start": ("<i8", False),
    "span_end": ("<i8", False),
    "running": ("<u4", False),  # CRC-32C of all spans up to and with this one
    "key_end": ("<i8", False),  # in the text of keys
    "member_end": ("<i8", False),  # in the next four
    "extension": ("<u2", True),  # number in extensions
    "offset": ("<i8", True),
    "length": ("<i8", True),
    "crc": ("<u4", True),  # CRC-32C of the payload
}
MEND = "restore the shard or write it anew"


@dataclass(frozen=True)
class Damage:
    """A sample that cannot be used: `offset` is the byte in the shard where what is wrong begins."""

    shard: str
    key: str
    offset: int
    reason: str

    def __str__(self) -> str:
        where = f"sample {self.key!r}" if self.key else "no sample"
        return f"{self.shard}: {where}, byte {self.offset}: {self.reason}"


@dataclass(frozen=True)
class Index:
    """The index of one shard; the arrays of FIELDS are as at the top of this file."""

    size: int
    mtime_ns: int
    sha256: str
    tail: int
    tail_crc: int
    extensions: list[str]
    damage: list[tuple[str, int, str]]
    key: bytes
    span_start: np.ndarray
    span_end: np.ndarray
    running: np.ndarray
    key_end: np.ndarray
    member_end: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray

    META = ("size", "mtime_ns", "sha256", "tail", "tail_crc", "extensions", "damage")

    def __len__(self) -> int:
        return len(self.span_end)

    def key_of(self, j: int) -> str:
        start = self.key_end[j - 1] if j else 0
        return self.key[start : self.key_end[j]].decode("utf-8", "surrogateescape")

    def members_of(self, j: int) -> range:
        return range(int(self.member_end[j - 1]) if j else 0, int(self.member_end[j]))

    def intact(self, view: memoryview, first: int, last: int) -> bool:
        """Whether the samples first ... last - 1, neighbours without a gap, are as they were indexed."""
        start, end = int(self.span_start[first]), int(self.span_end[last - 1])
        if end > len(view):
            return False
        return crc32c(view[start:end], int(self.running[first - 1]) if first else 0) == self.running[last - 1]

    def fault(self, view: memoryview, j: int) -> tuple[int, str]:
        """(byte, what is wrong) of a sample that is not intact."""
        for m in self.members_of(j):
            offset, end = int(self.offset[m]), int(self.offset[m] + self.length[m])
            if end > len(view):
                return min(offset, len(view)), f"truncated: the shard ends at byte {len(view)}"
            if crc32c(view[offset:end]) != self.crc[m]:
                return offset, f"payload of .{self.extensions[self.extension[m]]} has changed (CRC-32C differs)"
        return int(self.span_start[j]), "a tar header or its padding has changed (CRC-32C differs)"

    def faults(self, view: memoryview, shard: str) -> Iterator[Damage]:
        """All that differs between a shard and its index, in order, and what was found when the index was made."""
        yield from (Damage(shard, *found) for found in self.damage)
        for j in range(len(self)):
            if not self.intact(view, j, j + 1):
                yield Damage(shard, self.key_of(j), *self.fault(view, j))
        if len(view) != self.size:
            yield Damage(shard, "", min(len(view), self.size), f"has {len(view)} bytes, was indexed with {self.size}")
        elif crc32c(view[self.tail :]) != self.tail_crc:
            yield Damage(shard, "", self.tail, "the end-of-archive blocks have changed")

    # --- on disk -------------------------------------------------------------------------------------------------

    def pack(self) -> bytes:
        """The file; equal shards give equal bytes but for mtime_ns."""
        meta = {name: getattr(self, name) for name in self.META} | {"samples": len(self), "members": len(self.offset)}
        text = json.dumps(meta, sort_keys=True).encode()
        text += b" " * (-len(text) % 8)
        parts = [len(text).to_bytes(4, "little"), text]
        for name, (dtype, _) in FIELDS.items():
            part = np.ascontiguousarray(getattr(self, name), dtype).tobytes()
            parts.append(part + bytes(-len(part) % 8))
        body = b"".join([*parts, self.key])
        return MAGIC + crc32c(body).to_bytes(4, "little") + body

    @classmethod
    def unpack(cls, view: memoryview) -> "Index":
        """The inverse; arrays are views. ValueError if it is torn, of another version or no index at all."""
        if view[:8] != MAGIC or crc32c(view[12:]) != int.from_bytes(view[8:12], "little"):
            raise ValueError("not a whole index")
        at = 16 + int.from_bytes(view[12:16], "little")
        meta = json.loads(bytes(view[16:at]))
        meta["damage"] = [tuple(found) for found in meta["damage"]]
        n_samples, n_members = meta.pop("samples"), meta.pop("members")
        arrays = {}
        for name, (dtype, per_member) in FIELDS.items():
            arrays[name] = np.frombuffer(view, dtype, n_members if per_member else n_samples, at)
            at += arrays[name].nbytes + -arrays[name].nbytes % 8
        return cls(key=bytes(view[at:]), **meta, **arrays)

    def save(self, path: Path) -> None:
        """Beside the shard, or in the cache folder where that is read-only."""
        for home in homes(path):
            try:
                home.parent.mkdir(parents=True, exist_ok=True)
                with whole(home) as temp:
                    temp.write_bytes(self.pack())
                return
            except OSError as error:
                problem = f"cannot write {home}: {error.strerror}; set DLTRAIN_CACHE to a folder with room"
        raise UserError(problem)


def homes(path: Path) -> tuple[Path, Path]:
    """Where the index of a shard may lie: beside it, or in the cache folder."""
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return path.with_name(path.name + ".idx"), cache_dir() / "index" / f"{digest}-{path.name}.idx"


def stored(path: Path) -> Index | None:
    """The index that lies beside a shard or in the cache, if it is whole; whether it fits the shard is not asked."""
    for home in homes(path):
        try:
            with open(home, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                return Index.unpack(memoryview(bytes(content)))
        except (OSError, ValueError, KeyError, TypeError):
            continue  # absent, torn or of an older version: made anew
    return None


def opened(path: Path) -> Index:
    """The index of a shard, made if there is none.

    An index is believed: a shard that has another size or time than its index is read through, and if it has the same
    bytes the new time is noted. Otherwise the index stays as it is and shows which samples have changed. (One that was
    made of a damaged shard is made again.)
    """
    index = stored(path)
    if index is not None and not fits(index, path):
        if _sha256(path) == index.sha256:
            index = replace(index, mtime_ns=path.stat().st_mtime_ns)
            index.save(path)
        elif index.damage:
            index = None
    if index is None:
        index = indexed(path)
        index.save(path)
    return index


def fits(index: Index, path: Path) -> bool:
    """Whether a shard still has the size and time that its index was made for."""
    stat = path.stat()
    return (index.size, index.mtime_ns) == (stat.st_size, stat.st_mtime_ns)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# --- making it ---------------------------------------------------------------------------------------------------


@dataclass
class _Sample:
    key: str
    start: int
    end: int
    members: list[tuple[str, int, int]] = field(default_factory=list)  # extension, offset, length
    fault: tuple[int, str] | None = None
    gap: int | None = None  # byte of damage beside it


def indexed(path: Path, named: str = "") -> Index:
    """Read a whole shard. What is damaged in it is left out and listed in `damage`; `named` is for messages.

    UserError for a file that is no tar at all.
    """
    with open(path, "rb") as file:
        stat = os.fstat(file.fileno())
        if not stat.st_size:
            raise UserError(f"{named or path}: empty file, not a tar; {MEND}")
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content, memoryview(content) as view:
            samples, damage, tail = _samples(file, content, str(named or path))
            return _built(view, samples, damage, tail, stat)


def _built(view: memoryview, samples: list[_Sample], damage: list, tail: int, stat: os.stat_result) -> Index:
    extensions: dict[str, int] = {}
    columns: dict[str, list[int]] = {name: [] for name in FIELDS}
    keys, running, letters = [], 0, 0
    for sample in samples:
        running = crc32c(view[sample.start : sample.end], running)
        keys.append(sample.key.encode("utf-8", "surrogateescape"))
        letters += len(keys[-1])
        for extension, offset, length in sample.members:
            columns["extension"].append(extensions.setdefault(extension, len(extensions)))
            columns["offset"].append(offset)
            columns["length"].append(length)
            columns["crc"].append(crc32c(view[offset : offset + length]))
        for name, value in (("span_start", sample.start), ("span_end", sample.end), ("running", running)):
            columns[name].append(value)
        columns["key_end"].append(letters)
        columns["member_end"].append(len(columns["offset"]))
    return Index(
        size=stat.st_size, mtime_ns=stat.st_mtime_ns, sha256=hashlib.sha256(view).hexdigest(),
        tail=tail, tail_crc=crc32c(view[tail:]), extensions=list(extensions), damage=damage, key=b"".join(keys),
        **{name: np.array(columns[name], dtype) for name, (dtype, _) in FIELDS.items()},
    )  # fmt: skip


def _samples(file: Any, content: mmap.mmap, named: str) -> tuple[list[_Sample], list[tuple[str, int, str]], int]:
    """(whole samples in order, damage, end of the last one)."""
    from webdataset.tariterators import base_plus_ext

    samples: list[_Sample] = []
    damage: list[tuple[str, int, str]] = []
    by_key: dict[str, _Sample] = {}
    spanned = end = 0  # what belongs to samples so far; where the next header should be
    gap: int | None = None  # since the last sample

    def lost(what: str) -> None:
        damage.append((samples[-1].key if samples else "", end, what))
        for sample in samples[-1:]:
            sample.gap = end

    for name, start, offset, length, stop in _members(file, named):
        if start > end:
            end = _behind_global_headers(content, end)
        if start > end:
            lost(f"damaged tar header: {start - end} bytes after this sample are unreadable")
            gap = end
        end = min(stop, len(content))
        key, extension = base_plus_ext(name)
        if key is None or extension is None or re.match(r"__[^/]*__($|/)", name):
            continue  # no sample, as in webdataset: no dot in its name, or its own metadata
        extension = extension.lower()
        if not samples or key != samples[-1].key:
            samples.append(_Sample(key, spanned if gap is None else start, end, gap=gap))
            if key in by_key:
                for twin in (by_key[key], samples[-1]):
                    twin.fault = (twin.start, "the key occurs twice: sort the members by name")
            by_key[key] = samples[-1]
        sample = samples[-1]
        if gap is not None and _maybe_cut(name, offset - start):
            sample.fault = (start, f"{name!r} may have lost the rest of its name in the damage before it")
        else:
            gap = None  # or what follows may be the same sample
        if any(extension == other for other, _, _ in sample.members):
            sample.fault = (offset, f"has two .{extension}")
        if name.startswith("/") or ".." in name.split("/"):
            sample.fault = (start, f"the member name {name!r} leaves the folder")
        if offset + length > len(content):
            sample.fault = (offset, f"truncated: the shard ends at byte {len(content)}")
        sample.members.append((extension, offset, length))
        sample.end = spanned = end
    end = _behind_global_headers(content, end)
    rest = content[end:]
    if not end and rest.count(0) < len(rest):
        raise UserError(f"{named}: not an uncompressed tar; {MEND}")
    if rest.count(0) < len(rest):
        lost("damaged tar header: nothing after it is readable")
    elif len(rest) < 2 * tarfile.BLOCKSIZE and not any(s.fault for s in samples[-1:]):
        end = len(content)
        lost("truncated: no end-of-archive mark")
    _miss_members(samples)
    damage += [(sample.key, *sample.fault) for sample in samples if sample.fault]
    return [s for s in samples if not s.fault], sorted(damage, key=lambda found: found[1]), spanned


def _miss_members(samples: list[_Sample]) -> None:
    """A sample beside a gap may have lost a member in it: it is whole for sure if all the others have the same ones."""
    usual = Counter(tuple(e for e, _, _ in sample.members) for sample in samples if sample.gap is None)
    for sample in samples:
        if sample.gap is not None and list(usual) != [tuple(e for e, _, _ in sample.members)]:
            sample.fault = sample.fault or (sample.gap, "a member may be lost in the damage beside it")


def _maybe_cut(name: str, headers: int) -> bool:
    """Whether a name looks like what tar writes for a long or foreign one, whose own header comes before."""
    long = len(name.encode("utf-8", "surrogateescape")) >= tarfile.LENGTH_NAME
    return headers == tarfile.BLOCKSIZE and (long or "?" in name)


def _behind_global_headers(content: mmap.mmap, at: int) -> int:
    """PAX headers for all that follows, which `tarfile` takes in without a word."""
    with contextlib.suppress(tarfile.TarError):
        while True:
            header = tarfile.TarInfo.frombuf(content[at : at + tarfile.BLOCKSIZE], "utf-8", "surrogateescape")
            if header.type != tarfile.XGLTYPE:
                break
            at += tarfile.BLOCKSIZE + header.size + -header.size % tarfile.BLOCKSIZE
    return at


def _members(file: Any, named: str) -> Iterator[tuple[str, int, int, int, int]]:
    """(name, start of its headers, start of its payload, bytes of payload, where the next header should be) of all
    members that can be found; "" for what is no regular file.

    What was passed over, damaged, shows as a gap.
    """
    with _Tar.open(fileobj=file, mode="r:", ignore_zeros=True) as tar:
        while (member := tar.next()) is not None:
            if member.issparse():
                raise UserError(f"{named}: {member.name!r} is sparse; write it anew without holes")
            yield member.name if member.isreg() else "", member.offset, member.offset_data, member.size, tar.offset
            tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header


class _Tar(tarfile.TarFile):
    """With `ignore_zeros` tarfile goes on behind a damaged header; here, also where that one belongs to another."""

    def next(self) -> tarfile.TarInfo | None:
        while True:
            try:
                member = super().next()
            except (tarfile.TarError, ValueError, EOFError):
                self.offset += tarfile.BLOCKSIZE
                if self.offset >= os.fstat(self.fileobj.fileno()).st_size:  # type: ignore[union-attr]
                    return None
                continue
            if member is None or member.size >= 0:
                return member
            self.offset = member.offset + tarfile.BLOCKSIZE  # not back: it would be found for ever
