"""A local path for any shard: remote ones and compressed ones are brought into the cache, once for a machine."""

import hashlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from dltrain.data import lru
from dltrain.data.compressed import codec_named, codec_of, decompressed
from dltrain.data.download import BLOCK, Replaced, download, small_file, version
from dltrain.errors import UserError
from dltrain.files import sync
from dltrain.progress import track

RESTARTS = 4  # of a file that is replaced again and again while it is read


def local(url: str, *, pipe: bool = False, known: tuple[int | None, str] | None = None) -> Path:
    """The path of a shard as a plain tar on this machine: itself, or in the cache, into which it is brought first.

    `url` is a path, `file:`, `http(s)://`, `s3://`, `gs://`, `hf://` or another of fsspec's protocols, or, where `pipe`
    allows it, `pipe:COMMAND`: run by the shell once, and the cache keeps what it prints. Archives of gzip, bzip2, xz
    and Zstandard are decompressed. However many processes ask, one works and the others wait.

    Ask again before each opening: the cache may have evicted the file meanwhile. With `known`, what `size_and_identity`
    said, that costs microseconds where the cache has it, and a file that was replaced since is a UserError.
    UserError also for what is not there, not allowed, damaged, unreachable after many tries, or has no room.
    """
    path = _path(url)
    if path and not _compressed(path):
        return path
    last: Replaced | None = None
    try:
        for _ in range(RESTARTS):
            size, identity = known or size_and_identity(url, pipe=pipe)
            final = lru.folder() / f"{identity}.tar"
            if lru.used(final):
                return final
            try:
                with lru.making(final) as journal:
                    if not lru.used(final):  # or who held the lock made it
                        _make(url, size, identity, final, journal)
                return final
            except Replaced as error:
                last = error
                if known and size_and_identity(url) != known:
                    raise UserError(f"{url}: the file was replaced since the run began; restore it") from error
    except OSError as error:
        raise UserError(
            f"cannot bring {url} into the cache: {error.strerror or error}; "
            "free the disk or set DLTRAIN_CACHE to another folder"
        ) from error
    raise UserError(f"{url}: {last}, {RESTARTS} times; wait until it is whole at its source")


def size_and_identity(url: str, *, pipe: bool = False) -> tuple[int | None, str]:
    """Bytes of the file (None where they are not told), and a hex name that changes when its content does.

    Of a remote file from what the server tells, of a local one from its path, size and mtime, of a pipe the command.
    """
    if url.startswith("pipe:"):
        if not pipe:
            raise UserError(f"{url}: this runs a shell command; allow it with pipe=True if you trust it")
        return None, _digest(url)
    if path := _path(url):
        try:
            stat = path.stat()
        except OSError as error:
            raise UserError(f"{path}: {error.strerror}; correct the pattern or restore the file") from error
        return stat.st_size, _digest(f"{path.absolute()}\n{stat.st_size}\n{stat.st_mtime_ns}")
    return version(url)


def beside(url: str, suffix: str) -> bytes | None:
    """A small file published under the name of a shard and `suffix`, such as its index; None where there is none."""
    if url.startswith("pipe:"):
        return None
    if path := _path(url):
        try:
            return path.with_name(path.name + suffix).read_bytes()
        except OSError:
            return None
    name, question, query = url.partition("?")
    return small_file(name + suffix + question + query)


def _path(url: str) -> Path | None:
    """The path that a plain name or `file:` URL is, None for any other URL."""
    if url.startswith("file:"):
        return Path(re.sub("^//(localhost)?", "", url.removeprefix("file:")))
    return None if re.match(r"pipe:|[A-Za-z][\w+.-]+:(//|:)", url) else Path(url).expanduser()


def _compressed(path: Path) -> bool:
    if not codec_named(path.name):
        return False
    try:
        return codec_of(path, path.name) is not None
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; correct the pattern or restore the file") from error


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()


def _make(url: str, size: int | None, identity: str, final: Path, journal: BinaryIO) -> None:
    """Fill the entry `final` of the cache, which is ours alone."""
    part, plain = final.with_suffix(".part"), final.with_suffix(".plain")
    source, name = _path(url) or part, url
    if url.startswith("pipe:"):
        name = ""  # that of a command says nothing about what it prints
        lru.pour(track(_piped(url), f"running {url}"), part)
    elif source is part:
        download(url, size, identity, part, journal)
    if codec := codec_of(source, name):
        lru.pour(track(decompressed(source, codec, url), f"decompressing {url}, pieces"), plain)
    else:
        plain = part
    sync(plain)
    plain.rename(final)
    sync(final.parent)
    part.unlink(missing_ok=True)
    journal.truncate(0)


def _piped(url: str) -> Iterator[bytes]:
    """What a command prints. UserError with the end of its messages if it fails."""
    with tempfile.TemporaryFile() as messages:
        with subprocess.Popen(
            url.removeprefix("pipe:"), shell=True, stdout=subprocess.PIPE, stderr=messages
        ) as process:
            assert process.stdout
            while block := process.stdout.read(BLOCK):
                yield block
        if process.returncode:
            messages.seek(max(0, messages.seek(0, 2) - 200))
            said = " ".join(messages.read().decode(errors="replace").split())
            raise UserError(f"{url}: the command failed with status {process.returncode}: {said}")
