"""Root mean square normalisation. Zhang and Sennrich 2019, https://arxiv.org/abs/1910.07467, section 3.

    y = h / sqrt(mean(h^2) + eps) * weight   over the last dimensions

of h = dropout(x) + residual. The mean is computed in float32 whatever the type of x.
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
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """(y, h). y has the shape and type of x, h the wider of the types of x and residual.

    weight has shape `normalized_shape`, the last dimensions of x; residual has the shape of x. `eps` is the difference
    from 1 to the next number of x's type unless given, of float32 for narrower ones (as in torch).
    """
    h = F.dropout(x, dropout_p) if dropout_p else x
    h = h if residual is None else residual + h
    y = F.rms_norm(h, list(normalized_shape), weight, eps)
    return y if residual is None else y.to(x.dtype), h


def rms_norm(
    x: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """As `reference`, by the kernel where DLTRAIN_KERNELS and the tensors allow it.

    Raises ValueError where the shape of residual is not that of x.
    """
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"rms_norm: residual {tuple(residual.shape)} must have the shape of input {tuple(x.shape)}")
    shape = tuple(normalized_shape)
    if use_kernel("rms_norm", norm.unsupported(x, shape, residual, weight), x, residual, weight):
        if eps is None:
            eps = torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps
        return norm.norm(x, math.prod(shape), weight, None, eps, residual, dropout_p, False)
    return reference(x, shape, weight, eps, residual=residual, dropout_p=dropout_p)
