"""A folder, zip or tar as named files, any of which any process can read on its own.

Zips are read at random as they are. A compressed tar or file has no random access: it is unpacked once into the
conversion's work folder.
"""

import hashlib
import lzma
import os
import stat
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dltrain.data.cache import whole
from dltrain.data.compressed import codec_named, decompressed
from dltrain.errors import UserError
from dltrain.progress import track

BLOCK = 1 << 18  # bytes


class Bad(UserError):
    """One file or line of a source is of no use; `--skip-bad` passes over it."""


@dataclass(frozen=True, slots=True)
class Span:
    """`size` bytes from `start` of the file `path`, or all of `member` of the zip `path`."""

    path: str
    start: int
    size: int
    member: str = ""

    def read(self) -> bytes:
        """Bad if they are damaged, UserError if the file cannot be read."""
        try:
            if self.member:
                content = _zip(self.path, os.stat(self.path).st_mtime_ns).read(self.member)
            else:
                with open(self.path, "rb") as file:
                    file.seek(self.start)
                    content = file.read(self.size)
        except OSError as error:
            raise UserError(f"cannot read {self.path}: {error.strerror or error}; restore it") from error
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, ValueError, NotImplementedError) as error:
            raise Bad(f"{self.path}, {self.member}: {error}") from error
        if len(content) != self.size:
            raise UserError(f"{self.path} is shorter than when it was listed; restore it and begin again")
        return content


Files = dict[str, Span]  # by name, with "/" between folders, in the order of names


@lru_cache(maxsize=1)
def _zip(path: str, mtime_ns: int) -> zipfile.ZipFile:
    return zipfile.ZipFile(path)


def on_disk(source: Path) -> Files:
    """The files below a folder, or the one file that `source` is. Links are followed, hidden names left out.

    UserError for a source that is missing or unreadable.
    """
    if not source.exists():
        raise UserError(f"{source} does not exist; give a folder or file that does")
    try:
        found = dict(_walk(source)) if source.is_dir() else {source.name: Span(str(source), 0, source.stat().st_size)}
        for span in [] if source.is_dir() else found.values():
            open(span.path, "rb").close()
    except OSError as error:
        raise UserError(f"cannot read {error.filename or source}: {error.strerror}; mend or remove it") from error
    return dict(sorted(found.items()))


def _walk(source: Path) -> Iterator[tuple[str, Span]]:
    def fail(error: OSError) -> None:
        raise error

    seen = set()  # a link may lead back up
    for root, folders, names in os.walk(source, followlinks=True, onerror=fail):
        status = os.stat(root)
        if (status.st_dev, status.st_ino) in seen:
            folders.clear()
            continue
        seen.add((status.st_dev, status.st_ino))
        below = "" if root == str(source) else f"{os.path.relpath(root, source)}/"
        for name in names:
            if not _hidden(below + name):
                path = os.path.join(root, name)
                status = os.stat(path)
                if stat.S_ISREG(status.st_mode):
                    yield below + name, Span(path, 0, status.st_size)


def _hidden(name: str) -> bool:
    return any(part.startswith(".") or part == "__MACOSX" for part in name.split("/"))


def fingerprint(source: Path, files: Files) -> dict[str, Any]:
    """What is compared to tell whether a source is still the same: names and sizes, and both ends of a single file."""
    digest = hashlib.sha256()
    for name, span in files.items():
        digest.update(f"{name}\0{span.size}\0".encode("utf-8", "surrogateescape"))
    if source.is_file():
        with source.open("rb") as file:
            digest.update(file.read(BLOCK))
            file.seek(max(0, source.stat().st_size - BLOCK))
            digest.update(file.read(BLOCK))
    size = sum(span.size for span in files.values())
    return {"name": source.resolve().name, "files": len(files), "bytes": size, "sha256": digest.hexdigest()}


def is_archive(name: str) -> bool:
    """By its ending: .zip, .tar, .tar.gz, .tgz and so on."""
    suffixes = [suffix.lower() for suffix in Path(name).suffixes]
    short = suffixes[-1:] and suffixes[-1].startswith(".t") and codec_named(name)
    return suffixes[-1:] in ([".zip"], [".tar"]) or bool(short or (suffixes[-2:-1] == [".tar"] and codec_named(name)))


