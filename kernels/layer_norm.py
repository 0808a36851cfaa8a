"""Layer normalisation. Ba et al. 2016, https://arxiv.org/abs/1607.06450, section 3.

    y = (h - mean(h)) / sqrt(var(h) + eps) * weight + bias,   var = mean((h - mean(h))^2)   over the last dimensions

of h = dropout(x) + residual, what a Transformer's branch adds to its stream. The statistics are computed in float32
whatever the type of x.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels import norm
from dltrain.kernels.dispatch import use_kernel


def reference(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, h). y has the shape and type of x, h the wider of the types of x and residual.

    weight and bias have shape `normalized_shape`, the last dimensions of x; residual has the shape of x.
    """
    h = F.dropout(x, dropout_p) if dropout_p else x
    h = h if residual is None else residual + h
    y = F.layer_norm(h, list(normalized_shape), weight, bias, eps)
    return y if residual is None else y.to(x.dtype), h


def layer_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `reference`, by the kernel where DLTRAIN_KERNELS and the tensors allow it.

    Raises ValueError where the shape of residual is not that of x.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"layer_norm: residual {tuple(residual.shape)} must have the shape of input {tuple(x.shape)}")
    shape = tuple(normalized_shape)
    if use_kernel("layer_norm", norm.unsupported(x, shape, residual, weight, bias), x, residual, weight, bias):
        if x.is_cuda and torch.is_autocast_enabled("cuda"):
            x = x.float()  # as torch has it
        return norm.norm(x, math.prod(shape), weight, bias, eps, residual, dropout_p, True)
    return reference(x, shape, weight, bias, eps, residual=residual, dropout_p=dropout_p)
