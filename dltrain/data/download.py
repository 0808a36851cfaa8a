"""Remote files, whole or not at all, over servers and networks that fail. The owner of fsspec and aiohttp.

A download goes block by block in ranged requests into a file that has its final length from the start, beside a journal
with the CRC-32 of each block received: whatever stops it, a kill or a power cut too, the next process goes on behind
the last good block. What the server tells of the file (its ETag, else a checksum, else its time) is asked again at the
end: bytes of two versions never mix, unless the server tells nothing but a length and that did not change.

Settings of the protocols are fsspec's: `AWS_ENDPOINT_URL`, `FSSPEC_S3_ANON=true`, `~/.config/fsspec/*.json`.
"""

import base64
import hashlib
import time
import zlib
from collections.abc import Callable, Iterator
from errno import EDQUOT, ENOSPC
from functools import partial
from pathlib import Path
from random import SystemRandom
from typing import Any, BinaryIO, TypeVar

from dltrain.data import lru
from dltrain.errors import UserError
from dltrain.progress import track

T = TypeVar("T")
BLOCK = 4 << 20  # bytes of a request
TRIES = 10  # of a block; the pauses between them add up to a minute or so
FIRST_TRIES = 6  # of the questions before it, at which a wrong URL or password fails: seconds
PAUSE_S, LONGEST_PAUSE_S = 0.2, 30.0

# What tells versions of a file apart, best first; HTTP, S3, Hugging Face, Google and Azure have each their own words.
VERSION_FIELDS = ("ETag", "etag", "blob_id", "md5Hash", "Content-MD5")
TIME_FIELDS = ("Last-Modified", "LastModified", "last_modified", "updated", "mtime")


class Replaced(Exception):
    """What we have is not the file that was asked for: it changed meanwhile, or its checksum differs."""


class _NoRangesError(Exception):
    """The server gives whole files only, or does not tell how long they are."""


def version(url: str) -> tuple[int | None, str]:
    """Bytes of a remote file, None if the server does not say, and a hex name of this version of it.

    UserError if it is not there or not ours to read, or the server cannot be reached.
    """
    info = _info(url)
    return info.get("size"), _identity(url, info)


def download(url: str, size: int | None, identity: str, path: Path, journal: BinaryIO) -> None:
    """Write the version of a file that `version` spoke of to `path`, in the cache, or what is missing there.

    Replaced if there is another one now, in which case nothing is kept; UserError where `version` has it, with the
    byte, or where there is no room; OSError if the disk fails. These keep what was received.
    """
    try:
        try:
            if size is None:
                raise _NoRangesError
            _by_blocks(url, size, identity, path, journal)
        except _NoRangesError:
            journal.truncate(0)
            _steadily(url, TRIES, lambda: lru.pour(track(_stream(url), f"fetching {_name(url)}, pieces"), path))
        info = _info(url)
        if _identity(url, info) != identity:
            raise Replaced("the file changed while it was read")
        if size not in (None, path.stat().st_size) or not _sums_agree(path, info):
            raise Replaced("the bytes received differ from the size or checksum that the server tells")
    except Replaced:
        journal.truncate(0)
        path.unlink()
        raise


def small_file(url: str) -> bytes | None:
    """The whole of a file that may be missing: None where it is, or where nobody may read it."""
    fs, path = _filesystem(url)
    try:
        return _steadily(url, FIRST_TRIES, partial(fs.cat_file, path))
    except UserError as error:
        if isinstance(error.__cause__, Exception) and _final(error.__cause__):
            return None
        raise


