"""Small images, decoded once and kept in memory: a row costs a copy, and can still be shifted and mirrored at random.

Shapes: N images, M rows of a micro-batch, C = 3 channels, S pixels of a side, P pixels of padding.
"""

import hashlib
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dltrain.data.cache import built, cache_dir
from dltrain.data.crops import CentreCrop, PadAndCrop
from dltrain.data.draws import row_keys, uniform
from dltrain.data.images import ImageRows
from dltrain.data.shards import Shards
from dltrain.progress import track

VERSION = 1
AT_ONCE = 1000  # images


class DecodedRows:
    """As `ImageRows` with `PadAndCrop(pad)`, the same bytes, of images that were resized to `size` pixels before.

    `alternate`: mirrored in every second epoch, and in which is random, rather than at random in each; Jordan 2024,
    https://arxiv.org/abs/2404.00498, section 3.6. `samples`: numbers of the images to use, by default all.
    The decoded images lie in the cache, 3 S^2 bytes each; shards must be read with on_error="raise".
    """

    def __init__(
        self,
        shards: Shards,
        size: int,
        *,
        pad: int = 0,
        flip: float = 0.0,
        alternate: bool = False,
        seed: int = 0,
        samples: np.ndarray | None = None,
    ):
        rows = ImageRows(shards, size, CentreCrop(1.0))
        digest = hashlib.sha256(f"{VERSION} {rows.fingerprint}".encode()).hexdigest()
        folder = built(cache_dir() / f"decoded-{digest[:24]}", lambda folder: _decode(rows, folder))
        self.samples = np.arange(len(rows)) if samples is None else np.asarray(samples, np.int64)
        self.image_NSSC = np.load(folder / "images.npy", mmap_mode="r")
        self.label_N = np.load(folder / "labels.npy")
        self.pad, self.flip, self.alternate, self.seed = pad, flip, alternate, seed
        parts = (rows.fingerprint, self.samples.tobytes(), pad, flip, alternate, seed)
        self.fingerprint = hashlib.sha256(repr(parts).encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.samples)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Any]:
        """One micro-batch, by the names of `ImageRows.batch`."""
        real_M = index_M >= 0
        key_M, number_M = row_keys(self.seed, epoch_M, index_M), self.samples[index_M]
        image_MSSC = self.image_NSSC[number_M]
        image_MSSC[~real_M] = 0
        if self.pad:
            image_MSSC = self._shifted(image_MSSC, key_M)
        mirrored_M = uniform(key_M, "flip", 1)[:, 0] < self.flip
        if self.alternate:
            first_M = row_keys(self.seed, np.zeros_like(epoch_M), index_M)
            mirrored_M = (uniform(first_M, "flip", 1)[:, 0] < 0.5) ^ (epoch_M % 2 == 1)
        image_MSSC[mirrored_M] = image_MSSC[mirrored_M, :, ::-1]
        return {
            "images_BCHW": torch.from_numpy(image_MSSC).permute(0, 3, 1, 2),
            "labels_B": torch.from_numpy(np.where(real_M, self.label_N[number_M], 0)),
            "weights_B": torch.from_numpy(real_M.astype(np.float32)),
            "keys_B": torch.from_numpy(key_M.view(np.int64)),
            "count": torch.tensor(int(real_M.sum())),
        }

    def _shifted(self, image_MSSC: np.ndarray, key_M: np.ndarray) -> np.ndarray:
        size, pad = image_MSSC.shape[1], self.pad
        side_M = np.full(len(key_M), size)
        top_M, left_M, _, _ = (PadAndCrop(pad).boxes(key_M, side_M, side_M) + pad).T
        padded = np.pad(image_MSSC, ((0, 0), (pad, pad), (pad, pad), (0, 0)))
        windows = np.lib.stride_tricks.sliding_window_view(padded, (size, size), (1, 2))  # [M, 2P + 1, 2P + 1, C, S, S]
        return np.ascontiguousarray(windows[np.arange(len(key_M)), top_M, left_M].transpose(0, 2, 3, 1))


def _decode(rows: ImageRows, folder: Path) -> None:
    image_NSSC = np.empty((len(rows), rows.size, rows.size, 3), np.uint8)
    label_N = np.empty(len(rows), np.int64)
    for start in track(range(0, len(rows), AT_ONCE), "decoding images, thousands"):
        index_M = np.arange(start, min(start + AT_ONCE, len(rows)))
        batch = rows.batch(np.zeros_like(index_M), index_M)
        image_NSSC[index_M], label_N[index_M] = batch["images_BCHW"].permute(0, 2, 3, 1).numpy(), batch["labels_B"]
    np.save(folder / "images.npy", image_NSSC)
    np.save(folder / "labels.npy", label_N)
