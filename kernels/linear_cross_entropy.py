"""Cross-entropy of a linear layer's logits, which never exist all at once.

    loss_i = cross_entropy(h_i W^T + b, t_i)

Rows are taken in chunks whose logits fit in `chunk_bytes`: their logits, their losses and over the logits their
gradient (cross_entropy.py), and from that their part of dh, dW and db: three products where a loss that is reduced
knows its gradient at once. Losses of rows are known to backward only, which makes the logits again: four products.
dW and db are summed over chunks in float32.

Legend: N rows, D features, V classes.
"""

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels import cross_entropy as ce
from dltrain.kernels.dispatch import use_kernel
from dltrain.kernels.registration import register

GRAIN = 128  # rows: what chunks are multiples of, for the matrix products' tiles


def reference(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Input [N, D], weight [V, D], bias [V], class numbers [N] -> a float32 scalar, or [N] with reduction="none".

    The names are those of torch.nn.functional.linear_cross_entropy (torch 2.13).
    """
    return ce.reference(
        F.linear(input, linear_weight, linear_bias),
        target,
        ignore_index=ignore_index,
        reduction=reduction,
        label_smoothing=label_smoothing,
        z_loss=z_loss,
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
    """As `reference`, in chunks whose logits have at most `chunk_bytes`, but at least GRAIN rows.

    Raises:
        IndexError: a target out of range, on a CPU. On a GPU its loss and gradient are NaN.
    """
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        input, linear_weight = input.to(dtype), linear_weight.to(dtype)
        linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    options = (ignore_index, label_smoothing, z_loss)
    if _refused(input, linear_weight, linear_bias, target, reduction, label_smoothing) or not use_kernel(
        "linear_cross_entropy",
        _unsupported(input, linear_weight, linear_bias, target),
        input,
        linear_weight,
        linear_bias,
    ):
        return reference(
            input,
            linear_weight,
            target,
            linear_bias=linear_bias,
            reduction=reduction,
            ignore_index=ignore_index,
            label_smoothing=label_smoothing,
            z_loss=z_loss,
        )
    if reduction == "none":
        return rows_forward(input, linear_weight, linear_bias, target, *options, chunk_bytes)[0]
    scale = torch.ones((), dtype=ce.accumulates(input), device=input.device)
    if reduction == "mean":
        scale = scale / (target != ignore_index).sum()
    return sum_forward(
        input,
        linear_weight,
        linear_bias,
        target,
        scale,
        *options,
        chunk_bytes,
        _wanted(input, linear_weight, linear_bias),
    )[0]


def _wanted(*inputs: Tensor | None) -> list[bool]:
    return [torch.is_grad_enabled() and x is not None and x.requires_grad for x in inputs]


def _refused(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, label_smoothing: float
) -> bool:
    """Whether torch refuses the arguments, in words of its own."""
    return (
        not (input.ndim and weight.ndim == 2 and input.shape[-1] == weight.shape[1])
        or weight.dtype != input.dtype
        or target.device != input.device
        or (bias is not None and (bias.dtype != input.dtype or bias.shape != weight.shape[:1]))
        or ce.refused((*input.shape[:-1], len(weight)), target, reduction, label_smoothing)
    )


def _unsupported(input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> str:
    """What no kernel does."""
    if input.ndim != 2 or not weight.numel():
        return f"an input of shape {tuple(input.shape)} and a weight of shape {tuple(weight.shape)}"
    return (
        "class probabilities" if target.is_floating_point() else "" if target.dtype == torch.int64 else "such targets"
    )


# ---- chunks ----


def _chunks(input: Tensor, weight: Tensor, bias: Tensor | None, chunk_bytes: int) -> Iterator[tuple[slice, Tensor]]:
    """Slices of the rows and their logits, all in one memory, whose rows begin at multiples of 16 elements."""
    (N, _), V = input.shape, len(weight)
    stride = -(-V // 16) * 16
    rows = max(GRAIN, chunk_bytes // (stride * input.element_size()) // GRAIN * GRAIN)
    memory = input.new_empty(min(N, rows), stride)[:, :V]
    for start in range(0, N, rows):
        h = input[start : start + rows]
        logits = memory[: len(h)]
        if bias is None:
            torch.mm(h, weight.T, out=logits)
        else:
            torch.addmm(bias, h, weight.T, out=logits)
        yield slice(start, start + len(h)), logits


class _Gradients:
    """dh, dW and db, those that are wanted, from the logits' gradients chunk by chunk; the others stay empty."""

    def __init__(self, input: Tensor, weight: Tensor, wanted: list[bool]):
        self.input, self.weight, self.wanted = input, weight, wanted
        acc = ce.accumulates(input)
        self.of_input = input.new_empty(input.shape) if wanted[0] else input.new_empty(0)
        self.of_weight = input.new_zeros(weight.shape if wanted[1] else 0, dtype=acc)
        self.of_bias = input.new_zeros(len(weight) if wanted[2] else 0, dtype=acc)

    def add(self, rows: slice, dlogits: Tensor) -> None:
        if self.wanted[0]:
            torch.mm(dlogits, self.weight, out=self.of_input[rows])
        if self.wanted[1]:
            _add_product(self.of_weight, dlogits.T, self.input[rows])
        if self.wanted[2]:
            self.of_bias += dlogits.sum(0, dtype=self.of_bias.dtype)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in total's type; on a GPU the product is never rounded to the type of a and b."""
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif total.device.type == "cuda":
        torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    else:
        total.addmm_(a.to(total.dtype), b.to(total.dtype))


# ---- a loss that is summed: its gradients come with it ----


def _sum_forward(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from dltrain.kernels import cross_entropy_triton as kernels

    ce.check_targets(len(weight), target, ignore_index)
    options = ignore_index, label_smoothing, z_loss
    grads = _Gradients(input, weight, wanted)
    losses = input.new_empty(len(input), dtype=scale.dtype)
    for rows, logits in _chunks(input, weight, bias, chunk_bytes):
        if any(wanted):
            losses[rows] = kernels.in_place(logits, target[rows], scale, *options)
            grads.add(rows, logits)
        else:
            losses[rows], _ = kernels.forward(logits, target[rows], *options)
    return losses.sum() * scale, grads.of_input, grads.of_weight, grads.of_bias


def _sum_forward_fake(input: Tensor, weight: Tensor, bias: Any, target: Tensor, scale: Tensor, *rest: Any) -> Any:
    wanted, acc = rest[-1], scale.dtype
    of_input = input.new_empty(input.shape) if wanted[0] else input.new_empty(0)
    of_weight = input.new_empty(weight.shape if wanted[1] else 0, dtype=acc)
    return torch.empty_like(scale), of_input, of_weight, input.new_empty(len(weight) if wanted[2] else 0, dtype=acc)


def _sum_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(*inputs[:3], *output[1:])
    ctx.wanted = inputs[-1]


def _sum_differentiate(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    found = sum_backward(grad, *ctx.saved_tensors)
    return *(g if w else None for g, w in zip(found, ctx.wanted)), *(None,) * 7


def _sum_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    of_input: Tensor,
    of_weight: Tensor,
    of_bias: Tensor,
) -> tuple[Tensor, ...]:
    """The gradients times that of the loss, in the types of what they are of."""
    return tuple(torch.mul(g, grad, out=torch.empty_like(g, dtype=input.dtype)) for g in (of_input, of_weight, of_bias))


def _sum_backward_fake(grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *found: Tensor) -> Any:
    return tuple(torch.empty_like(g, dtype=input.dtype) for g in found)


# ---- the losses of rows: backward makes the logits again ----


def _rows_forward(
    input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, *rest: Any
) -> tuple[Tensor, Tensor]:
    from dltrain.kernels import cross_entropy_triton as kernels

    *options, chunk_bytes = rest
    ce.check_targets(len(weight), target, options[0])
    acc = ce.accumulates(input)
    losses, statistics = input.new_empty(len(input), dtype=acc), input.new_empty(2, len(input), dtype=acc)
    for rows, logits in _chunks(input, weight, bias, chunk_bytes):
        losses[rows], statistics[:, rows] = kernels.forward(logits, target[rows], *options)
    return losses, statistics


def _rows_forward_fake(input: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    losses = input.new_empty(len(input), dtype=ce.accumulates(input))
    return losses, losses.new_empty(2, len(losses))


def _rows_save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*inputs[:4], output[1])
    ctx.rest = inputs[4:]


def _rows_differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    wanted = list(ctx.needs_input_grad[:3])
    found = rows_backward(grad, *ctx.saved_tensors, *ctx.rest, wanted)
    return *(g if w else None for g, w in zip(found, wanted)), *(None,) * 5


def _rows_backward(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    chunk_bytes: int,
    wanted: list[bool],
) -> tuple[Tensor, ...]:
    from dltrain.kernels import cross_entropy_triton as kernels

    grads = _Gradients(input, weight, wanted)
    for rows, logits in _chunks(input, weight, bias, chunk_bytes):
        part = statistics[:, rows].contiguous()
        kernels.backward(grad[rows], logits, target[rows], part, ignore_index, label_smoothing, z_loss, out=logits)
        grads.add(rows, logits)
    return grads.of_input, grads.of_weight.to(weight.dtype), grads.of_bias.to(input.dtype)


def _rows_backward_fake(grad: Tensor, input: Tensor, weight: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    wanted = rest[-1]
    of_input = input.new_empty(input.shape) if wanted[0] else input.new_empty(0)
    of_weight = weight.new_empty(weight.shape) if wanted[1] else input.new_empty(0)
    return of_input, of_weight, input.new_empty(len(weight) if wanted[2] else 0)


_TENSORS = "Tensor input, Tensor weight, Tensor? bias"
_OPTIONS = "SymInt ignore_index, float label_smoothing, float z_loss, SymInt chunk_bytes"
sum_backward = register(
    f"linear_cross_entropy_sum_backward(Tensor grad, {_TENSORS}, Tensor of_input, Tensor of_weight, Tensor of_bias)"
    " -> (Tensor, Tensor, Tensor)",
    _sum_backward,
    _sum_backward_fake,
)
sum_forward = register(
    f"linear_cross_entropy_sum({_TENSORS}, Tensor target, Tensor scale, {_OPTIONS}, bool[] wanted)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _sum_forward,
    _sum_forward_fake,
    setup=_sum_save,
    backward=_sum_differentiate,
)
rows_backward = register(
    f"linear_cross_entropy_rows_backward(Tensor grad, {_TENSORS}, Tensor target, Tensor statistics, {_OPTIONS},"
    " bool[] wanted) -> (Tensor, Tensor, Tensor)",
    _rows_backward,
    _rows_backward_fake,
)
rows_forward = register(
    f"linear_cross_entropy_rows({_TENSORS}, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    _rows_forward,
    _rows_forward_fake,
    setup=_rows_save,
    backward=_rows_differentiate,
)
