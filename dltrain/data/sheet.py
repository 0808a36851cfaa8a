"""Images to look at: a grid with captions."""

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
