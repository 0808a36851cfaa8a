"""Compressed tars made plain: random access needs plain ones. gzip, bzip2, xz and Zstandard (`zstandard`, an extra)."""

import bz2
import lzma
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dltrain.errors import UserError

MAGIC = {"gzip": b"\x1f\x8b", "bzip2": b"BZh", "xz": b"\xfd7zXZ\0", "zstd": b"\x28\xb5\x2f\xfd"}
SUFFIXES = {
    **{".gz": "gzip", ".tgz": "gzip", ".bz2": "bzip2", ".tbz2": "bzip2", ".tbz": "bzip2"},
    **{".xz": "xz", ".txz": "xz", ".zst": "zstd", ".tzst": "zstd"},
}
PIECE = 16 << 10  # bytes decompressed at once: a damaged place is told this exactly


def codec_named(name: str) -> str | None:
    """The compression that a file name or URL speaks of, None for none."""
    return SUFFIXES.get(Path(name.partition("?")[0]).suffix.lower())


def codec_of(path: Path, name: str) -> str | None:
    """The compression of a file that is called `name`, None for none: what is in it counts, then the name."""
    with open(path, "rb") as file:
        head = file.read(262)
    if head[257:] == b"ustar":  # some servers decompress on the way
        return None
    return next((codec for codec, magic in MAGIC.items() if head.startswith(magic)), codec_named(name))


def decompressed(path: Path, codec: str, name: str) -> Iterator[bytes]:
    """The plain bytes of a file, which messages call `name`, in small pieces.

    Streams that follow each other (pigz, pbzip2, pzstd) are one, and zeros may pad them, as on a tape. UserError for
    data that is damaged or ends early, with the byte of the archive. (Zstandard's checksum is optional: libraries, not
    its command, may leave it out, and damage then shows in the tar or in a member's CRC at the latest.)
    """
    mend = "restore the archive from its source"
    stream: Any = None  # none begun, or the last one ended
    at = 0
    with open(path, "rb") as file:
        while piece := file.read(PIECE):
            while piece:
                if stream is None:
                    piece = piece.lstrip(b"\0")
                    if not piece:
                        break
                    stream = _decoder(codec, name)
                try:
                    plain = stream.decompress(piece)
                except Exception as error:  # each library has its own
                    raise UserError(f"{name}: damaged {codec} data near byte {at:,} ({error}); {mend}") from error
                yield plain
                piece, stream = (stream.unused_data, None) if stream.eof else (b"", stream)
            at = file.tell()
    if stream is not None or not at:
        raise UserError(f"{name}: the {codec} data ends at byte {at:,}, too early; {mend}")


def _decoder(codec: str, name: str) -> Any:
    """An object with decompress(), eof and unused_data."""
    if codec == "gzip":
        return zlib.decompressobj(wbits=31)
    if codec == "bzip2":
        return bz2.BZ2Decompressor()
    if codec == "xz":
        return lzma.LZMADecompressor()
    try:
        import zstandard
    except ImportError as error:
        raise UserError(f"{name} is compressed with Zstandard, which needs a package: pip install zstandard") from error
    return zstandard.ZstdDecompressor().decompressobj()
