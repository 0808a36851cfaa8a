"""The operations that models call: the names, argument order and layouts of torch.nn.functional, a kernel behind each.

Each forwards to its module in dltrain.kernels, which states the formula as a reference in torch and has a Triton kernel
beside it; DLTRAIN_KERNELS=auto|triton|reference says which runs (dltrain.kernels.dispatch).
"""

from collections.abc import Sequence
from typing import overload

from torch import Tensor

from dltrain.kernels import attention as _attention
from dltrain.kernels import cross_entropy as _cross_entropy
from dltrain.kernels import gelu as _gelu
from dltrain.kernels import layer_norm as _layer_norm
from dltrain.kernels import linear_cross_entropy as _linear_cross_entropy
from dltrain.kernels import mlp as _mlp
from dltrain.kernels import rms_norm as _rms_norm


def scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    documents: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attention over [B, H, L, E]: see dltrain.kernels.attention. As in torch, dropout_p applies in evaluation too.

    Beyond torch: `key_lengths` [B] (the rest is padding), `documents` [B, L] (runs of equal numbers are apart) or
    `cu_seqlens` [N + 1] (of sequences one behind the other in a batch of one), `window` (left, right), `softcap`.
    """
    return _attention.scaled_dot_product_attention(
        query, key, value, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
        key_lengths=key_lengths, documents=documents, cu_seqlens=cu_seqlens, window=window, softcap=softcap,
    )  # fmt: skip


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: None = None,
    dropout_p: float = 0.0,
) -> Tensor: ...


@overload
def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]: ...


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Normalise the last dimensions: see dltrain.kernels.layer_norm.

    With `residual`, of input's shape: (normalised h, h) of h = residual + dropout(input), both with gradients. As in
    torch's attention, dropout_p applies in evaluation too. Raises ValueError where the shapes differ.
    """
    y, h = _layer_norm.layer_norm(input, normalized_shape, weight, bias, eps, residual=residual, dropout_p=dropout_p)
    return y if residual is None else (y, h)


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: None = None,
    dropout_p: float = 0.0,
) -> Tensor: ...


@overload
def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor,
    dropout_p: float = 0.0,
) -> tuple[Tensor, Tensor]: ...


def rms_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
    *,
    residual: Tensor | None = None,
    dropout_p: float = 0.0,
) -> Tensor | tuple[Tensor, Tensor]:
    """Divide the last dimensions by their root mean square: see dltrain.kernels.rms_norm. Keywords as in layer_norm."""
    y, h = _rms_norm.rms_norm(input, normalized_shape, weight, eps, residual=residual, dropout_p=dropout_p)
    return y if residual is None else (y, h)


def gelu(input: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """Gaussian error linear unit of input + bias, by erf or "tanh": see dltrain.kernels.gelu."""
    return _gelu.gelu(input, approximate, bias=bias)


def mlp(
    input: Tensor,
    up_weight: Tensor,
    up_bias: Tensor,
    down_weight: Tensor,
    down_bias: Tensor,
    approximate: str = "none",
) -> Tensor:
    """linear, GELU, linear; of what lies between, backward keeps one tensor: see dltrain.kernels.mlp."""
    return _mlp.mlp(input, up_weight, up_bias, down_weight, down_bias, approximate)


def cross_entropy(
    input: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """Softmax cross-entropy of logits [N, C] in float32: see dltrain.kernels.cross_entropy.

    Beyond torch: `z_loss` times the squared log of the softmax's denominator, and `inplace`, which allows the gradient
    to overwrite the logits.
    """
    return _cross_entropy.cross_entropy(
        input,
        target,
        weight,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        inplace=inplace,
    )


def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk_bytes: int = 1 << 28,
) -> Tensor:
    """cross_entropy(linear(input, linear_weight, linear_bias), target): see dltrain.kernels.linear_cross_entropy.

    The kernel's logits exist in chunks of `chunk_bytes`, never as a whole.
    """
    return _linear_cross_entropy.linear_cross_entropy(
        input,
        linear_weight,
        target,
        linear_bias=linear_bias,
        reduction=reduction,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
        chunk_bytes=chunk_bytes,
    )
