"""Cross-entropy of a softmax. Label smoothing: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 7.

    loss_i = (1 - s) (lse_i - z_i[t_i]) + s (lse_i - mean_c z_i[c]) + z_loss lse_i^2,   lse_i = log sum_c exp(z_i[c])

Logits z, targets t, smoothing s. z_loss keeps lse near 0 (Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311,
section 5). Rows whose target is `ignore_index` give 0 and do not count in the mean.

Legend: N rows, V classes.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels.dispatch import use_kernel
from dltrain.kernels.registration import register


def reference(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """Logits [N, C, ...] and class numbers [N, ...] -> a float32 scalar, or [N, ...] with reduction="none".

    In float32 whatever the logits: bfloat16 has 8 bits, so a loss near 10 would come in steps of 0.06. float64 stays.
    Class weights [C] and class probabilities [N, C, ...] as in torch, but not with z_loss.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    if not z_loss:
        return F.cross_entropy(
            logits,
            target,
            weight,
            ignore_index=ignore_index,
            reduction=reduction,
            label_smoothing=label_smoothing,
        )
    if weight is not None or target.is_floating_point():
        raise ValueError("z_loss is not defined with class weights or class probabilities: leave one of them out")
    rows = F.cross_entropy(logits, target, ignore_index=ignore_index, reduction="none", label_smoothing=label_smoothing)
    kept = target != ignore_index
    rows = rows + z_loss * torch.where(kept, logits.logsumexp(1).square(), 0.0)
    return reduced(rows, kept, reduction)


def reduced(rows: Tensor, kept: Tensor, reduction: str) -> Tensor:
    """The sum of the rows' losses, their mean over those that are kept, or themselves."""
    if reduction == "none":
        return rows
    return rows.sum() if reduction == "sum" else rows.sum() / kept.sum()


def cross_entropy(
    logits: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    inplace: bool = False,
) -> Tensor:
    """As `reference`. `inplace` allows the gradient to take the logits' memory, and to be made with the loss.

    That moves two thirds of the bytes. The logits hold no logits afterwards; if another node of the graph has saved
    them, its backward raises, as does a second backward of this one.

    Raises:
        ValueError: where `inplace` cannot be: logits that are a leaf of the graph, or whose rows are not contiguous.
        IndexError: a target out of range, on a CPU. On a GPU its loss and gradient are NaN: looking would cost a wait.
    """
    options = {"ignore_index": ignore_index, "label_smoothing": label_smoothing, "z_loss": z_loss}
    refuse = target.device != logits.device or refused(logits.shape, target, reduction, label_smoothing)
    if refuse or not use_kernel("cross_entropy", unsupported(logits, target, weight), logits):
        return reference(logits, target, weight, reduction=reduction, **options)
    kept = target != ignore_index
    if inplace and logits.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        scale = torch.ones((), dtype=accumulates(logits), device=logits.device)
        if reduction == "mean":
            scale = scale / kept.sum()
        rows: Any = _InPlace.apply(logits, target, scale, *options.values())
        return rows if reduction == "none" else rows.sum()
    rows, _ = forward(logits, target, *options.values())
    return reduced(rows, kept, reduction)


def refused(shape: Sequence[int], target: Tensor, reduction: str, label_smoothing: float) -> bool:
    """Whether torch refuses to compare logits of this shape with the target, in words of its own."""
    return (
        (target.shape != ((*shape[:1], *shape[2:]) if len(shape) > 1 else ()) and target.shape != shape)
        or not (target.dtype in (torch.int64, torch.uint8) or target.is_floating_point())
        or reduction not in ("none", "mean", "sum")
        or not 0.0 <= label_smoothing <= 1.0
    )


def unsupported(logits: Tensor, target: Tensor, weight: Tensor | None) -> str:
    """What no kernel does."""
    if target.is_floating_point():
        return "class probabilities"
    if weight is not None:
        return "class weights"
    if target.dtype != torch.int64:
        return f"targets of {target.dtype}"
    if logits.ndim != 2 or not logits.shape[1]:
        return f"logits of shape {tuple(logits.shape)}"
    return ""


