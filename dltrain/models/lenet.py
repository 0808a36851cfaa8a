"""LeNet-5: LeCun, Bottou, Bengio and Haffner 1998, "Gradient-based learning applied to document recognition", section
II.B and figure 2.

Kept: the sizes, the table of which maps feed which (table I), subsampling with a coefficient and a bias for each map,
the scaled tanh after every layer (appendix A), the initial weights. Not kept: the output layer of radial basis
functions with fixed codes; a linear layer gives logits instead (850 parameters, so 60,850 instead of 60,000).

Legend: B rows, C maps, H and W pixels, K classes, P pairs of maps that the third layer connects.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TABLE = (
    (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4, 5), (0, 4, 5), (0, 1, 5), (0, 1, 2, 3), (1, 2, 3, 4), (2, 3, 4, 5),
    (0, 3, 4, 5), (0, 1, 4, 5), (0, 1, 2, 5), (0, 1, 3, 4), (1, 2, 4, 5), (0, 2, 3, 5), (0, 1, 2, 3, 4, 5),
)  # fmt: skip


def squash(h: Tensor) -> Tensor:
    return 1.7159 * torch.tanh(2 / 3 * h)


class Conv(nn.Conv2d):
    """5x5, no padding; weights from U(-2.4, 2.4) / fan in, biases 0."""

    def __init__(self, channels: int, to: int):
        super().__init__(channels, to, 5)

    def reset_parameters(self) -> None:
        uniform_(self.weight, self.in_channels * 25)
        assert self.bias is not None
        nn.init.zeros_(self.bias)


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        uniform_(self.weight, self.in_features)
        nn.init.zeros_(self.bias)


def uniform_(weight: Tensor, fan_in: int) -> None:
    nn.init.uniform_(weight, -2.4 / fan_in, 2.4 / fan_in)


class TableConv(nn.Module):
    """6 maps -> 16 of 5x5 convolutions, each of the maps in its column of table I alone: 60 kernels instead of 96."""

    place_P: Tensor

    def __init__(self):
        super().__init__()
        pairs = sum(map(len, TABLE))
        self.weight, self.bias = nn.Parameter(torch.empty(pairs, 5, 5)), nn.Parameter(torch.empty(len(TABLE)))
        self.register_buffer("place_P", torch.empty(pairs, dtype=torch.int64), persistent=False)  # of 16 x 6 kernels
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.place_P.copy_(torch.tensor([to * 6 + of for to, maps in enumerate(TABLE) for of in maps]))
        sizes = [len(maps) for maps in TABLE for _ in maps]
        for kernel, size in zip(self.weight, sizes, strict=True):
            uniform_(kernel, size * 25)
        nn.init.zeros_(self.bias)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        dense = self.weight.new_zeros(len(TABLE) * 6, 5, 5).index_copy(0, self.place_P, self.weight)
        return F.conv2d(h_BCHW, dense.view(len(TABLE), 6, 5, 5), self.bias)


class Subsample(nn.Module):
    """Sums over 2x2 pixels, times a coefficient, plus a bias: one of each per map. At first the mean."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, 0.25)
        nn.init.zeros_(self.bias)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(h_BCHW, 2) * self.weight[:, None, None] + self.bias[:, None, None]


class LeNet(nn.Module):
    """images_BCHW of up to 32 pixels -> logits_BK. Colours are averaged, and smaller images padded to 32 with zeros."""

    def __init__(self, classes: int):
        super().__init__()
        self.c1, self.s2, self.c3, self.s4 = Conv(1, 6), Subsample(6), TableConv(), Subsample(16)
        self.c5, self.f6, self.fc = Conv(16, 120), Linear(120, 84), Linear(84, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        margin = 32 - images_BCHW.shape[-1]
        h = F.pad(images_BCHW.mean(1, keepdim=True), (margin // 2, margin - margin // 2) * 2)
        for layer in (self.c1, self.s2, self.c3, self.s4, self.c5):
            h = squash(layer(h))
        return self.fc(squash(self.f6(h.flatten(1))))


def lenet(classes: int, side: int) -> LeNet:
    """ValueError for images of more than 32 pixels."""
    if side > 32:
        raise ValueError(f"images of {side} pixels, but LeNet-5 sees at most 32")
    return LeNet(classes)
