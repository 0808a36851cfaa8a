"""Q networks: the values of all actions from a stack of frames.

For 84x84 pixels the convolutions of Mnih et al. 2015 (https://doi.org/10.1038/nature14236, methods, "Model
architecture"), for a vector two hidden layers.

Legend: B rows, K frames of a state, D numbers of a frame, U actions; H and W are 84 pixels.
"""

import math

from torch import Tensor, nn


def q_network(shape: tuple[int, ...], actions: int, width: int) -> nn.Module:
    """For states of `shape`, K frames of H and W pixels or of D numbers: states_BK... -> values_BU."""
    return ImageQ(shape[0], actions, width) if len(shape) == 3 else VectorQ(math.prod(shape), actions, width)


class ImageQ(nn.Module):
    """states_BKHW, 0 ... 1 -> values_BU: 32 filters 8x8, stride 4; 64 4x4, 2; 64 3x3, 1; `width` units (512)."""

    def __init__(self, frames: int, actions: int, width: int):
        super().__init__()
        convolutions = [nn.Conv2d(frames, 32, 8, 4), nn.ReLU(), nn.Conv2d(32, 64, 4, 2), nn.ReLU()]
        convolutions += [nn.Conv2d(64, 64, 3, 1), nn.ReLU(), nn.Flatten()]
        self.layers = nn.Sequential(*convolutions, nn.Linear(64 * 7 * 7, width), nn.ReLU(), nn.Linear(width, actions))

    def forward(self, states_BKHW: Tensor) -> Tensor:
        return self.layers(states_BKHW)


class VectorQ(nn.Module):
    """states_BKD -> values_BU: two hidden layers of `width` units."""

    def __init__(self, inputs: int, actions: int, width: int):
        super().__init__()
        hidden = [nn.Flatten(), nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
        self.layers = nn.Sequential(*hidden, nn.Linear(width, actions))

    def forward(self, states_BKD: Tensor) -> Tensor:
        return self.layers(states_BKD)
