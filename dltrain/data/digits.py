"""Images that are wherever Pillow is, to try a recipe on: digits in its own font, at any place, in any colours."""

import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.data.cache import built, cache_dir
from dltrain.data.shards import write_shards
from dltrain.seeds import key

VERSION, SIDE, COUNT = 1, 32, {"train": 1000, "test": 200}


def digits(split: str) -> str:
    """Pattern of shards with 1,000 ("train") or 200 ("test") digits of 32 x 32 pixels, made on first use."""

    def build(folder: Path) -> None:
        write_shards(_samples(split), folder, split, COUNT[split])

    return str(built(cache_dir() / f"digits-{split}-{VERSION}", build))


def _samples(split: str) -> Iterator[dict[str, Any]]:
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(22)
    for i in range(COUNT[split]):
        random = np.random.Generator(np.random.Philox(key=key("digits", split, i)))
        paper, ink = (tuple(int(c) for c in random.integers(low, low + 100, 3)) for low in (0, 150))
        image = Image.new("RGB", (SIDE, SIDE), paper)
        x, y = (int(v) for v in random.integers(0, (16, 8)))
        ImageDraw.Draw(image).text((x, y), str(i % 10), fill=ink, font=font)
        png = io.BytesIO()
        image.save(png, "PNG")
        yield {"__key__": f"{i:04d}", "png": png.getvalue(), "cls": str(i % 10)}
