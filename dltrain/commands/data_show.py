"""dltrain data show: samples as people see them."""

import io
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.commands.data_stats import class_name, class_names
from dltrain.data.images import EXTENSIONS
from dltrain.data.order import Order
from dltrain.data.pictures import BadImage, Picture, decoder
from dltrain.data.shards import Shards
from dltrain.data.sheet import contact_sheet
from dltrain.errors import UserError
from dltrain.files import write_atomic
from dltrain.seeds import key
from dltrain.tokenizers.spm import Tokenizer, load

SIDES = 96, 256  # pixels: smaller images are shown larger, larger ones smaller
LETTERS = 600  # of a text


def show(pattern: list[str], pipe: bool, n: int, out: str, seed: int, tokenizer: str | None) -> None:
    """Print texts and tokens, write images to `out`. UserError if it cannot be written."""
    shards = Shards(pattern, on_error="skip", pipe=pipe)
    if n < 1 or not len(shards):
        raise UserError(f"{n} samples of {len(shards)} are none to show; give --n and shards that have some")
    spm = load(Path(tokenizer)) if tokenizer else None
    names = class_names(shards.urls)
    images: list[np.ndarray] = []
    captions: list[str] = []
    for i in Order(len(shards), key("show", seed)).at(np.arange(min(n, len(shards))))[1].tolist():
        sample = shards[i]
        caption = _caption(sample, names)
        if "__damage__" in sample:
            print(sample["__damage__"], file=sys.stderr)
        elif encoded := next((sample[extension] for extension in EXTENSIONS if extension in sample), None):
            try:
                images.append(thumbnail(encoded))
                captions.append(caption)
            except BadImage as error:
                print(shards.broken(i, str(error)), file=sys.stderr)
        else:
            print(f"{shards.name(i)}{'  ' if caption else ''}{caption}")
            print(textwrap.indent(_words(sample, spm), "  "))
    if images:
        try:
            write_atomic(Path(out), contact_sheet(images, captions))
        except OSError as error:
            raise UserError(f"cannot write {out}: {error.strerror}; choose another --out") from error
        print(f"{out}: {len(images)} images")


def _caption(sample: dict[str, Any], names: list[str]) -> str:
    label = _text(sample.get("cls", b"")).strip()
    return class_name(label, names) or label


def thumbnail(encoded: bytes) -> np.ndarray:
    """uint8 [H, W, 3]. BadImage if it cannot be decoded."""
    small, large = SIDES
    picture = Picture(encoded, decoder())
    side = max(picture.height, picture.width)
    pixels_HWC = picture.decode(next(shrink for shrink in (8, 4, 2, 1) if shrink == 1 or side >= shrink * large))
    side = max(pixels_HWC.shape[:2])
    scale = min(1.0, large / side) * max(1, small // side)
    y, x = (np.arange(max(1, round(n * scale))) * n // max(1, round(n * scale)) for n in pixels_HWC.shape[:2])
    return pixels_HWC[y][:, x]


def _words(sample: dict[str, Any], tokenizer: Tokenizer | None) -> str:
    width = shutil.get_terminal_size().columns - 4
    lines = []
    for extension, content in sample.items():
        if extension.startswith("__") or extension == "cls":
            continue
        if extension in ("txt", "text", "json"):
            text = _text(content)
            more = f" ... ({len(text):,} characters)" if len(text) > LETTERS else ""
            paragraphs = (text[:LETTERS] + more).splitlines()
            lines += [line for part in paragraphs for line in textwrap.wrap(part, width) or [""]]
        elif extension == "npy":
            lines += textwrap.wrap(_tokens(content, tokenizer), width)
        else:
            lines.append(f".{extension}: {len(content):,} bytes")
    return "\n".join(lines)


def _tokens(content: bytes, tokenizer: Tokenizer | None) -> str:
    try:
        array = np.load(io.BytesIO(content), allow_pickle=False)
    except ValueError as error:
        return f".npy: not readable ({error})"
    if array.ndim != 1 or array.dtype.kind not in "iu" or not array.size:
        return f".npy: {list(array.shape)} {array.dtype}"
    told = f".npy: {array.size:,} tokens, {array.dtype}, {array.min()} ... {array.max()}"
    if not tokenizer:
        return told
    if array.max() >= tokenizer.vocab_size:
        raise UserError(f"a sample has token {array.max()}, --tokenizer {tokenizer.vocab_size}; give the one it is of")
    return f"{told}: {_text(tokenizer.decode(array[:LETTERS].tolist()).encode())[:LETTERS]}"


def _text(content: bytes) -> str:
    """Without what would command the terminal."""
    text = content.decode(errors="replace")
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)
