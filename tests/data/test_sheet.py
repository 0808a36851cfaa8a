"""A contact sheet has every image where the grid says."""

import io

import numpy as np
from PIL import Image

from dltrain.data.sheet import LINE, MARGIN, contact_sheet


def opened(png: bytes) -> np.ndarray:
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return np.asarray(image)


def test_images_are_in_the_grid():
    images = [np.full((20 + i, 30, 3), 10 * i, np.uint8) for i in range(7)]
    sheet = opened(contact_sheet(images))
    assert sheet.shape == (3 * (26 + MARGIN) + MARGIN, 3 * (30 + MARGIN) + MARGIN, 3)
    for i, image in enumerate(images):
        y, x = i // 3 * (26 + MARGIN) + MARGIN, i % 3 * (30 + MARGIN) + MARGIN
        np.testing.assert_array_equal(sheet[y : y + len(image), x : x + 30], image)
    assert (sheet[:MARGIN] == 255).all() and (sheet[-20:, -20:] == 255).all()


def test_captions_stay_below_their_images():
    images = [np.full((40, 40, 3), 200, np.uint8)] * 2
    sheet = opened(contact_sheet(images, ["cat", "a caption that is much too long"], columns=2))
    assert sheet.shape == (40 + LINE + 2 * MARGIN, 2 * (40 + MARGIN) + MARGIN, 3)
    below = sheet[MARGIN + 40 : MARGIN + 40 + LINE].min(2)
    assert (below[:, MARGIN : MARGIN + 40] < 128).any()
    assert (below[:, MARGIN + 40 : 2 * MARGIN + 40] > 128).all() and (below[:, 2 * MARGIN + 80 :] > 128).all()
