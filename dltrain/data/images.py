"""Micro-batches of images from shards: decode, crop, resize, mirror; what follows is for `augment`, on the device.

Resizing is bilinear with antialias, by torch's kernel for uint8 in channels-last order: it takes a quarter of the time
of Pillow's, of which it differs by at most 2 of 255, and its weights are 16-bit integers, so the bits do not depend on
the CPU's vector instructions or the number of threads.

Shapes: M rows of a micro-batch, of which K have an image; H height, W width, C = 3 channels.
"""

import hashlib
import threading
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dltrain.data.crops import Crop
from dltrain.data.draws import row_keys, uniform
from dltrain.data.index import Damage
from dltrain.data.pictures import BadImage, Decoder, Picture, decoder
from dltrain.data.shards import Shards

EXTENSIONS = ("jpg", "jpeg", "png", "webp", "ppm")
# A JPEG is decoded at 1/2, 1/4 or 1/8 where that leaves the crop this many times the pixels, in height and width, that
# it is resized to. At 2 (Pillow's advice for its `reducing_gap`) photographs differ by 0.3 of 255 in the mean and 13 at
# most from the same box cut out of the whole image; at 1 by 1.1 and 46.
SHARP = 2.0
HUGE = 1 << 22  # bytes from which on numpy asks Linux for huge pages: only what is written becomes real
_kept = threading.local()  # see `_decoded_to`


class ImageRows:
    """Rows of `loader.Rows` from samples with an image (.jpg, .jpeg, .png, .webp or .ppm) and a .cls in decimal.

    A sample that is damaged, undecodable or without a label raises UserError or becomes a row of weight 0, as the
    shards' `on_error` says; one that the shards have substituted counts.
    """

    def __init__(
        self,
        shards: Shards,
        size: int,
        crop: Crop,
        *,
        flip: float = 0.0,
        seed: int = 0,
        samples: np.ndarray | None = None,
    ):
        """`crop` (see `crops`) resized to `size` pixels, mirrored with probability `flip`; `samples`: numbers of those
        to use, by default all. UserError if Pillow is not installed."""
        self.shards, self.size, self.crop, self.flip, self.seed = shards, size, crop, flip, seed
        self.samples = np.arange(len(shards)) if samples is None else np.asarray(samples, np.int64)
        self.decoder: Decoder = decoder()
        parts = (shards.fingerprint, self.samples.tobytes(), self.decoder, SHARP, size, crop, flip, seed)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Any]:
        """One micro-batch:

        images_BCHW  uint8 [M, 3, size, size], channels last in memory
        labels_B     int64 [M]
        weights_B    float32 [M], 1, or 0 for padding and damage
        keys_B       int64 [M], where the rows' other random numbers come from
        count        int64 [], sum of the weights
        damaged      list of Damage, if there is any
        """
        image_MCHW = empty(len(index_M), self.size)
        label_M, weight_M = np.zeros(len(index_M), np.int64), np.zeros(len(index_M), np.float32)
        key_M = row_keys(self.seed, epoch_M, index_M)
        damaged: list[Damage] = []

        wanted = np.flatnonzero(index_M >= 0)
        number_M = np.where(index_M >= 0, self.samples[index_M], -1)
        row_K, height_K, width_K = [], [], []
        pictures: list[Picture] = []
        for m, sample in zip(wanted.tolist(), self.shards.stream([number_M[wanted]])):
            if "__damage__" in sample:
                damaged.append(sample["__damage__"])
                if not any(extension in sample for extension in EXTENSIONS):
                    continue
            try:
                label_M[m] = _label_of(sample)
                picture = Picture(_image_of(sample), self.decoder)
            except BadImage as error:
                damaged.append(self.shards.broken(int(number_M[m]), str(error)))
                continue
            pictures.append(picture)
            row_K.append(m)
            height_K.append(picture.height)
            width_K.append(picture.width)

        sizes = np.array(height_K, np.int64), np.array(width_K, np.int64)
        box_K4 = self.crop.boxes(key_M[np.array(row_K, np.int64)], *sizes)
        mirrored = (uniform(key_M, "flip", 1)[:, 0] < self.flip).tolist()
        places = image_MCHW.split(1)
        buffer = _decoded_to(3 * int((sizes[0] * sizes[1]).max(initial=0)))
        for m, picture, box in zip(row_K, pictures, box_K4.tolist()):
            try:
                cut(picture, box, self.size, mirrored[m], places[m], buffer)
                weight_M[m] = 1.0
            except BadImage as error:
                damaged.append(self.shards.broken(int(number_M[m]), str(error)))
        for m in np.flatnonzero(weight_M == 0).tolist():
            places[m].zero_()

        batch: dict[str, Any] = {
            "images_BCHW": image_MCHW,
            "labels_B": torch.from_numpy(np.where(weight_M > 0, label_M, 0)),
            "weights_B": torch.from_numpy(weight_M),
            "keys_B": torch.from_numpy(key_M.view(np.int64)),
            "count": torch.tensor(int(weight_M.sum())),
        }
        return batch | ({"damaged": damaged} if damaged else {})