def _by_blocks(url: str, size: int, identity: str, path: Path, journal: BinaryIO) -> None:
    lru.reserve(path, size)
    start = _resumed(path, size, journal)
    blocks = _blocks(url, start, size, identity)
    with open(path, "r+b", buffering=0) as file:
        file.seek(start)
        for block in track(blocks, f"fetching {_name(url)}, blocks of {BLOCK >> 20} MiB", -((start - size) // BLOCK)):
            file.write(block)
            journal.write(zlib.crc32(block).to_bytes(4, "little"))


def _resumed(path: Path, size: int, journal: BinaryIO) -> int:
    """Bytes at the start of `path` that are as they were received; the journal is cut to these."""
    journal.seek(0)
    good = blocks = 0
    with open(path, "rb") as file:
        while len(crc := journal.read(4)) == 4 and good < size:
            block = file.read(min(BLOCK, size - good))
            if zlib.crc32(block) != int.from_bytes(crc, "little"):
                break
            good += len(block)
            blocks += 1
    journal.truncate(4 * blocks)  # opened to append: the next write comes behind these
    return good


def _blocks(url: str, start: int, size: int, identity: str) -> Iterator[bytes]:
    """The file from byte `start` on, a request a block, each tried again until it is whole."""
    if start == size:
        return
    fs, path = _filesystem(url)
    open_ = partial(fs.open, path, "rb", block_size=BLOCK, cache_type="none")
    with _steadily(url, FIRST_TRIES, open_) as file:
        for at in range(start, size, BLOCK):
            read = partial(_block, file, url, identity, at, min(BLOCK, size - at))
            yield _steadily(f"{url}, byte {at:,}", TRIES, read)


def _block(file: Any, url: str, identity: str, at: int, length: int) -> bytes:
    try:
        file.seek(at)
        data = file.read(length)
        if len(data) != length:
            raise EOFError(f"{len(data):,} bytes came instead of {length:,}")
        return data
    except ValueError as error:  # fsspec's word for it
        raise _NoRangesError from error
    except Exception as error:
        try:
            replaced = _identity(url, _ask(url)) != identity
        except Exception:
            replaced = False  # nobody knows; the end asks again
        if replaced:
            raise Replaced("the file changed while it was read") from error
        raise


def _stream(url: str) -> Iterator[bytes]:
    fs, path = _filesystem(url)
    with fs.open(path, "rb", block_size=0) as file:
        while block := file.read(BLOCK):
            yield block


def _ask(url: str) -> dict[str, Any]:
    fs, path = _filesystem(url)
    fs.invalidate_cache()
    try:
        info = fs.info(path)
    except FileNotFoundError as error:
        if url.startswith("http") and isinstance(error.__cause__, Exception):
            raise error.__cause__ from None  # fsspec calls whatever befalls an HTTP request "not found"
        raise
    if info["type"] == "directory":
        raise IsADirectoryError(url)
    return info


def _info(url: str) -> dict[str, Any]:
    return _steadily(url, FIRST_TRIES, partial(_ask, url))


def _identity(url: str, info: dict[str, Any]) -> str:
    told = next((info[field] for field in VERSION_FIELDS if info.get(field)), None)
    if told:
        url = url.partition("?")[0]  # a signature in the query, new each time, makes no other file
    else:
        told = next((info[field] for field in TIME_FIELDS if info.get(field)), None)
    return hashlib.sha256(f"{url}\n{info.get('size')}\n{told}".encode()).hexdigest()


def _sums_agree(path: Path, info: dict[str, Any]) -> bool:
    """Whether a checksum of the whole file, where the server tells one, is that of `path`."""
    if md5 := info.get("Content-MD5") or info.get("md5Hash"):
        algorithm, told = "md5", base64.b64decode(md5)
    elif lfs := info.get("lfs"):
        algorithm, told = "sha256", bytes.fromhex(lfs["sha256"])
    else:
        return True
    with open(path, "rb") as file:
        return hashlib.file_digest(file, algorithm).digest() == told


def _filesystem(url: str) -> tuple[Any, str]:
    """fsspec's file system of a URL, and what the file is called there. Not to be kept over a fork."""
    import fsspec
    from fsspec.config import conf
    from fsspec.registry import known_implementations

    protocol = url.partition(":")[0]
    options: dict[str, Any] = {}
    try:
        if protocol in ("http", "https"):
            import aiohttp

            options["client_kwargs"] = {
                "headers": {"Accept-Encoding": "identity"},
                "auto_decompress": False,  # a range of a compressed file is not one
                "timeout": aiohttp.ClientTimeout(total=None, sock_connect=30, sock_read=60),
                "trust_env": True,  # HTTPS_PROXY, as curl has it
                **conf.get(protocol, {}).get("client_kwargs", {}),
            }
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        owner = known_implementations.get(protocol, {}).get("class", protocol).partition(".")[0]
        package = f"'fsspec[{protocol}]'" if owner == "fsspec" else owner
        raise UserError(f"{url}: {error}; pip install {package}") from error
    except ValueError as error:
        raise UserError(f"{url}: {error}; correct the URL") from error


def _steadily(what: str, tries: int, attempt: Callable[[], T]) -> T:
    """`attempt()`, again after growing random pauses while it fails in ways that may pass; UserError if it does not."""
    for n in range(1, tries + 1):
        try:
            return attempt()
        except (UserError, Replaced, _NoRangesError):
            raise
        except Exception as error:  # each file system has its own
            if isinstance(error, OSError) and error.errno in (ENOSPC, EDQUOT):
                raise
            said = " ".join(f"{type(error).__name__}: {error}".split())
            if _final(error):
                raise UserError(f"{what}: {said}; correct the URL or the permissions") from error
            if n == tries:
                raise UserError(
                    f"{what}: failed {tries} times, last with {said}; "
                    "start again when server and network are well: it goes on from here"
                ) from error
        time.sleep(min(LONGEST_PAUSE_S, PAUSE_S * 2 ** (n - 1)) * SystemRandom().uniform(0.5, 1.0))
    raise AssertionError("there is at least one try")


def _final(error: Exception) -> bool:
    """Whether trying again is in vain."""
    status = getattr(error, "status", None) or getattr(error, "code", None)
    if isinstance(status, int) and status >= 400:
        return status < 500 and status not in (408, 425, 429)
    return isinstance(error, (FileNotFoundError, PermissionError, IsADirectoryError))


def _name(url: str) -> str:
    return url.partition("?")[0].rpartition("/")[2]
