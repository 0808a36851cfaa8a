"""Several random views of every image, and their colours: crops are of rows, jitter is of batches, on the device.

SimCLR's augmentation (Chen et al. 2020, https://arxiv.org/abs/2002.05709, appendix A). Whatever is drawn for a view is
a function of its key, so of (seed, epoch, row, view), and is drawn on the CPU.

Shapes: M rows of a micro-batch, V views of each, N = V M, view after view; R of them that are given one operation;
C = 3 channels, H height, W width. Images here are float32 in 0 ... 1.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.data.crops import Crop
from dltrain.data.decoded import DecodedRows
from dltrain.data.draws import fork, uniform
from dltrain.data.loader import Rows
from dltrain.data.shards import Shards
from dltrain.seeds import key

GREY = (0.299, 0.587, 0.114)  # ITU-R 601-2 luma


class ViewRows:
    """Several random crops of every image as rows of `loader.Rows`: `views` are rows of the same images, such as
    `ImageRows` or `CroppedRows`, that differ in their seed. `view_seed` gives one for each."""

    def __init__(self, views: Sequence[Rows]):
        self.views = views
        self.fingerprint = "/".join(rows.fingerprint for rows in views)

    def __len__(self) -> int:
        return len(self.views[0])

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Any]:
        """One micro-batch: images_NCHW (uint8) and keys_N of all views, view after view; and of the first view what
        concerns the rows: labels_B, weights_B, count, damaged."""
        batches = [rows.batch(epoch_M, index_M) for rows in self.views]
        images_NCHW, keys_N = (torch.cat([b.pop(name) for b in batches]) for name in ("images_BCHW", "keys_B"))
        return batches[0] | {"images_NCHW": images_NCHW, "keys_N": keys_N}


def view_seed(seed: int, view: int) -> int:
    return key("view", seed, view)


class CroppedRows(DecodedRows):
    """As `ImageRows` with a crop within the image, of small images that were resized to `size` pixels before."""

    def __init__(
        self, shards: Shards, size: int, crop: Crop, *, flip: float = 0.0, seed: int = 0,
        samples: np.ndarray | None = None,
    ):  # fmt: skip
        super().__init__(shards, size, flip=flip, seed=seed, samples=samples)
        self.crop, self.fingerprint = crop, f"{self.fingerprint} {crop}"

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Any]:
        batch = super().batch(epoch_M, index_M)
        images_BCHW = batch["images_BCHW"]
        side_M = np.full(len(index_M), images_BCHW.shape[-1])
        box_M4 = self.crop.boxes(batch["keys_B"].numpy().view(np.uint64), side_M, side_M)
        return batch | {"images_BCHW": enlarge(images_BCHW, torch.from_numpy(box_M4))}


def enlarge(images_BCHW: Tensor, box_B4: Tensor) -> Tensor:
    """A box (top, left, height, width) of every image at the size of the whole, bilinear; uint8 in and out."""
    B, _, H, W = images_BCHW.shape
    top, left, height, width = box_B4.float()[:, :, None].unbind(1)
    y_BH = (top + (torch.arange(H) + 0.5) / H * height) * (2 / H) - 1
    x_BW = (left + (torch.arange(W) + 0.5) / W * width) * (2 / W) - 1
    grid_BHW2 = torch.stack([x_BW[:, None, :].expand(B, H, W), y_BH[:, :, None].expand(B, H, W)], -1)
    cut = F.grid_sample(images_BCHW.float().contiguous(), grid_BHW2, padding_mode="border", align_corners=False)
    return cut.round().byte().contiguous(memory_format=torch.channels_last)


def colour_jitter(images_NCHW: Tensor, keys_N: Tensor, strength: float, chance: float = 0.8) -> Tensor:
    """Brightness, contrast, saturation and hue in a random order, on rows chosen with probability `chance`.

    `strength` is s: factors are uniform in 1 - 0.8 s ... 1 + 0.8 s (from 0 on), hues turn by up to 0.2 s of a circle.
    """
    key_N = fork(keys_N.cpu().numpy(), "jitter")
    order_N4 = uniform(key_N, "order", 4).argsort(1)
    order_N4[uniform(key_N, "whether", 1)[:, 0] >= chance] = -1
    amount_N4 = (2 * uniform(key_N, "amount", 4) - 1) * strength
    images_NCHW = images_NCHW.clone()
    for place in range(4):
        for o, op in enumerate(JITTERS):
            if len(row_R := np.flatnonzero(order_N4[:, place] == o)):
                rows = torch.from_numpy(row_R).to(images_NCHW.device)
                amount_R = torch.from_numpy(amount_N4[row_R, o]).float().to(images_NCHW.device)
                images_NCHW[rows] = op(images_NCHW[rows], amount_R[:, None, None, None])
    return images_NCHW


def brightness(x_RCHW: Tensor, amount_R111: Tensor) -> Tensor:
    return _blend(torch.zeros_like(amount_R111), x_RCHW, amount_R111)


def contrast(x_RCHW: Tensor, amount_R111: Tensor) -> Tensor:
    """Away from the image's mean grey, or towards it."""
    return _blend(_grey(x_RCHW).mean((1, 2, 3), keepdim=True), x_RCHW, amount_R111)


