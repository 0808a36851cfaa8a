"""AlexNet in its two shapes, and the small network on which its paper compares ReLU with tanh.

`alexnet`: Krizhevsky, Sutskever and Hinton 2012, "ImageNet classification with deep convolutional neural networks",
section 3: two groups, as on two GPUs; normalisation across channels; pooling windows that overlap. `alexnet_owt`:
Krizhevsky 2014, https://arxiv.org/abs/1404.5997, footnote 1: one column, no normalisation. Of the network of the first
paper's figure 1 the paper says that it has four layers: `fig1` has three convolutions and one linear layer.

Legend: B rows, C channels, H and W pixels, K classes.
"""

from functools import partial
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.models.image_layers import Classifier, Conv, Linear


def across_channels(h_BCHW: Tensor, size: int = 5, alpha: float = 1e-4, beta: float = 0.75, k: float = 2.0) -> Tensor:
    """Local response normalisation (section 3.3): h / (k + alpha * sum of squares of `size` channels around it)^beta.

    Written out, since the backward of torch's has no fixed order on a GPU.
    """
    channels = h_BCHW.shape[1]
    squares = F.pad(h_BCHW.float().square(), (0, 0, 0, 0, size // 2, size // 2))
    total = squares[:, :channels]
    for i in range(1, size):
        total = total + squares[:, i : i + channels]
    return (h_BCHW / (k + alpha * total) ** beta).to(h_BCHW.dtype)


def pool(h_BCHW: Tensor) -> Tensor:
    return F.max_pool2d(h_BCHW, 3, 2)


class AlexNet(nn.Module):
    """images_BCHW -> logits_BK. `normed`: the first two layers are normalised across channels before their pooling."""

    def __init__(self, convs: list[Conv], normed: bool, classes: int, side: int, dropout: float):
        super().__init__()
        self.convs, self.normed = nn.ModuleList(convs), normed
        side = (side - 7) // 4 + 1
        for _ in range(3):
            side = (side - 3) // 2 + 1
        if side < 1:
            raise ValueError("AlexNet needs images of 63 pixels or more")
        self.classifier = Classifier(convs[-1].out_channels * side**2, classes, dropout, constant=1.0)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        h = images_BCHW
        for i, conv in enumerate(self.convs):
            h = F.relu(conv(h))
            if self.normed and i < 2:
                h = across_channels(h)
            if i in (0, 1, 4):
                h = pool(h)
        return self.classifier(h)


def alexnet(classes: int, side: int, *, dropout: float = 0.5) -> AlexNet:
    """60,965,224 parameters at 224 pixels and 1000 classes. Weights from N(0, 0.01), biases as in section 5."""
    conv = partial(Conv, std=0.01)
    convs = [
        conv(3, 96, 11, 4, 2, constant=0.0),
        conv(96, 256, 5, groups=2, constant=1.0),
        conv(256, 384, 3, constant=0.0),
        conv(384, 384, 3, groups=2, constant=1.0),
        conv(384, 256, 3, groups=2, constant=1.0),
    ]
    return AlexNet(convs, True, classes, side, dropout)


def alexnet_owt(classes: int, side: int, *, dropout: float = 0.5) -> AlexNet:
    """torchvision's network: 61,100,840 parameters. Initial weights as in the first paper."""
    conv = partial(Conv, std=0.01)
    convs = [
        conv(3, 64, 11, 4, 2, constant=0.0),
        conv(64, 192, 5, constant=1.0),
        conv(192, 384, 3, constant=0.0),
        conv(384, 256, 3, constant=1.0),
        conv(256, 256, 3, constant=1.0),
    ]
    return AlexNet(convs, False, classes, side, dropout)


class Fig1(nn.Module):
    """images_BCHW -> logits_BK: 5x5 convolutions to `width`, `width` and 2 `width` channels, each pooled, and a linear
    layer on dropped-out features. He's initial weights, for both activations alike."""

    def __init__(self, classes: int, side: int, width: int, activation: Literal["relu", "tanh"], dropout: float):
        super().__init__()
        shapes = pairwise((3, width, width, 2 * width))
        self.convs = nn.ModuleList(Conv(before, after, 5, constant=0.0) for before, after in shapes)
        self.act, self.dropout = (F.relu if activation == "relu" else torch.tanh), dropout
        for _ in self.convs:
            side = (side - 1) // 2 + 1
        self.fc = Linear(2 * width * side**2, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        h = images_BCHW
        for conv in self.convs:
            h = F.max_pool2d(self.act(conv(h)), 3, 2, 1)
        return self.fc(F.dropout(h.flatten(1), self.dropout, self.training))


def fig1(
    classes: int, side: int, *, width: int = 32, activation: Literal["relu", "tanh"] = "relu", dropout: float = 0.0
) -> Fig1:
    return Fig1(classes, side, width, activation, dropout)
