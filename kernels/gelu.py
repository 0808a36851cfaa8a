"""Gaussian error linear unit. Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2.

gelu(x) = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2
tanh:     x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2

With a bias, x is what the projection before it gave without one: the sum, the function and in backward the bias's
gradient take one pass over memory. Backward needs x alone.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels.dispatch import use_kernel
from dltrain.kernels.registration import register


def reference(x: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """Elementwise; `approximate` is "none" (erf: BERT) or "tanh" (GPT-2). `bias` is added to x's last dimension."""
    return F.gelu(x if bias is None else x + bias, approximate=approximate)


def gelu(x: Tensor, approximate: str = "none", *, bias: Tensor | None = None) -> Tensor:
    """As `reference`, by the kernel where DLTRAIN_KERNELS and the tensors allow it."""
    if approximate in ("none", "tanh") and use_kernel("gelu", _unsupported(x, bias), x, bias):
        return forward(x, bias, approximate == "tanh")
    return reference(x, approximate, bias=bias)


def _unsupported(x: Tensor, bias: Tensor | None) -> str:
    if bias is not None and (bias.dtype != x.dtype or bias.shape != x.shape[-1:] or not bias.is_contiguous()):
        return f"a bias of {bias.dtype} {tuple(bias.shape)} on {x.dtype} {tuple(x.shape)}"
    return ""


def _forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    from dltrain.kernels import gelu_triton

    return gelu_triton.forward(x, bias, tanh)


def _forward_fake(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, bias, ctx.tanh = inputs
    ctx.save_for_backward(x, bias)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, bias = ctx.saved_tensors
    dx, dbias, _ = backward(grad, x, bias, ctx.tanh, False)
    return dx, None if bias is None else dbias, None


def _backward(grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    from dltrain.kernels import gelu_triton

    return gelu_triton.backward(grad, x, bias, tanh, again)


def _backward_fake(
    grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, again: bool
) -> tuple[Tensor, Tensor, Tensor]:
    dx, y = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    return dx, x.new_empty(0 if bias is None else bias.shape), y if again else x.new_empty(0)


backward = register(
    "gelu_backward(Tensor grad, Tensor x, Tensor? bias, bool tanh, bool again) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
forward = register(
    "gelu_forward(Tensor x, Tensor? bias, bool tanh) -> Tensor",
    _forward,
    _forward_fake,
    setup=_save,
    backward=_differentiate,
)
