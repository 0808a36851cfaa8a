"""Shards of every make, and every way to damage one: what `test_corruption.py` runs on.

The truth comes from `tarfile` and from comparing bytes, not from our index.
"""

import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np

BLOCK = tarfile.BLOCKSIZE
FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
Spans = dict[str, tuple[int, int]]


def generator(*key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(key=list(key)))


def payload(draw: np.random.Generator) -> bytes:
    """Empty, small, a block to the byte, or some kilobytes."""
    size = int(draw.choice([0, 1, 511, 512, 513, int(draw.integers(2, 5000))]))
    return draw.bytes(size)


def key(draw: np.random.Generator, i: int, format: str) -> str:
    """Ascending with i; now and then in a folder, with a space, in another script, or longer than a header's field."""
    tails = ["", " b", "_x-y"]
    if format != "ustar":
        tails += ["é" * 7, "漢字", "k" * 120, "n/" * 60 + "z"]
    return f"{i:05d}{tails[int(draw.integers(len(tails)))]}"


def clean_shard(draw: np.random.Generator, path: Path) -> Spans:
    """A shard without damage; {key: (start, end)} of every sample."""
    if draw.random() < 0.2:
        return webdataset_shard(draw, path)
    format = str(draw.choice(list(FORMATS)))
    extensions = [["txt"], ["jpg", "cls"], ["seg.png", "json", "txt"]][int(draw.integers(3))]
    uneven, folders, meta = draw.random(3) < 0.25
    headers = {"comment": "global"} if format == "pax" and draw.random() < 0.3 else None
    with tarfile.open(path, "w", format=FORMATS[format], pax_headers=headers) as tar:
        if meta:
            add(tar, "__meta__/info.json", b"{}")
        for i in range(int(draw.integers(1 if headers else 0, 12))):
            if folders and draw.random() < 0.3:
                folder = tarfile.TarInfo(f"{i:05d}-folder")
                folder.type = tarfile.DIRTYPE
                tar.addfile(folder)
            if meta and draw.random() < 0.2:
                add(tar, str(draw.choice(["README", "__note__", f"__m{i}__/x.txt"])), b"not a sample")
            name = key(draw, i, format)
            for extension in extensions[: int(draw.integers(1, len(extensions) + 1)) if uneven else None]:
                add(tar, f"{name}.{extension.upper() if draw.random() < 0.1 else extension}", payload(draw))
        if folders and draw.random() < 0.5:
            link = tarfile.TarInfo("link")
            link.type, link.linkname = tarfile.SYMTYPE, "00000.txt"
            tar.addfile(link)
    return spans(path)


def webdataset_shard(draw: np.random.Generator, path: Path) -> Spans:
    from webdataset.writer import TarWriter

    with TarWriter(str(path)) as writer:
        for i in range(int(draw.integers(0, 12))):
            writer.write({"__key__": key(draw, i, "gnu"), "bin": payload(draw), "cls": i, "json": {"i": i}})
    return spans(path)


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def members(path: Path) -> list[tuple[str, int, int, int]]:
    """(key, start of its headers, start of its payload, padded end) of every member of a sample."""
    from webdataset.tariterators import base_plus_ext

    found = []
    with tarfile.open(path) as tar:
        for member in tar:
            name = base_plus_ext(member.name)[0]
            if member.isreg() and name and not name.startswith("__"):
                end = member.offset_data + member.size + -member.size % BLOCK
                found.append((name, member.offset, member.offset_data, end))
    return found


def spans(path: Path) -> Spans:
    """{key: (start, end)} with headers and padding, and with what lies before it that is no sample."""
    found: Spans = {}
    last = 0
    for name, _, _, end in members(path):
        found[name] = (found[name][0] if name in found else last, end)
        last = end
    return found


# --- damage ------------------------------------------------------------------------------------------------------

Edit = Callable[[np.random.Generator, bytearray], None]


def flip(draw: np.random.Generator, blob: bytearray) -> None:
    blob[int(draw.integers(len(blob)))] ^= 1 << int(draw.integers(8))


def zero(draw: np.random.Generator, blob: bytearray) -> None:
    """One block, which had something in it."""
    full = [at for at in range(0, len(blob), BLOCK) if any(blob[at : at + BLOCK])]
    at = full[int(draw.integers(len(full)))]
    blob[at : at + BLOCK] = bytes(BLOCK)


def cut(draw: np.random.Generator, blob: bytearray) -> None:
    del blob[int(draw.integers(len(blob))) :]


def cut_at_block(draw: np.random.Generator, blob: bytearray) -> None:
    del blob[int(draw.integers(len(blob) // BLOCK)) * BLOCK :]


def swap(draw: np.random.Generator, blob: bytearray) -> None:
    a, b = (int(at) * BLOCK for at in draw.choice(len(blob) // BLOCK, 2, replace=False))
    blob[a : a + BLOCK], blob[b : b + BLOCK] = blob[b : b + BLOCK], blob[a : a + BLOCK]


def scramble(draw: np.random.Generator, blob: bytearray) -> None:
    """A run of random bytes, across members."""
    at = int(draw.integers(len(blob)))
    size = min(int(draw.integers(1, 4000)), len(blob) - at)
    blob[at : at + size] = draw.bytes(size)


def insert(draw: np.random.Generator, blob: bytearray) -> None:
    """A block too many: all that follows has moved."""
    at = int(draw.integers(len(blob) // BLOCK)) * BLOCK
    blob[at:at] = draw.bytes(BLOCK)


def remove(draw: np.random.Generator, blob: bytearray) -> None:
    at = int(draw.integers(len(blob) // BLOCK)) * BLOCK
    del blob[at : at + BLOCK]


EDITS: list[Edit] = [flip, flip, flip, zero, cut, cut_at_block, swap, scramble, insert, remove]