def accumulates(like: Tensor) -> torch.dtype:
    """The type that losses are computed in."""
    return torch.promote_types(like.dtype, torch.float32)


def check_targets(classes: int, target: Tensor, ignore_index: int) -> None:
    """Raise torch's IndexError for a target out of range, where looking is free: on a CPU."""
    if target.device.type == "cpu":
        wrong = target[((target < 0) | (target >= classes)) & (target != ignore_index)]
        if wrong.numel():
            raise IndexError(f"Target {int(wrong[0])} is out of bounds.")


# ---- two passes over separate memory: the forward op and its backward ----


def _run_forward(logits: Tensor, target: Tensor, ignore_index: int, *options: float) -> tuple[Tensor, Tensor]:
    from dltrain.kernels import cross_entropy_triton

    check_targets(logits.shape[1], target, ignore_index)
    return cross_entropy_triton.forward(logits, target, ignore_index, *options)


def _fake_forward(logits: Tensor, target: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    rows = _fake_rows(logits)
    return rows, rows.new_empty(2, len(rows))


def _fake_rows(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape[0], dtype=accumulates(logits))


def _run_backward(*inputs: Any) -> Tensor:
    from dltrain.kernels import cross_entropy_triton

    return cross_entropy_triton.backward(*inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.save_for_backward(inputs[0], inputs[1], output[1])
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[2:]


def _differentiate(ctx: Any, grad: Tensor, _: Any) -> tuple[Any, ...]:
    return backward(grad, *ctx.saved_tensors, *ctx.options), *(None,) * (1 + len(ctx.options))


_OPTIONS = "SymInt ignore_index, float label_smoothing, float z_loss"
backward = register(
    f"cross_entropy_backward(Tensor grad, Tensor logits, Tensor target, Tensor statistics, {_OPTIONS}) -> Tensor",
    _run_backward,
    lambda grad, logits, *_: logits.new_empty(logits.shape),
)
forward = register(
    f"cross_entropy_forward(Tensor logits, Tensor target, {_OPTIONS}) -> (Tensor, Tensor)",
    _run_forward,
    _fake_forward,
    setup=_save,
    backward=_differentiate,
)


# ---- the gradient over the logits themselves ----


def _run_in_place(logits: Tensor, target: Tensor, scale: Tensor, ignore_index: int, *options: float) -> Tensor:
    from dltrain.kernels import cross_entropy_triton

    check_targets(logits.shape[1], target, ignore_index)
    return cross_entropy_triton.in_place(logits, target, scale, ignore_index, *options)


def _run_scale(matrix: Tensor, grad: Tensor) -> None:
    from dltrain.kernels import cross_entropy_triton

    cross_entropy_triton.scale_rows(matrix, grad)


in_place = register(
    f"cross_entropy_in_place(Tensor(a!) logits, Tensor target, Tensor scale, {_OPTIONS}) -> Tensor",
    _run_in_place,
    _fake_rows,
)
scale_rows = register("scale_rows(Tensor(a!) matrix, Tensor grad) -> ()", _run_scale, lambda *_: None)


class _InPlace(torch.autograd.Function):
    """`scale` times the losses of the rows; the logits become their gradient, which backward multiplies row by row.

    Autograd counts what is written here as versions of the logits, so that whoever else needs them raises.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor, scale: Tensor, *options: Any) -> Tensor:
        if logits.is_leaf:
            raise ValueError("inplace=True would overwrite a leaf of the graph: leave it out")
        N, V = logits.shape
        if (V > 1 and logits.stride(1) != 1) or (N > 1 and logits.stride(0) < V):
            raise ValueError(f"inplace=True needs contiguous rows, not strides {logits.stride()}: leave it out")
        rows = in_place(logits.detach(), target, scale, *options)
        torch.autograd.graph.increment_version(logits)
        ctx.save_for_backward(logits)
        return rows * scale

    @staticmethod
    def backward(ctx: Any, grad: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("cross_entropy(inplace=True) cannot be differentiated twice: leave inplace out")
        (logits,) = ctx.saved_tensors
        matrix = logits.detach()
        scale_rows(matrix, grad)
        torch.autograd.graph.increment_version(logits)
        return matrix, *(None,) * 5
