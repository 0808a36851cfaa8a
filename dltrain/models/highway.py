"""Highway networks: Srivastava, Greff and Schmidhuber 2015, https://arxiv.org/abs/1507.06228, equation 3.

The convolutional kind of section 3.2: only convolutions and pooling. The paper counts layers and parameters but does
not lay them out; here three stages of 3x3 convolutions, as equal as can be, of `width`, 2 and 4 `width` channels, with
max pooling after each of the first two, and at the end a 1x1 convolution averaged over the image. The first layer of a
stage changes the number of channels, so it has no carry. With 19 layers about the 2.3 million parameters of its
Highway C.

Legend: B rows, C channels, H and W pixels, K classes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.models.image_layers import Conv


class Highway(nn.Module):
    """h_BCHW -> T relu(conv(h)) + (1 - T) h, T = sigmoid(gate(h)), whose initial bias carries (section 2.2)."""

    def __init__(self, channels: int, gate: float):
        super().__init__()
        self.conv, self.gate = Conv(channels, channels, 3, constant=0.0), Conv(channels, channels, 3, constant=gate)

    def forward(self, h: Tensor) -> Tensor:
        return torch.lerp(h, F.relu(self.conv(h)), torch.sigmoid(self.gate(h)))


class Change(nn.Module):
    """h_BCHW -> h_BDHW: the first layer of a stage, after pooling."""

    def __init__(self, channels: int, to: int, stride: int):
        super().__init__()
        self.conv, self.stride = Conv(channels, to, 3, constant=0.0), stride

    def forward(self, h: Tensor) -> Tensor:
        return F.relu(self.conv(F.max_pool2d(h, 2) if self.stride == 2 else h))


class HighwayNet(nn.Module):
    """images_BCHW -> logits_BK."""

    def __init__(self, layers: int, width: int, classes: int, gate: float):
        super().__init__()
        made: list[nn.Module] = []
        at = 3
        for stage in range(3):
            made.append(Change(at, at := width << stage, 2 if stage else 1))
            made += [Highway(at, gate) for _ in range((layers - 2 - stage) // 3)]
        self.layers = nn.ModuleList(made)
        self.last = Conv(at, classes, 1, constant=0.0)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        h = images_BCHW
        for layer in self.layers:
            h = layer(h)
        return self.last(h).mean((2, 3))


def highway(layers: int, classes: int, side: int, *, width: int = 32, gate: float = -2.0) -> HighwayNet:
    """`gate`: the gates' initial bias. ValueError for fewer than 4 layers."""
    if layers < 4:
        raise ValueError("a highway network has at least 4 layers: one for each stage, and the last")
    return HighwayNet(layers, width, classes, gate)
