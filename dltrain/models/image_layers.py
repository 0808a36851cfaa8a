"""Convolution and linear layers with the initial weights that the papers on images give.

Legend: B rows, C channels, H and W pixels, K classes.
"""

from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, nn


class Conv(nn.Conv2d):
    """kernel x kernel, padded so that stride 1 keeps the size, unless told otherwise.

    Weights are drawn from N(0, std); without a `std` from N(0, sqrt(2 / fan in)) (He et al. 2015,
    https://arxiv.org/abs/1502.01852, equation 10). `constant`: the initial bias, None: there is none.
    """

    def __init__(
        self,
        channels: int,
        to: int,
        kernel: int,
        stride: int = 1,
        padding: int | None = None,
        *,
        groups: int = 1,
        std: float | None = None,
        constant: float | None = None,
    ):
        self.std, self.constant = std, constant
        padding = kernel // 2 if padding is None else padding
        super().__init__(channels, to, kernel, stride, padding, groups=groups, bias=constant is not None)

    def reset_parameters(self) -> None:
        if self.std is None:
            nn.init.kaiming_normal_(self.weight, mode="fan_in", nonlinearity="relu")
        else:
            nn.init.normal_(self.weight, 0.0, self.std)
        if self.bias is not None:
            nn.init.constant_(self.bias, self.constant or 0.0)


class Linear(nn.Linear):
    """Weights from N(0, std); without a `std` from U(-1, 1) / sqrt(inputs), torch's own. Biases are `constant`."""

    def __init__(self, inputs: int, outputs: int, *, std: float | None = None, constant: float = 0.0):
        self.std, self.constant = std, constant
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        bound = self.in_features**-0.5
        if self.std is None:
            nn.init.uniform_(self.weight, -bound, bound)
        else:
            nn.init.normal_(self.weight, 0.0, self.std)
        nn.init.constant_(self.bias, self.constant)


class Classifier(nn.Module):
    """h_BCHW -> logits_BK through two hidden layers of 4096 ReLUs, as AlexNet and VGG end; dropout after each.

    Weights from N(0, 0.01); `constant`: the initial biases of the hidden layers.
    """

    def __init__(self, inputs: int, classes: int, dropout: float, constant: float = 0.0):
        super().__init__()
        sizes = (inputs, 4096, 4096)
        self.hidden = nn.ModuleList(Linear(a, b, std=0.01, constant=constant) for a, b in pairwise(sizes))
        self.fc, self.dropout = Linear(4096, classes, std=0.01), dropout

    def forward(self, h_BCHW: Tensor) -> Tensor:
        h = h_BCHW.flatten(1)
        for layer in self.hidden:
            h = F.dropout(F.relu(layer(h)), self.dropout, self.training)
        return self.fc(h)
