"""A small network that learns CIFAR-10 in few epochs, with the ideas of Jordan 2024, https://arxiv.org/abs/2404.00498
(airbench94), section 3, and of those it credits (Page 2018, "How to train your ResNet").

The first layer is fixed and whitens patches of 2x2 pixels; then three stages of two 3x3 convolutions, GELU and batch
norm with a bias but no scale of its own; convolutions begin as close to the identity as they can; logits are scaled
down.

Legend: B rows, C channels, H and W pixels, K classes, N patches, P = 12 numbers of a patch.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.models.batch_norm import BatchNorm

PATCH = 2  # pixels


class Start(nn.Conv2d):
    """3x3 without bias; the first channels begin as copies of its inputs (section 3.1, dirac initialisation)."""

    def __init__(self, channels: int, to: int):
        super().__init__(channels, to, 3, padding=1, bias=False)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        with torch.no_grad():
            nn.init.dirac_(self.weight[: self.in_channels])


class Stage(nn.Module):
    """h_BCHW -> h_BCHW of half the size."""

    def __init__(self, channels: int, to: int):
        super().__init__()
        self.first, self.second = Start(channels, to), Start(to, to)
        self.norm1, self.norm2 = BatchNorm(to, momentum=0.4), BatchNorm(to, momentum=0.4)
        for norm in (self.norm1, self.norm2):
            norm.weight.requires_grad_(False)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        h_BCHW = F.gelu(self.norm1(F.max_pool2d(self.first(h_BCHW), 2)))
        return F.gelu(self.norm2(self.second(h_BCHW)))


class Speedrun(nn.Module):
    """images_BCHW of 32 x 32 pixels -> logits_BK; 1,972,792 parameters of which 288 are fixed, at 10 classes."""

    def __init__(self, classes: int, side: int = 32, *, width: int = 64):
        super().__init__()
        if side != 32:
            raise ValueError(f"images have {side} pixels, and must have 32")
        filters = 2 * 3 * PATCH**2
        self.whiten = nn.Conv2d(3, filters, PATCH)
        self.whiten.weight.requires_grad_(False)
        self.stages = nn.ModuleList(Stage(a, b) for a, b in pairwise((filters, width, 4 * width, 4 * width)))
        self.fc = nn.Linear(4 * width, classes, bias=False)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        h = F.gelu(self.whiten(images_BCHW))
        for stage in self.stages:
            h = stage(h)
        return self.fc(F.max_pool2d(h, 3).flatten(1)) / 9


def whitening(images_NCHW: Tensor, eps: float = 5e-4) -> Tensor:
    """Weights [24, 3, 2, 2] of the first layer: the patches' principal directions at unit variance, and negated.

    `images_NCHW`: some thousand training images, normalised.
    """
    patches_NP = F.unfold(images_NCHW.double(), PATCH, stride=PATCH).transpose(1, 2).flatten(0, 1)
    values_P, vectors_PP = torch.linalg.eigh(patches_NP.T @ patches_NP / len(patches_NP))
    largest_P = vectors_PP.abs().argmax(0)
    vectors_PP = vectors_PP * vectors_PP[largest_P, range(len(largest_P))].sign()  # a sign of its own, on any machine
    scaled_PP = (vectors_PP / (values_P + eps).sqrt()).T.flip(0).float()
    return torch.cat([scaled_PP, -scaled_PP]).view(-1, 3, PATCH, PATCH)
