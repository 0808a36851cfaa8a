"""Layer normalisation. Ba et al. 2016, https://arxiv.org/abs/1607.06450, section 3.

    y = (x - mean(x)) / sqrt(var(x) + eps) * weight + bias,   var = mean((x - mean(x))^2)   over the last dimensions

The statistics are computed in float32 whatever the type of x.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def reference(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Same shape and type as x; weight and bias have shape `normalized_shape`, the last dimensions of x."""
    return F.layer_norm(x, list(normalized_shape), weight, bias, eps)
