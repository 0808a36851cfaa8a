"""dltrain data stats: what shards hold, from their indexes.

Shapes: N samples, S shards.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np

from dltrain.data.shards import Shards
from dltrain.data.tokens import STAMP
from dltrain.data.urls import plain
from dltrain.meter import human
from dltrain.progress import track

TEXT = ("txt", "text")
BLOCK = 4096
MOST = 40  # extensions, or classes, that are listed


def stats(pattern: list[str], pipe: bool) -> None:
    """Print it."""
    shards = Shards(pattern, on_error="skip", pipe=pipe)
    lengths: dict[str, list[np.ndarray]] = defaultdict(list)
    size = 0
    for index in track(shards.indexes(), "reading indexes", len(shards.urls)):
        size += index.size
        for number, extension in enumerate(index.extensions):
            lengths[extension].append(index.length[index.extension == number])
    length = {extension: np.concatenate(parts) for extension, parts in lengths.items()}
    payload = sum(int(of.sum()) for of in length.values())
    print(f"{len(shards):,} samples in {len(shards.urls):,} shards of {_spread(shards.counts_S)} samples")
    print(f"{human(size)}B, of which headers and padding of the tars are {1 - payload / max(1, size):.1%}")
    if shards.damage:
        print(f"{len(shards.damage):,} faults: see dltrain data verify")
    print("least - median - most, where they differ:")
    for extension in sorted(length, key=lambda e: -len(length[e]))[:MOST]:
        found = length[extension]
        print(f"  .{extension:<12} {len(found):>12,} of {_spread(found)} bytes, {human(int(found.sum()))}B")
    if len(length) > MOST:
        print(f"  ... {len(length):,} extensions in all")
    if hint := dotted(list(length)):
        print(hint)
    for extension in TEXT:
        if extension in length:
            print(f"  .{extension}: {sum(map(_letters, _members(shards, extension))):,} characters")
    if "cls" in length:
        _histogram(_members(shards, "cls"), class_names(shards.urls))


def _spread(values: np.ndarray) -> str:
    low, middle, high = (int(q) for q in np.quantile(values, (0, 0.5, 1))) if len(values) else (0, 0, 0)
    return f"{low:,}" if low == high else f"{low:,} - {middle:,} - {high:,}"


def dotted(extensions: list[str]) -> str:
    """A warning where names with dots seem to have torn samples apart or put several into one; otherwise empty."""
    inner = [e for e in extensions if "." in e and not e.endswith(STAMP)]
    last = Counter(e.rpartition(".")[2] for e in inner)
    odd = [e for e in inner if re.match(r"\d+\.", e) or last[e.rpartition(".")[2]] > 8]
    if not odd:
        return ""
    return (
        f"names with dots: the extension begins at the FIRST dot, so that NAME.{odd[0]} is .{odd[0]} of the sample "
        "NAME; if each is a sample of its own, write the shards anew without dots in NAME"
    )


def _members(shards: Shards, extension: str) -> Iterator[bytes]:
    """Of all samples that have one, and are whole."""
    length_N = shards.lengths(extension)
    having = np.flatnonzero(length_N >= 0)
    blocks = [having[start : start + BLOCK] for start in range(0, len(having), BLOCK)]
    for block in track(blocks, f"reading .{extension}, by {BLOCK} samples"):
        for found in shards.parts(block, extension, np.zeros_like(block), length_N[block]):
            if isinstance(found, bytes):
                yield found


def _letters(text: bytes) -> int:
    """Characters of UTF-8: bytes that do not continue one."""
    return int(((np.frombuffer(text, np.uint8) & 0xC0) != 0x80).sum())


def _histogram(labels: Iterable[bytes], names: list[str]) -> None:
    counts = Counter(label.decode(errors="replace").strip()[:40] for label in labels)
    print(f"{len(counts):,} classes of {_spread(np.array(list(counts.values())))} samples")
    widest = max(counts.values(), default=1)
    for label, count in sorted(counts.items(), key=lambda item: (len(item[0]), item[0]))[:MOST]:
        name = class_name(label, names)
        print(f"  {label:>6} {name:<24.24} {count:>10,} {'#' * max(1, 30 * count // widest)}")
    if len(counts) > MOST:
        print(f"  ... {len(counts):,} classes in all")


def class_names(urls: list[str]) -> list[str]:
    """Those in classes.txt beside the first shard, where `dltrain shards` puts it."""
    path = Path(urls[0]).with_name("classes.txt")
    return path.read_text("utf-8", "replace").splitlines() if plain(urls[0]) and path.exists() else []


def class_name(label: str, names: list[str]) -> str:
    """Of a .cls; empty if it is not known."""
    return names[int(label)] if label.isdecimal() and int(label) < len(names) else ""
