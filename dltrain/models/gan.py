"""Two players: a generator of samples from noise, and a critic that scores samples (a GAN's logit, a WGAN's potential).

Convolutional for images, as DCGAN has them (Radford, Metz and Chintala 2015, https://arxiv.org/abs/1511.06434, section
3): strides instead of pooling, batch normalisation, LeakyReLU in the critic. Multilayer perceptrons for points.

Batch normalisation has no running averages: every batch is normalised by itself, samples drawn for show too. So no
state depends on which process saw which rows.

Legend: B rows, Z latent dimensions, D dimensions of a point; C channels (3), H and W pixels.
"""

import math
from itertools import pairwise

from torch import Tensor, nn


class Conv(nn.Conv2d):
    """4x4, stride 2: half the height and width. Weights are drawn from N(0, 0.02), as DCGAN's section 4 has it."""

    def __init__(self, channels: int, to: int, bias: bool = True):
        super().__init__(channels, to, 4, 2, 1, bias=bias)

    def reset_parameters(self) -> None:
        normal_(self)


class Deconv(nn.ConvTranspose2d):
    """4x4, stride 2: twice the height and width; `first`: a vector becomes 4x4. Weights as in Conv."""

    def __init__(self, channels: int, to: int, bias: bool = True, first: bool = False):
        super().__init__(channels, to, 4, 1 if first else 2, 0 if first else 1, bias=bias)

    def reset_parameters(self) -> None:
        normal_(self)


def normal_(layer: nn.Conv2d | nn.ConvTranspose2d) -> None:
    nn.init.normal_(layer.weight, 0.0, 0.02)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)


def norm(channels: int) -> nn.Module:
    return nn.BatchNorm2d(channels, track_running_stats=False)


class ImageGenerator(nn.Module):
    """z_BZ -> images_BCHW in -1 ... 1, of `size` pixels (a power of two, 8 or more); `width` channels before the last
    layer, and twice as many at every halving of the pixels."""

    def __init__(self, size: int, latent: int, width: int):
        super().__init__()
        doublings = int(math.log2(size // 4))
        channels = [width << i for i in reversed(range(doublings))]
        layers: list[nn.Module] = [Deconv(latent, channels[0], bias=False, first=True), norm(channels[0]), nn.ReLU()]
        for before, after in pairwise(channels):
            layers += [Deconv(before, after, bias=False), norm(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, Deconv(width, 3), nn.Tanh())

    def forward(self, z_BZ: Tensor) -> Tensor:
        return self.layers(z_BZ[:, :, None, None])


class ImageCritic(nn.Module):
    """images_BCHW -> scores_B; the generator mirrored. Without `normed` a row's score does not depend on other rows',
    which a penalty on its gradient asks for (Gulrajani et al. 2017, section 4)."""

    def __init__(self, size: int, width: int, normed: bool):
        super().__init__()
        channels = [width << i for i in range(int(math.log2(size // 4)))]
        layers: list[nn.Module] = [Conv(3, width), nn.LeakyReLU(0.2)]
        for before, after in pairwise(channels):
            layers += [Conv(before, after, bias=not normed), *([norm(after)] if normed else []), nn.LeakyReLU(0.2)]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(16 * channels[-1], 1))

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.layers(images_BCHW)[:, 0]


class PointGenerator(nn.Module):
    """z_BZ -> points_BD: two hidden layers of `width` units."""

    def __init__(self, dimensions: int, latent: int, width: int):
        super().__init__()
        self.layers = perceptron(latent, width, dimensions)

    def forward(self, z_BZ: Tensor) -> Tensor:
        return self.layers(z_BZ)


class PointCritic(nn.Module):
    """points_BD -> scores_B."""

    def __init__(self, dimensions: int, width: int):
        super().__init__()
        self.layers = perceptron(dimensions, width, 1)

    def forward(self, points_BD: Tensor) -> Tensor:
        return self.layers(points_BD)[:, 0]


def perceptron(inputs: int, width: int, outputs: int) -> nn.Sequential:
    hidden = [nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()]
    return nn.Sequential(*hidden, nn.Linear(width, outputs))
