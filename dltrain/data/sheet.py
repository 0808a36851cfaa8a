"""Images to look at: a grid with captions, filters, or one after the other."""

import io
import math
from collections.abc import Sequence

import numpy as np

MARGIN, LINE = 4, 12  # pixels


def contact_sheet(images: Sequence[np.ndarray], captions: Sequence[str] = (), columns: int = 0) -> bytes:
    """PNG of uint8 [H, W, 3] images of any sizes, row by row on white, each above its caption, if there are any.

    `columns` is by default what makes the grid about square. A caption is cut to the width of its image.
    """
    from PIL import Image, ImageDraw, ImageFont

    assert images and (not captions or len(captions) == len(images)), (len(images), len(captions))
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    cell_height = max(len(image) for image in images) + MARGIN + (LINE if captions else 0)
    cell_width = max(image.shape[1] for image in images) + MARGIN
    lines = math.ceil(len(images) / columns)
    sheet = Image.new("RGB", (columns * cell_width + MARGIN, lines * cell_height + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for i, image in enumerate(images):
        y, x = i // columns * cell_height + MARGIN, i % columns * cell_width + MARGIN
        sheet.paste(Image.fromarray(np.ascontiguousarray(image)), (x, y))
        if captions:
            caption = captions[i]
            while caption and draw.textlength(caption, font=font) > cell_width - MARGIN:
                caption = caption[:-1]
            draw.text((x, y + len(image)), caption, fill="black", font=font)
    png = io.BytesIO()
    sheet.save(png, "PNG")
    return png.getvalue()


def animation(images: Sequence[np.ndarray], seconds: float) -> bytes:
    """GIF of uint8 [H, W, 3] images of one size, each shown for `seconds` (at least 0.02), again and again."""
    from PIL import Image

    first, *others = [Image.fromarray(image).quantize(64) for image in images]
    gif = io.BytesIO()
    first.save(gif, "GIF", save_all=True, append_images=others, duration=round(1000 * seconds), loop=0)
    return gif.getvalue()


def filter_sheet(filters_NCHW: np.ndarray, zoom: int = 8) -> bytes:
    """PNG of filters over C = 3 channels, each from its least value (black) to its greatest, a value `zoom` pixels."""
    low, high = (limit((1, 2, 3), keepdims=True) for limit in (filters_NCHW.min, filters_NCHW.max))
    bytes_NHWC = (255 * (filters_NCHW - low) / np.maximum(high - low, 1e-12)).astype(np.uint8).transpose(0, 2, 3, 1)
    return contact_sheet([image.repeat(zoom, 0).repeat(zoom, 1) for image in bytes_NHWC])
