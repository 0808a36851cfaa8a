"""Plain webdataset shards with a side index, so that any sample is one `pread` away. The only importer of webdataset.

Shards are uncompressed tars (USTAR, PAX or GNU). Neighbouring members that differ only in what follows the first dot of
the file name are one sample: `a/b.jpg` and `a/b.cls` are {"__key__": "a/b", "jpg": ..., "cls": ...}.

The index of `name.tar` is `name.tar.idx` beside it (in the cache folder where that one is read-only): a NumPy .npz of

    meta        uint8   a JSON object: version, size (bytes) and mtime_ns and sha256 of the shard, names of extensions
    key         uint8   the samples' keys in UTF-8, one after the other
    key_end     int64   per sample, where its key ends in `key`
    member_end  int64   per sample, where its members end in the next four
    extension   uint16  per member, number in meta.extensions
    offset      int64   per member, bytes from the start of the shard to the payload
    length      int64   per member, bytes of payload
    crc         uint32  per member, CRC-32 (zlib's) of the payload

It is made on first use and again when the shard's size or mtime has changed. webdataset itself drops the rest of a
damaged shard without a word; here any damage is a UserError with the shard, the place and what to do.
"""

import hashlib
import itertools
import json
import mmap
import os
import re
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.data.cache import cache_dir, whole
from dltrain.data.order import key_hashes
from dltrain.errors import UserError
from dltrain.progress import track

VERSION = 1
OPEN_FILES = 64  # per process; the oldest is closed beyond that


def expand(pattern: str) -> list[Path]:
    """Shards named by `pattern`: paths, {000..012} braces, globs, folders of .tar files, or a comma list of these.

    UserError if it names nothing, a missing or unreadable file, or one file twice.
    """
    from webdataset.shardlists import expand_urls

    try:
        # Braces around it all make a list of the outer commas too. A name that exists is itself, whatever is in it.
        literal = pattern and Path(pattern).expanduser().exists()
        names = [pattern] if literal else [name.strip() for name in expand_urls("{" + pattern + ",}")]
    except ValueError as error:
        raise UserError(f"shards {pattern!r}: {error}; close every brace") from error
    paths: list[Path] = []
    for name in filter(None, names):
        path = Path(name).expanduser()
        if path.is_dir():
            found = sorted(path.glob("*.tar"))
        elif has_magic(name) and not path.exists():
            found = [Path(match) for match in sorted(glob(str(path)))]
        else:
            found = [path]
        if not found:
            what = "holds no .tar file" if path.is_dir() else "matches nothing"
            raise UserError(f"shards {pattern!r}: {name} {what}; correct the pattern")
        paths += found
    if not paths:
        raise UserError(
            f"shards {pattern!r} names no file; give a path, a {{000..012}} pattern or a folder of .tar files"
        )
    for path in paths:
        if not path.is_file():
            raise UserError(f"shards {pattern!r}: {path} does not exist; correct the pattern or restore the file")
        if not os.access(path, os.R_OK):
            raise UserError(f"shards {pattern!r}: {path} is not readable; correct its permissions")
    if len(set(paths)) < len(paths):
        twice = next(path for path in paths if paths.count(path) > 1)
        raise UserError(f"shards {pattern!r} names {twice} twice; its samples would count double")
    return paths


def write_shards(samples: Iterable[dict[str, Any]], folder: Path, prefix: str, samples_per_shard: int) -> list[Path]:
    """Write `folder/prefix-000000.tar`, ...; each appears only whole, with its index; equal samples give equal bytes.

    A sample is {"__key__": str, extension: bytes, str, or what webdataset encodes (json, npy, cls ...)}. UserError for
    a key that webdataset could not read back or that is used twice.
    """
    from webdataset.tariterators import base_plus_ext
    from webdataset.writer import TarWriter

    paths: list[Path] = []
    rest = iter(samples)
    while shard := list(itertools.islice(rest, samples_per_shard)):
        path = folder / f"{prefix}-{len(paths):06d}.tar"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with whole(path) as temp:
                with (
                    open(temp, "wb") as file,
                    TarWriter(file, user="", group="", mtime=0, format="PAX_FORMAT") as writer,
                ):
                    for sample in shard:
                        key = sample["__key__"]
                        if base_plus_ext(f"{key}.x") != (key, "x"):
                            raise UserError(
                                f"{path}: sample key {key!r} must not be empty or have a dot in its last part"
                            )
                        writer.write(sample)
                index = _Index.of(temp, named=path)
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}; free the disk or choose another folder") from error
        index.save(path)  # the rename has kept size and mtime
        paths.append(path)
    return paths