def blank(size: int) -> dict[str, Tensor]:
    """A batch of one row of padding, by the names of `ImageRows.batch`; without keys, which nothing is drawn from."""
    found = {"images_BCHW": empty(1, size).zero_(), "labels_B": torch.zeros(1, dtype=torch.int64)}
    return found | {"weights_B": torch.zeros(1), "count": torch.tensor(0)}


def _decoded_to(size: int) -> np.ndarray:
    """At least `size` bytes that a thread keeps: new memory for every batch would cost a twentieth of its time."""
    if not hasattr(_kept, "buffer") or len(_kept.buffer) < size:
        _kept.buffer = np.empty(max(size, HUGE), np.uint8)
    return _kept.buffer


def _image_of(sample: dict[str, Any]) -> bytes:
    for extension in EXTENSIONS:
        if extension in sample:
            return sample[extension]
    raise BadImage(f"no image: none of .{', .'.join(EXTENSIONS)}")


def _label_of(sample: dict[str, Any]) -> int:
    label = -1
    try:
        label = int(sample["cls"])
    except KeyError:
        raise BadImage("no label: there is no .cls") from None
    except ValueError:
        pass
    if not 0 <= label < 1 << 31:
        raise BadImage(f"its label .cls is {bytes(sample['cls'])[:20]!r}, not a number from 0")
    return label


def empty(m: int, size: int) -> Tensor:
    """uint8 [m, C, size, size], channels last in memory. By numpy, which asks Linux for huge pages; torch does not."""
    return torch.from_numpy(np.empty((m, size, size, 3), np.uint8)).permute(0, 3, 1, 2)


def cut(
    picture: Picture, box: list[int], size: int, mirrored: bool, out_1CHW: Tensor, buffer: np.ndarray | None = None
) -> None:
    """Decode a picture and put `box` (top, left, height, width) into [1, C, size, size]; see `decode` and `resize`.

    What the box holds beyond the edges is black. Where a JPEG is decoded at 1/2, 1/4 or 1/8, the sides of the box move
    to multiples of 2, 4 or 8 pixels. BadImage if it cannot be decoded.
    """
    top, left, height, width = box
    below, right = top + height, left + width
    shrink, enough = 1, 2 * SHARP * size
    while shrink < 8 and height >= shrink * enough and width >= shrink * enough:
        shrink *= 2
    pixels_HWC = picture.decode(shrink, buffer)
    if shrink > 1 and len(pixels_HWC) < picture.height:
        top, left, below, right = (round(side / shrink) for side in (top, left, below, right))
    if top >= 0 and left >= 0 and below <= pixels_HWC.shape[0] and right <= pixels_HWC.shape[1]:
        part_HWC = pixels_HWC[top:below, left:right]
    else:
        part_HWC = np.zeros((below - top, right - left, 3), np.uint8)
        inside_HWC = pixels_HWC[max(top, 0) : max(below, 0), max(left, 0) : max(right, 0)]
        y, x = max(-top, 0), max(-left, 0)
        part_HWC[y : y + inside_HWC.shape[0], x : x + inside_HWC.shape[1]] = inside_HWC
    resize(part_HWC, size, mirrored, out_1CHW)


def resize(part_HWC: np.ndarray, size: int, mirrored: bool, out_1CHW: Tensor) -> None:
    """uint8 [H, W, 3] to [1, 3, size, size], which is channels last in memory."""
    part = torch.from_numpy(part_HWC)
    part_1CHW = (part.flip(1) if mirrored else part).permute(2, 0, 1)[None]
    if part_HWC.shape[:2] == (size, size):
        out_1CHW.copy_(part_1CHW)
    else:  # what F.interpolate calls, and that has no `out`: the copy would be a tenth of the whole
        torch._C._nn._upsample_bilinear2d_aa(part_1CHW, (size, size), False, out=out_1CHW)  # type: ignore[attr-defined]
