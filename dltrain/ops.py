"""The operations that models call: the names, argument order and layouts of torch.nn.functional, a kernel behind each.

Each forwards to the reference in dltrain.kernels, which states the formula and specifies any faster kernel.
"""

from collections.abc import Sequence

from torch import Tensor

from dltrain.kernels import attention as _attention
from dltrain.kernels import cross_entropy as _cross_entropy
from dltrain.kernels import gelu as _gelu
from dltrain.kernels import layer_norm as _layer_norm


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    """Attention over [B, H, L, E]: see dltrain.kernels.attention. As in torch, dropout_p applies in evaluation too."""
    return _attention.reference(query, key, value, attn_mask, dropout_p, is_causal, scale=scale)


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Normalise the last dimensions: see dltrain.kernels.layer_norm."""
    return _layer_norm.reference(input, normalized_shape, weight, bias, eps)


def gelu(input: Tensor, approximate: str = "none") -> Tensor:
    """Gaussian error linear unit, by erf or "tanh": see dltrain.kernels.gelu."""
    return _gelu.reference(input, approximate)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Softmax cross-entropy of logits [N, C] in float32: see dltrain.kernels.cross_entropy."""
    return _cross_entropy.reference(
        input, target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
