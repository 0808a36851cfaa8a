"""VGG: stacks of 3x3 convolutions. Simonyan and Zisserman 2015, https://arxiv.org/abs/1409.1556, table 1 (A, B, D, E).

Convolutions have He's initial weights (2015, https://arxiv.org/abs/1502.01852), with which all depths train from
scratch; the paper began from a trained shallow network, and says that Glorot's would have done.

Legend: B rows, C channels, H and W pixels, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.models.image_layers import Classifier, Conv

CONVS = {11: (1, 1, 2, 2, 2), 13: (2, 2, 2, 2, 2), 16: (2, 2, 3, 3, 3), 19: (2, 2, 4, 4, 4)}  # before each pooling
CHANNELS = (64, 128, 256, 512, 512)


class Vgg(nn.Module):
    """images_BCHW of 32 pixels or more -> logits_BK."""

    def __init__(self, convs: tuple[int, ...], classes: int, side: int, dropout: float):
        super().__init__()
        made, at, self.last = [], 3, set[int]()
        for n, channels in zip(convs, CHANNELS, strict=True):
            for _ in range(n):
                made.append(Conv(at, channels, 3, constant=0.0))
                at = channels
            self.last.add(len(made) - 1)  # of its size: pooling follows
        self.convs = nn.ModuleList(made)
        self.classifier = Classifier(at * (side // 32) ** 2, classes, dropout)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        h = images_BCHW
        for i, conv in enumerate(self.convs):
            h = F.relu(conv(h))
            if i in self.last:
                h = F.max_pool2d(h, 2)
        return self.classifier(h)


def vgg(layers: int, classes: int, side: int, *, dropout: float = 0.5) -> Vgg:
    """ValueError where `layers` is not 11, 13, 16 or 19, or for images of less than 32 pixels."""
    if layers not in CONVS:
        raise ValueError(f"{layers} layers, but VGG has {', '.join(map(str, CONVS))}")
    if side < 32:
        raise ValueError("VGG needs images of 32 pixels or more")
    return Vgg(CONVS[layers], classes, side, dropout)
