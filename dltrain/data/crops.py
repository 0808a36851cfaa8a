"""Which part of an image a row shows: boxes (top, left, height, width) in pixels, to be resized to a square.

A box may reach over the edges of the image; what is outside is black.

Shapes: M rows, T tries.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np

from dltrain.data.draws import uniform


class Crop(Protocol):
    """Its repr is part of the fingerprint of the rows."""

    def boxes(self, key_M: np.ndarray, height_M: np.ndarray, width_M: np.ndarray) -> np.ndarray:
        """`draws.row_keys` and sizes of M images -> int64 [M, 4]."""
        ...


@dataclass(frozen=True)
class RandomResizedCrop:
    """Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, section 6: a part of the area and a ratio, both at random.

    Area uniform, log of width/height uniform; after ten that do not fit, the largest central box of an allowed ratio.
    """

    area: tuple[float, float] = (0.08, 1.0)  # of the image
    ratio: tuple[float, float] = (3 / 4, 4 / 3)  # width / height

    TRIES = 10

    def boxes(self, key_M: np.ndarray, height_M: np.ndarray, width_M: np.ndarray) -> np.ndarray:
        u_MT4 = uniform(key_M, "crop", self.TRIES * 4).reshape(len(key_M), self.TRIES, 4)
        low, high = np.log(self.ratio)
        ratio_MT = np.exp(low + u_MT4[..., 0] * (high - low))
        part_MT = self.area[0] + u_MT4[..., 1] * (self.area[1] - self.area[0])
        area_MT = part_MT * (height_M * width_M)[:, None]
        h_MT, w_MT = np.rint(np.sqrt(area_MT / ratio_MT)), np.rint(np.sqrt(area_MT * ratio_MT))
        fits_MT = (h_MT >= 1) & (w_MT >= 1) & (h_MT <= height_M[:, None]) & (w_MT <= width_M[:, None])
        row_M, first_M = np.arange(len(key_M)), fits_MT.argmax(1)
        h_M, w_M, u_M4 = h_MT[row_M, first_M], w_MT[row_M, first_M], u_MT4[row_M, first_M]
        top_M, left_M = np.floor(u_M4[:, 2] * (height_M - h_M + 1)), np.floor(u_M4[:, 3] * (width_M - w_M + 1))
        box_M4 = np.stack([top_M, left_M, h_M, w_M], 1)
        if (none_M := ~fits_MT.any(1)).any():
            h_M = np.minimum(height_M, np.maximum(1, np.rint(width_M / self.ratio[0])))
            w_M = np.minimum(width_M, np.maximum(1, np.rint(height_M * self.ratio[1])))
            box_M4[none_M] = np.stack([(height_M - h_M) // 2, (width_M - w_M) // 2, h_M, w_M], 1)[none_M]
        return box_M4.astype(np.int64)


@dataclass(frozen=True)
class CentreCrop:
    """The central square, its side a part of the shorter side: resize to 256 and crop 224, in one resize."""

    part: float = 224 / 256

    def boxes(self, key_M: np.ndarray, height_M: np.ndarray, width_M: np.ndarray) -> np.ndarray:
        side_M = np.maximum(1, np.rint(self.part * np.minimum(height_M, width_M))).astype(np.int64)
        return np.stack([(height_M - side_M) // 2, (width_M - side_M) // 2, side_M, side_M], 1)


@dataclass(frozen=True)
class PadAndCrop:
    """He et al. 2015, https://arxiv.org/abs/1512.03385, section 4.2: pad each side, then crop the original size."""

    pad: int = 4  # pixels

    def boxes(self, key_M: np.ndarray, height_M: np.ndarray, width_M: np.ndarray) -> np.ndarray:
        shift_M2 = np.floor(uniform(key_M, "crop", 2) * (2 * self.pad + 1)).astype(np.int64) - self.pad
        return np.concatenate([shift_M2, np.stack([height_M, width_M], 1)], 1)