class Shards:
    """Samples of all shards that `pattern` names, by number, in their order. Picklable; opens files lazily."""

    def __init__(self, pattern: str):
        self.paths = expand(pattern)
        self._indexes = [_Index.open(path) for path in track(self.paths, "indexing shards")]
        self._start = np.cumsum([0] + [len(index.key_end) for index in self._indexes])
        self._open: dict[int, int] = {}  # shard -> file descriptor, in order of opening
        self.fingerprint = hashlib.sha256("".join(index.sha256 for index in self._indexes).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._start[-1])

    def __getitem__(self, i: int) -> dict[str, Any]:
        """{"__key__": str, extension: bytes}. UserError if the bytes are not the ones that were indexed."""
        shard, j = self._find(i)
        index, path = self._indexes[shard], self.paths[shard]
        key, members = index.key_of(j), index.members_of(j)
        sample: dict[str, Any] = {"__key__": key}
        if members.start == members.stop:
            return sample
        start = int(index.offset[members.start])
        stop = int(index.offset[members.stop - 1] + index.length[members.stop - 1])
        blob = memoryview(os.pread(self._descriptor(shard), stop - start, start))
        for m in range(members.start, members.stop):
            offset = int(index.offset[m])
            payload = blob[offset - start : offset - start + int(index.length[m])]
            if zlib.crc32(payload) != index.crc[m]:
                extension = index.extensions[index.extension[m]]
                raise UserError(
                    f"{self.name(i)}, member .{extension} at byte {offset} is not what was indexed (CRC-32 differs); "
                    f"restore the shard, or delete {path.name}.idx if it was replaced on purpose"
                )
            sample[index.extensions[index.extension[m]]] = bytes(payload)
        return sample

    def name(self, i: int) -> str:
        """Shard and key of a sample, for messages."""
        shard, j = self._find(i)
        return f"{self.paths[shard]}: sample {self._indexes[shard].key_of(j)!r}"

    def keys(self) -> Iterator[str]:
        return (index.key_of(j) for index in self._indexes for j in range(len(index.key_end)))

    def key_hashes(self) -> np.ndarray:
        """uint64 per sample, for `order.split`."""
        return key_hashes(self.keys())

    def _find(self, i: int) -> tuple[int, int]:
        if not 0 <= i < len(self):
            raise IndexError(f"sample {i} of {len(self)}")
        shard = int(np.searchsorted(self._start, i, side="right")) - 1
        return shard, int(i - self._start[shard])

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) >= OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            try:
                self._open[shard] = os.open(self.paths[shard], os.O_RDONLY | os.O_CLOEXEC)
            except OSError as error:
                raise UserError(f"{self.paths[shard]}: {error.strerror}; restore the shard") from error
        return self._open[shard]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}

    def __del__(self):
        for descriptor in self.__dict__.get("_open", {}).values():
            os.close(descriptor)