def saturation(x_RCHW: Tensor, amount_R111: Tensor) -> Tensor:
    return _blend(_grey(x_RCHW), x_RCHW, amount_R111)


def hue(x_RCHW: Tensor, amount_R111: Tensor) -> Tensor:
    """Each pixel's hue turned on the circle of hues, at the same saturation and value (of HSV)."""
    red, green, blue = x_RCHW.unbind(1)
    top_RHW, chroma_RHW = x_RCHW.amax(1), x_RCHW.amax(1) - x_RCHW.amin(1)
    span = chroma_RHW.clamp(min=1e-8)
    sixths_RHW = torch.where(
        top_RHW == red, (green - blue) / span,
        torch.where(top_RHW == green, 2 + (blue - red) / span, 4 + (red - green) / span),
    )  # fmt: skip
    sixths_RHW = sixths_RHW + 6 * 0.2 * amount_R111[:, 0]
    offset_C11 = torch.tensor([5.0, 3.0, 1.0], device=x_RCHW.device)[:, None, None]
    part_RCHW = (sixths_RHW[:, None] + offset_C11).remainder(6)
    less_RCHW = torch.minimum(part_RCHW, 4 - part_RCHW).clamp(0, 1)
    return top_RHW[:, None] - chroma_RHW[:, None] * less_RCHW


JITTERS: tuple[Callable[[Tensor, Tensor], Tensor], ...] = (brightness, contrast, saturation, hue)


def greyscale(images_NCHW: Tensor, keys_N: Tensor, chance: float = 0.2) -> Tensor:
    """Rows without colour, in all channels the luma, chosen with probability `chance`."""
    grey_NCHW = _grey(images_NCHW).expand_as(images_NCHW)
    return torch.where(_chosen(keys_N, "greyscale", chance), grey_NCHW, images_NCHW)


def blur(images_NCHW: Tensor, keys_N: Tensor, chance: float = 0.5) -> Tensor:
    """Gaussian blur, its standard deviation uniform in 0.1 ... 2 pixels, its kernel a tenth of the image."""
    N, C, H, W = images_NCHW.shape
    sigma_N1 = torch.from_numpy(0.1 + 1.9 * uniform(keys_N.cpu().numpy(), "sigma", 1)).float().to(images_NCHW.device)
    half = H // 20
    at_K = torch.arange(-half, half + 1, device=images_NCHW.device)
    kernel_NK = (-0.5 * (at_K / sigma_N1).square()).exp()
    kernel_NK = (kernel_NK / kernel_NK.sum(1, keepdim=True)).repeat_interleave(C, 0)
    padded = F.pad(images_NCHW, (half, half, half, half), mode="replicate").reshape(
        1, N * C, H + 2 * half, W + 2 * half
    )
    across = F.conv2d(padded, kernel_NK[:, None, None, :], groups=N * C)
    both = F.conv2d(across, kernel_NK[:, None, :, None], groups=N * C)
    return torch.where(_chosen(keys_N, "blur", chance), both.view_as(images_NCHW), images_NCHW)


def _chosen(keys_N: Tensor, what: str, chance: float) -> Tensor:
    chosen_N = torch.from_numpy(uniform(keys_N.cpu().numpy(), what, 1)[:, 0] < chance).to(keys_N.device)
    return chosen_N[:, None, None, None]


def _grey(x_RCHW: Tensor) -> Tensor:
    """[R, 1, H, W]"""
    red, green, blue = x_RCHW.split(1, dim=1)
    return GREY[0] * red + GREY[1] * green + GREY[2] * blue


def _blend(base: Tensor, x_RCHW: Tensor, amount_R111: Tensor) -> Tensor:
    """base + factor (x - base), the factor being 1 + 0.8 amount, cut to 0 ... 1."""
    return (base + (1 + 0.8 * amount_R111).clamp(min=0) * (x_RCHW - base)).clamp(0, 1)
