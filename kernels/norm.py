"""The op behind layer_norm.py and rms_norm.py: h = dropout(x) + residual, and h normalised.

Registered as dltrain::norm_forward and dltrain::norm_backward. Saved for backward: h (x itself where nothing was added
or dropped), and the mean and reciprocal deviation of each row in float32.
"""

# N the width that is normalised: x has shape [..., N], or ends in several dimensions that multiply to N

from typing import Any

import torch
from torch import Tensor

from dltrain.kernels.dropout import draw_seed
from dltrain.kernels.registration import register


def norm(
    x: Tensor,
    width: int,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    residual: Tensor | None,
    dropout_p: float,
    centre: bool,
) -> tuple[Tensor, Tensor]:
    """(y, h) by the kernels; h is x where there is no residual and no dropout. `centre` is False for RMS norm."""
    seed = draw_seed(x.device) if dropout_p else None
    y, h, _, _ = forward(x, residual, weight, bias, seed, dropout_p, eps, width, centre)
    return y, x if residual is None and seed is None else h


def unsupported(x: Tensor, normalized_shape: tuple[int, ...], residual: Tensor | None, *weights: Tensor | None) -> str:
    """What about the arguments the kernels do not do, "" if nothing."""
    given = [t for t in (residual, *weights) if t is not None]
    if not normalized_shape or x.shape[-len(normalized_shape) :] != normalized_shape or 0 in normalized_shape:
        return f"normalized_shape {normalized_shape} of {tuple(x.shape)}"
    if any(w is not None and w.shape != normalized_shape for w in weights):
        return f"weights whose shape is not {normalized_shape}"
    if residual is not None and residual.shape != x.shape:
        return f"a residual of {tuple(residual.shape)} on {tuple(x.shape)}"
    if any((t.dtype == torch.float64) != (x.dtype == torch.float64) for t in given):
        return "float64 together with other types"
    return ""


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float, width: int, centre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from dltrain.kernels import norm_triton

    y, h, mean, rstd = norm_triton.forward(x, residual, weight, bias, seed, dropout_p, eps, width, centre)
    return y, x.new_empty(0) if h is None else h, mean, rstd


def _forward_fake(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    dropout_p: float, eps: float, width: int, centre: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = x.new_empty(0)
    if residual is not None or seed is not None:
        h = torch.empty_like(y, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    sums = torch.float64 if x.dtype == torch.float64 else torch.float32
    m = x.numel() // width
    return y, h, x.new_empty(m if centre else 0, dtype=sums), x.new_empty(m, dtype=sums)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, residual, weight, bias, seed, ctx.p, _, ctx.width, ctx.centre = inputs
    _, h, mean, rstd = output
    ctx.x_type, ctx.residual_type = x.dtype, None if residual is None else residual.dtype
    alone = residual is None and seed is None
    ctx.mark_non_differentiable(mean, rstd, *([h] if alone else []))
    ctx.save_for_backward(x if alone else h, weight, bias, seed, mean, rstd)


def _differentiate(ctx: Any, grad: Tensor | None, grad_h: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    h, weight, bias, seed, mean, rstd = ctx.saved_tensors
    if grad is None and grad_h is None:
        return (None,) * 9
    grad = torch.zeros_like(h, dtype=ctx.x_type) if grad is None else grad
    dx, dresidual, dweight, dbias = backward(
        grad, grad_h, h, weight, bias, seed, mean, rstd, ctx.p, ctx.width, ctx.centre, ctx.x_type, ctx.residual_type
    )
    if ctx.residual_type is None:
        dresidual = None
    elif not dx.numel():
        dx = dresidual
    return dx, dresidual, None if weight is None else dweight, None if bias is None else dbias, *(None,) * 5


def _backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, dropout_p: float, width: int, centre: bool,
    x_type: torch.dtype, residual_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    from dltrain.kernels import norm_triton

    dx, dresidual, dweight, dbias = norm_triton.backward(
        grad, grad_h, h, weight, bias, seed, mean, rstd, dropout_p, width, centre, x_type, residual_type
    )
    none = h.new_empty
    return (
        none(0) if dx is None else dx,
        none(0) if dresidual is None else dresidual,
        none(0) if dweight is None else dweight,
        none(0) if dbias is None else dbias,
    )


def _backward_fake(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, dropout_p: float, width: int, centre: bool,
    x_type: torch.dtype, residual_type: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    apart = residual_type is None or seed is not None or x_type != residual_type
    return (
        h.new_empty(h.shape, dtype=x_type) if apart else h.new_empty(0),
        h.new_empty(0) if residual_type is None else h.new_empty(h.shape, dtype=residual_type),
        h.new_empty(0) if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format),
        h.new_empty(0) if bias is None else torch.empty_like(bias, memory_format=torch.contiguous_format),
    )


backward = register(
    "norm_backward(Tensor grad, Tensor? grad_h, Tensor h, Tensor? weight, Tensor? bias, Tensor? seed, Tensor mean,"
    " Tensor rstd, float dropout_p, int width, bool centre, ScalarType x_type, ScalarType? residual_type)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
forward = register(
    "norm_forward(Tensor x, Tensor? residual, Tensor? weight, Tensor? bias, Tensor? seed, float dropout_p, float eps,"
    " int width, bool centre) -> (Tensor, Tensor, Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup=_save,
    backward=_differentiate,
)