@dataclass(frozen=True)
class _Index:
    """The side index of one shard; the format is at the top of this file."""

    size: int
    mtime_ns: int
    sha256: str
    extensions: list[str]
    key: np.ndarray
    key_end: np.ndarray
    member_end: np.ndarray
    extension: np.ndarray
    offset: np.ndarray
    length: np.ndarray
    crc: np.ndarray

    ARRAYS = ("key", "key_end", "member_end", "extension", "offset", "length", "crc")

    def key_of(self, j: int) -> str:
        start = self.key_end[j - 1] if j else 0
        return self.key[start : self.key_end[j]].tobytes().decode("utf-8", "surrogateescape")

    def members_of(self, j: int) -> slice:
        return slice(int(self.member_end[j - 1]) if j else 0, int(self.member_end[j]))

    @classmethod
    def open(cls, path: Path) -> "_Index":
        """The stored index of a shard, or a new one if there is none that fits."""
        stat = path.stat()
        for stored in _homes(path):
            try:
                with open(stored, "rb") as file, np.load(file, allow_pickle=False) as arrays:
                    meta = json.loads(arrays["meta"].tobytes())
                    if (meta.pop("version"), meta["size"], meta["mtime_ns"]) == (
                        VERSION,
                        stat.st_size,
                        stat.st_mtime_ns,
                    ):
                        return cls(**meta, **{name: arrays[name] for name in cls.ARRAYS})
            except (OSError, ValueError, KeyError, TypeError, zlib.error, EOFError, zipfile.BadZipFile):
                continue  # absent, or torn: make it anew
        index = cls.of(path, named=path)
        index.save(path)
        return index

    def save(self, path: Path) -> None:
        meta = {
            "version": VERSION,
            "size": self.size,
            "mtime_ns": self.mtime_ns,
            "sha256": self.sha256,
            "extensions": self.extensions,
        }
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        arrays["meta"] = np.frombuffer(json.dumps(meta).encode(), np.uint8)
        beside, cached = _homes(path)
        for home in (beside, cached):
            try:
                home.parent.mkdir(parents=True, exist_ok=True)
                with whole(home) as temp, open(temp, "wb") as file:
                    np.savez(file, **arrays)
                return
            except OSError as error:
                if home is cached:
                    raise UserError(
                        f"cannot write {cached}: {error.strerror}; set DLTRAIN_CACHE to a folder with room"
                    ) from error

    @classmethod
    def of(cls, path: Path, named: Path) -> "_Index":
        """Read a whole shard; UserError (calling it `named`) for damage of any kind."""
        from webdataset.tariterators import base_plus_ext

        extensions: dict[str, int] = {}
        rows: list[tuple[int, int, int, int]] = []  # extension, offset, length, crc
        keys: list[str] = []
        member_end: list[int] = []
        seen: set[str] = set()
        here: set[str] = set()  # extensions of the current sample
        with open(path, "rb") as file:
            stat = os.fstat(file.fileno())
            if not stat.st_size:
                raise UserError(f"{named}: empty file, not a tar; restore the shard or drop it from the pattern")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as bytes_:
                for name, offset, length in _members(file, bytes_, named):
                    key, extension = base_plus_ext(name)
                    if not key or not extension or re.match(r"__[^/]*__($|/)", name):
                        continue  # as webdataset does: no extension, or its own metadata
                    extension = extension.lower()
                    if not keys or key != keys[-1]:
                        if key in seen:
                            raise UserError(
                                f"{named}: sample {key!r} is split, again at byte {offset}; sort the members by name"
                            )
                        seen.add(key)
                        keys.append(key)
                        member_end.append(len(rows))
                        here = set()
                    if extension in here:
                        raise UserError(
                            f"{named}: sample {key!r} has two .{extension}, again at byte {offset}; write it anew"
                        )
                    here.add(extension)
                    rows.append(
                        (
                            extensions.setdefault(extension, len(extensions)),
                            offset,
                            length,
                            zlib.crc32(bytes_[offset : offset + length]),
                        )
                    )
                    member_end[-1] = len(rows)
                sha256 = hashlib.sha256(bytes_).hexdigest()
        encoded = [key.encode("utf-8", "surrogateescape") for key in keys]
        extension, offset, length, crc = zip(*rows) if rows else ((), (), (), ())
        return cls(
            stat.st_size,
            stat.st_mtime_ns,
            sha256,
            list(extensions),
            np.frombuffer(b"".join(encoded), np.uint8),
            np.cumsum([len(key) for key in encoded], dtype=np.int64),
            np.array(member_end, np.int64),
            np.array(extension, np.uint16),
            np.array(offset, np.int64),
            np.array(length, np.int64),
            np.array(crc, np.uint32),
        )


def _members(file: Any, content: mmap.mmap, named: Path) -> Iterator[tuple[str, int, int]]:
    """(name, offset, length) of every regular file in a tar, which must end as a tar does: with zeros, at least 1,024
    of them.

    `tarfile` stops at a damaged header as if the archive ended there, so what is left must be looked at.
    """
    mend = "restore the shard from its source or write it anew"
    name = ""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                name = member.name
                if member.isreg():
                    if member.issparse():
                        raise UserError(f"{named}: {name!r} is sparse; write it anew without holes")
                    if member.offset_data + member.size > len(content):
                        raise UserError(f"{named}: truncated at byte {len(content)}, inside {name!r}; {mend}")
                    yield name, member.offset_data, member.size
                tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
            end = tar.offset
    except (tarfile.TarError, ValueError, EOFError) as error:
        where = f"after {name!r}" if name else "at byte 0"
        raise UserError(f"{named}: damaged, truncated or not an uncompressed tar {where} ({error}); {mend}") from error
    left = content[end:]
    if left.count(0) < len(left):
        raise UserError(f"{named}: damaged header at byte {end}, after {name!r}; {mend}")
    if len(left) < 2 * tarfile.BLOCKSIZE:
        raise UserError(f"{named}: truncated at byte {len(content)}, after {name!r} (no end-of-archive mark); {mend}")


def _homes(path: Path) -> tuple[Path, Path]:
    """Where the index of a shard may lie: beside it, or in the cache folder."""
    digest = hashlib.sha256(os.fsencode(path.resolve())).hexdigest()[:16]
    return path.with_name(path.name + ".idx"), cache_dir() / "index" / f"{digest}-{path.name}.idx"
