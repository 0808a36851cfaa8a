"""Residual networks, and plain ones: the same layers without shortcuts. He et al. 2015, https://arxiv.org/abs/1512.03385.

For ImageNet as in table 1 (18 to 152 layers, projections where the shape changes: option B); for CIFAR-10 as in section
4.2 (6n + 2 layers, identities with zeros for the new channels: option A). In bottlenecks the 3x3 convolution has the
stride, as in the weights that torchvision and timm publish; in the paper it was the first 1x1.

Legend: B rows, C channels, H and W pixels, K classes.
"""

import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.models.batch_norm import BatchNorm
from dltrain.models.image_layers import Conv, Linear

IMAGENET = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3), 152: (3, 8, 36, 3)}


class Block(nn.Module):
    """h_BCHW -> h_BCHW. Two 3x3 convolutions, or a bottleneck: 1x1, 3x3 and a 1x1 to four times the channels.

    `shortcut`: "projection" (B), "zeros" (A), or "none" for a plain network. `gamma`: the last norm's initial scale.
    """

    def __init__(self, channels: int, width: int, stride: int, bottleneck: bool, shortcut: str, gamma: float = 1.0):
        super().__init__()
        to = width * 4 if bottleneck else width
        shapes = [(channels, width, 3, stride), (width, to, 3, 1)]
        if bottleneck:
            shapes = [(channels, width, 1, 1), (width, width, 3, stride), (width, to, 1, 1)]
        self.convs = nn.Sequential(*(Conv(*shape) for shape in shapes))
        self.norms = nn.Sequential(*(BatchNorm(shape[1]) for shape in shapes[:-1]), BatchNorm(to, gamma=gamma))
        self.stride, self.more, self.shortcut = stride, to - channels, shortcut
        self.project = None
        if shortcut == "projection" and (stride, self.more) != (1, 0):
            self.project = nn.Sequential(Conv(channels, to, 1, stride), BatchNorm(to))

    def forward(self, h: Tensor) -> Tensor:
        out = h
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            out = norm(conv(F.relu(out) if i else out))
        return F.relu(out if self.shortcut == "none" else out + self.skip(h))

    def skip(self, h: Tensor) -> Tensor:
        if self.project is not None:
            return self.project(h)
        h = h[:, :, :: self.stride, :: self.stride] if self.stride > 1 else h
        return F.pad(h, (0, 0, 0, 0, 0, self.more)) if self.more else h


class ResNet(nn.Module):
    """images_BCHW -> logits_BK. `blocks`: how many in each stage; the first stage has `width` channels (in a
    bottleneck: before the last 1x1), each later one twice as many at half the size. `small`: the first convolution is
    3x3 without stride or pooling, for images of 32 or 64 pixels, and otherwise 7x7 with both.
    """

    def __init__(
        self,
        blocks: tuple[int, ...],
        width: int,
        classes: int,
        *,
        bottleneck: bool = False,
        shortcut: str = "projection",
        small: bool = False,
        gamma: float = 1.0,
    ):
        super().__init__()
        self.conv = Conv(3, width, 3) if small else Conv(3, width, 7, 2)
        self.norm = BatchNorm(width)
        self.pool = nn.Identity() if small else nn.MaxPool2d(3, 2, 1)
        self.projected = shortcut == "projection"
        made, at = [], width
        for stage, n in enumerate(blocks):
            for i in range(n):
                stride = 2 if stage > 0 and i == 0 else 1
                made.append(Block(at, width << stage, stride, bottleneck, shortcut, gamma))
                at = (width << stage) * (4 if bottleneck else 1)
        self.blocks = nn.ModuleList(made)
        self.fc = Linear(at, classes)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        h = self.pool(F.relu(self.norm(self.conv(images_BCHW))))
        for block in self.blocks:
            h = block(h)
        return self.fc(h.mean((2, 3)))


def resnet(
    depth: int,
    classes: int,
    side: int,
    *,
    width: int = 0,
    zero_gamma: bool = False,
    residual: bool = True,
) -> ResNet:
    """ResNet-18 to -152 (at 64 pixels or fewer with the small stem), or the paper's 6n + 2 layers for CIFAR-10.

    `width`: channels of the first stage (0: 64, and 16 for CIFAR). `zero_gamma`: every residual branch begins at zero
    (Goyal et al. 2017, https://arxiv.org/abs/1706.02677, section 5.1). ValueError for a depth of neither kind.
    """
    if depth in IMAGENET:
        blocks, small, usual, shortcut = IMAGENET[depth], side <= 64, 64, "projection"
    elif depth > 2 and (depth - 2) % 6 == 0:
        blocks, small, usual, shortcut = ((depth - 2) // 6,) * 3, True, 16, "zeros"
    else:
        raise ValueError(f"{depth} is none of {', '.join(map(str, IMAGENET))}, nor 6n + 2")
    return ResNet(
        blocks, width or usual, classes, bottleneck=depth in IMAGENET and depth >= 50,
        shortcut=shortcut if residual else "none", small=small, gamma=0.0 if zero_gamma else 1.0,
    )  # fmt: skip
