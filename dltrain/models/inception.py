"""Inception: branches of several kernel sizes side by side.

`googlenet`: Szegedy et al. 2014, https://arxiv.org/abs/1409.4842, table 1, with normalisation across channels, and two
more heads in training (section 5). `inception_bn`: Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, appendix:
batch normalisation before every ReLU, two 3x3 convolutions instead of a 5x5, no other heads; the first convolution is a
plain one, where the paper's is separable. The pooled branches of 4c and 4d have 96 channels, so that the blocks have
the 576 that the table prints beside them. `googlenet_bn`: what torchvision publishes as GoogLeNet, with batch
normalisation and 3x3 kernels instead of 5x5.

Initial weights are He's (2015, https://arxiv.org/abs/1502.01852); the papers give none.

Legend: B rows, C channels, H and W pixels, K classes.
"""

from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.models.alexnet import across_channels
from dltrain.models.batch_norm import BatchNorm
from dltrain.models.image_layers import Conv, Linear


class Shape(NamedTuple):
    """Channels of a row of the papers' tables. `one` is 0 in a block of stride 2, whose pooled branch is passed on."""

    one: int
    reduce3: int
    to3: int
    reduce5: int
    to5: int
    pooled: int


class Unit(nn.Module):
    """Convolution, batch norm or a bias (`eps` 0), ReLU."""

    def __init__(self, channels: int, to: int, kernel: int, stride: int = 1, *, eps: float = 0.0):
        super().__init__()
        self.conv = Conv(channels, to, kernel, stride, constant=None if eps else 0.0)
        self.norm = BatchNorm(to, eps) if eps else None

    def forward(self, h: Tensor) -> Tensor:
        h = self.conv(h)
        return F.relu(h if self.norm is None else self.norm(h))


class Inception(nn.Module):
    """h_BCHW -> h_BCHW, the branches one after the other in C. `kernels`: of the third branch, 5x5 or 3x3 and 3x3."""

    def __init__(self, channels: int, shape: Shape, kernels: tuple[int, ...], eps: float, mean: bool = False):
        super().__init__()
        unit, stride = partial(Unit, eps=eps), 1 if shape.one else 2
        deep, last = [unit(channels, shape.reduce5, 1)], len(kernels) - 1
        for i, kernel in enumerate(kernels):
            deep.append(unit(shape.to5 if i else shape.reduce5, shape.to5, kernel, stride if i == last else 1))
        self.one = unit(channels, shape.one, 1) if shape.one else None
        self.three = nn.Sequential(unit(channels, shape.reduce3, 1), unit(shape.reduce3, shape.to3, 3, stride))
        self.five = nn.Sequential(*deep)
        self.pooled = unit(channels, shape.pooled, 1) if shape.pooled else None
        self.stride, self.mean = stride, mean
        self.out = shape.one + shape.to3 + shape.to5 + (shape.pooled or channels)

    def forward(self, h: Tensor) -> Tensor:
        pool = F.avg_pool2d(h, 3, 1, 1) if self.mean else F.max_pool2d(h, 3, self.stride, 1)
        branches = [self.three(h), self.five(h), pool if self.pooled is None else self.pooled(pool)]
        return torch.cat(branches if self.one is None else [self.one(h), *branches], 1)


