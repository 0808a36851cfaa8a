"""Augmentation of whole micro-batches, on the device where they are: pure functions of images and random numbers.

A row's own draws come from its key (`ImageRows.batch`'s keys_B), so they do not depend on the rows beside it, the size
of the micro-batch or the number of processes. `mixup` and `cutmix` pair the rows of a micro-batch and take a numpy
generator, `draws.generator(keys_B.numpy(), "mixup")` for one that belongs to the micro-batch. Draws are made on the
CPU: keys on a GPU are waited for.

Shapes: B rows, R of them that are given one operation, C = 3 channels, H height, W width, K classes, N operations.
"""

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from dltrain.data.crops import RandomResizedCrop
from dltrain.data.draws import fork, uniform

# Of ImageNet's training images in [0, 1], as everybody uses them.
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def normalise(
    images_BCHW: Tensor, mean: Sequence[float] = IMAGENET_MEAN, std: Sequence[float] = IMAGENET_STD
) -> Tensor:
    """uint8 0 ... 255 -> float32 (x / 255 - mean) / std; `mean` and `std` per channel, of values in [0, 1]."""
    mean_C11 = torch.tensor(mean, device=images_BCHW.device)[:, None, None]
    std_C11 = torch.tensor(std, device=images_BCHW.device)[:, None, None]
    return (images_BCHW.float() - 255 * mean_C11) / (255 * std_C11)


def flip(images_BCHW: Tensor, chosen_B: Tensor) -> Tensor:
    """Mirror the chosen rows left to right."""
    return torch.where(chosen_B[:, None, None, None], images_BCHW.flip(-1), images_BCHW)


def mixup(
    images_BCHW: Tensor, targets_BK: Tensor, weights_B: Tensor, alpha: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Zhang et al. 2017, https://arxiv.org/abs/1710.09412, section 2: (images, targets), both floating point.

    One lambda ~ Beta(alpha, alpha) for all rows, partners by a permutation. Rows of weight 0 are nobody's partner.
    """
    part = random.beta(alpha, alpha)
    partner_B = _partners(weights_B, random)
    return (
        part * images_BCHW + (1 - part) * images_BCHW[partner_B],
        part * targets_BK + (1 - part) * targets_BK[partner_B],
    )


def cutmix(
    images_BCHW: Tensor, targets_BK: Tensor, weights_B: Tensor, alpha: float, random: np.random.Generator
) -> tuple[Tensor, Tensor]:
    """Yun et al. 2019, https://arxiv.org/abs/1905.04899, section 3.1: (images, targets), the targets floating point.

    One box for all rows, of a part 1 - lambda of the area, lambda ~ Beta(alpha, alpha), its centre uniform in the
    image; targets mix by what is left of it within the edges.
    """
    H, W = images_BCHW.shape[-2:]
    side = math.sqrt(1 - random.beta(alpha, alpha))
    y, x = random.uniform(0, H), random.uniform(0, W)
    top, below = max(0, round(y - side * H / 2)), min(H, round(y + side * H / 2))
    left, right = max(0, round(x - side * W / 2)), min(W, round(x + side * W / 2))
    partner_B = _partners(weights_B, random)
    mixed_BCHW = images_BCHW.clone()
    mixed_BCHW[..., top:below, left:right] = images_BCHW[partner_B, :, top:below, left:right]
    part = 1 - (below - top) * (right - left) / (H * W)
    return mixed_BCHW, part * targets_BK + (1 - part) * targets_BK[partner_B]


def _partners(weights_B: Tensor, random: np.random.Generator) -> Tensor:
    """A permutation, but rows that would meet one of weight 0 stay alone."""
    partner_B = torch.from_numpy(random.permutation(len(weights_B))).to(weights_B.device)
    return torch.where(weights_B[partner_B] > 0, partner_B, torch.arange(len(weights_B), device=weights_B.device))


def random_erasing(
    images_BCHW: Tensor,
    keys_B: Tensor,
    probability: float = 0.5,
    area: tuple[float, float] = (0.02, 0.4),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
    fill: float = 0.0,
) -> Tensor:
    """Zhong et al. 2017, https://arxiv.org/abs/1708.04896, algorithm 1, with a constant `fill` (0 is the mean of what
    is normalised)."""
    B, _, H, W = images_BCHW.shape
    key_B = fork(keys_B.cpu().numpy(), "erasing")
    box_B4 = RandomResizedCrop(area, ratio).boxes(key_B, np.full(B, H), np.full(B, W))
    box_B4[uniform(key_B, "whether", 1)[:, 0] >= probability] = 0
    top_B1, left_B1, height_B1, width_B1 = torch.from_numpy(box_B4).to(images_BCHW.device)[:, None].unbind(-1)
    y_H, x_W = torch.arange(H, device=images_BCHW.device), torch.arange(W, device=images_BCHW.device)
    inside_BH = (y_H >= top_B1) & (y_H < top_B1 + height_B1)
    inside_BW = (x_W >= left_B1) & (x_W < left_B1 + width_B1)
    return images_BCHW.masked_fill((inside_BH[:, :, None] & inside_BW[:, None, :])[:, None], fill)
