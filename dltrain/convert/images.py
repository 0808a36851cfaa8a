"""Folders of images by class as sources of shards.

A sample has the image's bytes as they were found (.jpg, .png, .webp or .ppm, by what they are) and its class number
(.cls), counted over the sorted names of the classes.
"""

import io
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.convert.archive import Bad, Files, contents
from dltrain.convert.engine import Entry, Source, keys
from dltrain.data.pictures import BadImage, Picture, decoder
from dltrain.errors import UserError

SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".ppm"}
KINDS = {b"\xff\xd8": "jpg", b"\x89P": "png", b"RI": "webp", b"P6": "ppm", b"P5": "ppm"}  # by the first two bytes
QUALITY = 90  # of JPEGs that are made


def class_folders(
    source: Path,
    found: Files,
    work: Path,
    *,
    split: str = "",
    size: int = 0,
    classes: Sequence[str] = (),
    prefix: str = "images",
) -> Source:
    """Images in `CLASS/` or `SPLIT/CLASS/`, or in no folder: then they have no class.

    `size`: resize the shorter side to it, where it is longer (0: keep the bytes). `classes`: count these instead.
    """
    if size < 0:
        raise UserError(f"--size {size}: give the pixels of the shorter side, or leave it out")
    listed = contents(source, found, work)
    images = {name: span for name, span in listed.items() if Path(name).suffix.lower() in SUFFIXES}
    ignored = [name for name in listed if name not in images]
    parts = {name: name.split("/") for name in images}
    splits = sorted({"/".join(part[:-2]) for part in parts.values()})
    if split:
        chosen = {each for each in splits if split in (each, each.rpartition("/")[2])}
        if len(chosen) != 1:
            raise UserError(f"{source} has no split {split}; --split can be {some(splits)}")
    elif len(splits) > 1:
        raise UserError(f"{source} has several splits (folders of class folders); choose one: --split {some(splits)}")
    else:
        chosen = set(splits)
    # Numbers are the same for every split: a class may lack images in one.
    names = sorted({part[-2] for part in parts.values() if len(part) > 1})
    parts = {name: part for name, part in parts.items() if "/".join(part[:-2]) in chosen}
    if names and (flat := [name for name, part in parts.items() if len(part) == 1]):
        raise UserError(f"{source}: {len(flat)} images lie beside the class folders, such as {flat[0]}; move them")
    number = class_numbers(names, classes, source)
    made = [
        Entry(key, f"{source.name}: {name}", images[name], number[parts[name][-2]] if names else -1)
        for name, key in zip(parts, keys(parts))
    ]
    name = next(iter(chosen), "").rpartition("/")[2] or prefix
    return image_source(re.sub(r"[^\w-]", "_", name), made, list(number), size, ignored)


def image_source(
    prefix: str, entries: list[Entry], classes: list[str], size: int, ignored: Sequence[str] = ()
) -> Source:
    make = partial(_image, size=size, decoder=decoder())
    return Source(prefix, entries, make, classes, ignored, f"JPEG by {pillow()}" if size else "")


def some(names: Sequence[str]) -> str:
    shown = ", ".join(name or "(none)" for name in names[:9])
    return shown + (f" ... ({len(names)} in all)" if len(names) > 9 else "")


def class_numbers(names: Sequence[str], classes: Sequence[str], source: Path) -> dict[str, int]:
    number = {name: i for i, name in enumerate(classes or names)}
    if unknown := [name for name in names if name not in number]:
        raise UserError(f"{source}: the class {unknown[0]} is not one of the {len(number)} of --classes")
    return number if names else {}


def read_classes(path: Path) -> list[str]:
    """One name a line, as in classes.txt."""
    try:
        names = path.read_text("utf-8", "surrogateescape").splitlines()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from error
    if not names or len(set(names)) < len(names) or not all(names):
        raise UserError(f"{path}: give one class name a line, none of them empty or twice")
    return names


def _image(entry: Entry, size: int, decoder: Any) -> dict[str, Any]:
    """The image is decoded, so that one that is broken is known by its name now and not during training."""
    data = entry.span.read()
    kind = KINDS.get(data[:2])
    try:
        if not kind:
            raise BadImage("it is no JPEG, PNG, WebP or PPM" if data else "it is empty")
        if not size:
            Picture(data, decoder).decode(8 if kind == "jpg" else 1)  # all bytes are read, an eighth of the work done
        else:
            pixel_HWC = Picture(data, "pillow").decode()
            if min(pixel_HWC.shape[:2]) > size:
                data, kind = _resized(pixel_HWC, size), "jpg"
    except BadImage as error:
        raise Bad(f"{entry.name}: {error}") from error
    return {kind: data} | ({"cls": str(entry.cls)} if entry.cls >= 0 else {})


def _resized(pixel_HWC: np.ndarray, size: int) -> bytes:
    from PIL import Image

    scale = size / min(pixel_HWC.shape[:2])
    height, width = (max(size, round(side * scale)) for side in pixel_HWC.shape[:2])
    image = Image.fromarray(pixel_HWC).resize((width, height), Image.Resampling.BICUBIC)
    image.save(out := io.BytesIO(), "JPEG", quality=QUALITY)
    return out.getvalue()


def png(pixel_HW: np.ndarray) -> bytes:
    """Greyscale [H, W] or RGB [H, W, 3]."""
    from PIL import Image

    Image.fromarray(pixel_HW).save(out := io.BytesIO(), "PNG")
    return out.getvalue()


def pillow() -> str:
    decoder()  # or what to install
    import PIL

    return f"Pillow {PIL.__version__}"