class Head(nn.Module):
    """One of the two heads half way: h_BCHW -> logits_BK."""

    def __init__(self, channels: int, side: int, classes: int, eps: float, dropout: float):
        super().__init__()
        self.conv, self.hidden = Unit(channels, 128, 1, eps=eps), Linear(128 * ((side - 5) // 3 + 1) ** 2, 1024)
        self.fc, self.dropout = Linear(1024, classes), dropout

    def forward(self, h: Tensor) -> Tensor:
        h = F.relu(self.hidden(self.conv(F.avg_pool2d(h, 5, 3)).flatten(1)))
        return self.fc(F.dropout(h, self.dropout, self.training))


def pool(h_BCHW: Tensor, size: int = 3) -> Tensor:
    return F.max_pool2d(h_BCHW, size, 2, ceil_mode=True)


class InceptionNet(nn.Module):
    """images_BCHW -> logits_BK; in training of a net with heads, three of them: the last layer's first.

    `eps` is batch norm's, 0: there is none, but normalisation across channels in the stem. `pools`: before which blocks
    there is pooling, and over how many pixels; `heads`: after which blocks there is another head.
    """

    def __init__(
        self,
        blocks: list[Inception],
        pools: dict[int, int],
        heads: tuple[int, ...],
        classes: int,
        side: int,
        eps: float,
        dropout: float,
    ):
        super().__init__()
        self.stem = nn.ModuleList([Unit(3, 64, 7, 2, eps=eps), Unit(64, 64, 1, eps=eps), Unit(64, 192, 3, eps=eps)])
        self.blocks, self.pools, self.after, self.normed = nn.ModuleList(blocks), pools, heads, eps == 0
        side = (side - 1) // 2 + 1
        for _ in range(3):
            side = -(-(side - 3) // 2) + 1  # pool()
        if heads and side < 5:
            raise ValueError("GoogLeNet needs images of 79 pixels or more")
        made = [Head(blocks[i].out, side, classes, eps, 0.7) for i in heads]
        self.heads = nn.ModuleList(made)
        self.fc, self.dropout = Linear(blocks[-1].out, classes), dropout

    def forward(self, images_BCHW: Tensor) -> Tensor | tuple[Tensor, ...]:
        first, second, third = self.stem
        h = pool(first(images_BCHW))
        h = third(second(across_channels(h) if self.normed else h))
        h, others = pool(across_channels(h) if self.normed else h), []
        for i, block in enumerate(self.blocks):
            h = block(pool(h, self.pools[i]) if i in self.pools else h)
            if self.training and i in self.after:
                others.append(self.heads[self.after.index(i)](h))
        logits_BK = self.fc(F.dropout(h.mean((2, 3)), self.dropout, self.training))
        return (logits_BK, *others) if others else logits_BK


def _chain(shapes: list[tuple[int, ...]], kernels: tuple[int, ...], eps: float, mean: bool) -> list[Inception]:
    """Blocks one after the other. `mean`: the pooled branch averages, but for stride 2 and in the last block."""
    made, at = [], 192
    for i, shape in enumerate(shapes):
        averages = mean and shape[0] > 0 and i < len(shapes) - 1
        made.append(Inception(at, Shape(*shape), kernels, eps, averages))
        at = made[-1].out
    return made


GOOGLENET = [
    (64, 96, 128, 16, 32, 32), (128, 128, 192, 32, 96, 64),
    (192, 96, 208, 16, 48, 64), (160, 112, 224, 24, 64, 64), (128, 128, 256, 24, 64, 64),
    (112, 144, 288, 32, 64, 64), (256, 160, 320, 32, 128, 128),
    (256, 160, 320, 32, 128, 128), (384, 192, 384, 48, 128, 128),
]  # fmt: skip
INCEPTION_BN = [
    (64, 64, 64, 64, 96, 32), (64, 64, 96, 64, 96, 64), (0, 128, 160, 64, 96, 0),
    (224, 64, 96, 96, 128, 128), (192, 96, 128, 96, 128, 128), (160, 128, 160, 128, 160, 96),
    (96, 128, 192, 160, 192, 96), (0, 128, 192, 192, 256, 0),
    (352, 192, 320, 160, 224, 128), (352, 192, 320, 192, 224, 128),
]  # fmt: skip


def googlenet(classes: int, side: int, *, dropout: float = 0.4) -> InceptionNet:
    """13,378,280 parameters at 224 pixels and 1000 classes, 6,998,552 of them without the two other heads.

    ValueError for images too small for those: of less than 79 pixels.
    """
    return _googlenet(classes, side, dropout, (5,), 3, 0.0)


def googlenet_bn(classes: int, side: int, *, dropout: float = 0.2) -> InceptionNet:
    """torchvision's network: 13,004,888 parameters. ValueError as above."""
    return _googlenet(classes, side, dropout, (3,), 2, 1e-3)


def _googlenet(
    classes: int, side: int, dropout: float, kernels: tuple[int, ...], last_pool: int, eps: float
) -> InceptionNet:
    blocks = _chain(GOOGLENET, kernels, eps, False)
    return InceptionNet(blocks, {2: 3, 7: last_pool}, (2, 5), classes, side, eps, dropout)


def inception_bn(classes: int, side: int, *, dropout: float = 0.0) -> InceptionNet:
    """Batch norm's paper removes dropout (section 4.2.1)."""
    return InceptionNet(_chain(INCEPTION_BN, (3, 3), 1e-5, True), {}, (), classes, side, 1e-5, dropout)