def contents(source: Path, files: Files, work: Path) -> Files:
    """`files`, or what is in them if `source` is one archive. UserError for an archive that is damaged.

    Names are cleared of what would leave the folder, of hidden files and of macOS's own.
    """
    if source.is_dir() or not is_archive(source.name):
        return files
    if source.suffix.lower() == ".zip":
        found = _zip_files(source)
    else:
        tar = plain(source.name, files[source.name], work)
        found = track(tar_files(tar, source.name), f"listing {source.name}")
    clean = (("/".join(part for part in name.split("/") if part not in ("", ".", "..")), span) for name, span in found)
    return dict(sorted((name, span) for name, span in clean if name and not _hidden(name)))


def _zip_files(path: Path) -> Iterator[tuple[str, Span]]:
    try:
        members = _zip(str(path), path.stat().st_mtime_ns).infolist()
    except (zipfile.BadZipFile, OSError, ValueError) as error:
        raise UserError(f"{path}: not a zip, or damaged ({error}); fetch or make it again") from error
    for member in members:
        if member.flag_bits & 1:
            raise UserError(f"{path}: {member.filename} is encrypted; unpack it yourself and give the folder")
        if not member.is_dir():
            yield member.filename, Span(str(path), 0, member.file_size, member.filename)


def tar_files(whole_tar: Span, named: str) -> Iterator[tuple[str, Span]]:
    """The regular files of an uncompressed tar, which may itself lie in a tar.

    `tarfile` takes a damaged header for the end of the archive, so what follows the last member must be zeros.
    """
    stop = whole_tar.start + whole_tar.size
    mend = "fetch or make it again"
    try:
        with open(whole_tar.path, "rb") as file:
            file.seek(whole_tar.start)
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    if member.isreg() and not member.issparse():
                        if member.offset_data + member.size > stop:
                            raise UserError(f"{named}: truncated inside {member.name}; {mend}")
                        yield member.name, Span(whole_tar.path, member.offset_data, member.size)
                    tar.members.clear()  # type: ignore[attr-defined]  # or it keeps every header
                end = tar.offset
            file.seek(end)
            mark = file.read(min(tarfile.BLOCKSIZE, max(0, stop - end)))
    except (tarfile.TarError, EOFError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{named}: not a tar, or damaged ({error}); {mend}") from error
    except OSError as error:
        raise UserError(f"cannot read {named}: {error.strerror or error}; {mend}") from error
    if len(mark) < tarfile.BLOCKSIZE or any(mark):
        raise UserError(f"{named}: damaged or truncated at byte {end - whole_tar.start}; {mend}")


def plain(name: str, span: Span, work: Path) -> Span:
    """The same file as a range of bytes, uncompressed: itself if it is so, else unpacked into `work`, once."""
    codec = codec_named(name)
    if span.member or (codec and span.start):  # out of its archive
        span = _kept(name, span, work, lambda: _extracted(name, span))
    if codec:
        path = Path(span.path)
        span = _kept(f"{name}, unpacked", span, work, lambda: decompressed(path, codec, name))
    return span


def _kept(name: str, span: Span, work: Path, blocks: Callable[[], Iterator[bytes]]) -> Span:
    target = work / f"source-{hashlib.sha256(name.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"
    if not target.exists():
        with whole(target) as temp, open(temp, "wb") as file:
            for block in track(blocks(), f"reading {name}, pieces"):
                file.write(block)
    return Span(str(target), 0, target.stat().st_size)


def _extracted(name: str, span: Span) -> Iterator[bytes]:
    try:
        if not span.member:
            yield span.read()
            return
        with _zip(span.path, os.stat(span.path).st_mtime_ns).open(span.member) as raw:
            yield from iter(lambda: raw.read(BLOCK), b"")
    except (OSError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError) as error:
        raise UserError(f"{name}: cannot be unpacked ({error}); fetch or make it again") from error
