"""Triton kernels of lamb.py: the moments with each row's sums of squares, the trust ratios, the step.

The update is computed again for the step rather than kept: the same bytes, and no memory. A row is summed by one
program in one order whoever holds it, and a tensor's rows by one program in the order of the whole tensor.

Legend: T tensors, R rows of all of them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels import multi_tensor
from dltrain.kernels.adamw_triton import TYPES, pointer
from dltrain.kernels.launch import config, on_device


@triton.jit
def _direction(w, m, v, unbias, root, eps, decay):
    return m * unbias / (tl.sqrt(v) / root + eps) + decay * w


@triton.jit
def _moments_of(
    i, keep, param, grad, exp_avg, exp_avg_sq, factor, rate1, beta2, rate2, eps, decay, unbias, root, lr,
    ACC: tl.constexpr, ADAPT: tl.constexpr,
):  # fmt: skip
    """Step the moments of elements i; if not ADAPT, the weights too. Returns weights and directions, else 0."""
    w = tl.load(param + i, mask=keep, other=0.0).to(ACC)
    g = tl.load(grad + i, mask=keep, other=0.0).to(ACC) * factor
    m = tl.load(exp_avg + i, mask=keep, other=0.0).to(ACC)
    v = tl.load(exp_avg_sq + i, mask=keep, other=0.0).to(ACC)
    m = (m + rate1 * (g - m)).to(exp_avg.dtype.element_ty)  # as the second kernel will read them
    v = (v * beta2 + rate2 * g * g).to(exp_avg_sq.dtype.element_ty)
    tl.store(exp_avg + i, m, mask=keep)
    tl.store(exp_avg_sq + i, v, mask=keep)
    u = tl.where(keep, _direction(w, m.to(ACC), v.to(ACC), unbias, root, eps, decay), 0.0)
    if not ADAPT:
        tl.store(param + i, (w - lr * u).to(param.dtype.element_ty), mask=keep)
    return w, u


@triton.jit
def _moments(
    table, numbers, spans, scale, good, squares,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, ADAPT: tl.constexpr, ALIGNED: tl.constexpr,
    ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p has span p, and if ADAPT writes its sums of squared weights and directions to squares[p]."""
    pid = tl.program_id(0).to(tl.int64)
    t, first, count = tl.load(spans + pid * 3), tl.load(spans + pid * 3 + 1), tl.load(spans + pid * 3 + 2)
    if good is not None:
        count *= tl.load(good)
    param = pointer(table + t * 4, 0, WEIGHT, ALIGNED)
    grad = pointer(table + t * 4, 1, GRAD, ALIGNED)
    exp_avg = pointer(table + t * 4, 2, STATE, ALIGNED)
    exp_avg_sq = pointer(table + t * 4, 3, STATE, ALIGNED)
    rate1, beta2, rate2 = tl.load(numbers).to(ACC), tl.load(numbers + 1).to(ACC), tl.load(numbers + 2).to(ACC)
    eps, decay, lr = tl.load(numbers + 3).to(ACC), tl.load(numbers + 4).to(ACC), tl.load(numbers + 5).to(ACC)
    unbias, root = tl.load(numbers + 6 + t * 2).to(ACC), tl.load(numbers + 7 + t * 2).to(ACC)
    factor = tl.load(scale).to(ACC) if scale is not None else 1.0
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    lane = tl.arange(0, BLOCK)
    weights = tl.zeros([BLOCK], ACC)
    directions = tl.zeros([BLOCK], ACC)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        w, u = _moments_of(
            first + begin + lane, lane < BLOCK, param, grad, exp_avg, exp_avg_sq, factor,
            rate1, beta2, rate2, eps, decay, unbias, root, lr, ACC, ADAPT,
        )  # fmt: skip
        if ADAPT:
            weights += w * w
            directions += u * u
    if whole < count:
        w, u = _moments_of(
            first + whole + lane, whole + lane < count, param, grad, exp_avg, exp_avg_sq, factor,
            rate1, beta2, rate2, eps, decay, unbias, root, lr, ACC, ADAPT,
        )  # fmt: skip
        if ADAPT:
            weights += w * w
            directions += u * u
    if ADAPT:
        tl.store(squares + pid * 2, tl.sum(weights, 0).to(tl.float64))
        tl.store(squares + pid * 2 + 1, tl.sum(directions, 0).to(tl.float64))


@triton.jit
def _ratios(squares, offsets, ratios, BLOCK: tl.constexpr):
    """ratios[t] = |w| / |u| of tensor t, whose rows are offsets[t] ... offsets[t + 1] - 1; 1 where either is 0."""
    t = tl.program_id(0)
    begin, end = tl.load(offsets + t), tl.load(offsets + t + 1)
    lane = tl.arange(0, BLOCK)
    weights = tl.zeros([BLOCK], tl.float64)
    directions = tl.zeros([BLOCK], tl.float64)
    for row in range(begin, end, BLOCK):
        keep = row + lane < end
        weights += tl.load(squares + (row + lane) * 2, mask=keep, other=0.0)
        directions += tl.load(squares + (row + lane) * 2 + 1, mask=keep, other=0.0)
    w, u = tl.sum(weights, 0), tl.sum(directions, 0)
    some = (w > 0) & (u > 0)
    tl.store(ratios + t, tl.where(some, tl.sqrt(w) / tl.sqrt(tl.where(some, u, 1.0)), 1.0))


@triton.jit
def _apply_to(i, keep, param, exp_avg, exp_avg_sq, eps, decay, unbias, root, rate, ACC: tl.constexpr):
    w = tl.load(param + i, mask=keep, other=0.0).to(ACC)
    m = tl.load(exp_avg + i, mask=keep, other=0.0).to(ACC)
    v = tl.load(exp_avg_sq + i, mask=keep, other=0.0).to(ACC)
    u = _direction(w, m, v, unbias, root, eps, decay)
    tl.store(param + i, (w - rate * u).to(param.dtype.element_ty), mask=keep)


@triton.jit
def _apply(
    table, numbers, spans, ratios, good,
    WEIGHT: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """w -= lr ratio u, span by span."""
    pid = tl.program_id(0).to(tl.int64)
    t, first, count = tl.load(spans + pid * 3), tl.load(spans + pid * 3 + 1), tl.load(spans + pid * 3 + 2)
    if good is not None:
        count *= tl.load(good)
    param = pointer(table + t * 4, 0, WEIGHT, ALIGNED)
    exp_avg = pointer(table + t * 4, 2, STATE, ALIGNED)
    exp_avg_sq = pointer(table + t * 4, 3, STATE, ALIGNED)
    eps, decay = tl.load(numbers + 3).to(ACC), tl.load(numbers + 4).to(ACC)
    rate = (tl.load(numbers + 5) * tl.load(ratios + t)).to(ACC)
    unbias, root = tl.load(numbers + 6 + t * 2).to(ACC), tl.load(numbers + 7 + t * 2).to(ACC)
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        _apply_to(
            first + begin + lane, lane < BLOCK, param, exp_avg, exp_avg_sq, eps, decay, unbias, root, rate, ACC
        )  # fmt: skip
    if whole < count:
        _apply_to(
            first + whole + lane, whole + lane < count, param, exp_avg, exp_avg_sq, eps, decay, unbias, root, rate, ACC
        )  # fmt: skip


# ---- launchers ----


def _prepare(
    tensors: Sequence[Sequence[Tensor]],
    steps: Sequence[int],
    hyper: Sequence[float],
    widths: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, dict[str, Any]]:
    """The table, its numbers, the spans, and what is constant; `tensors` are the table's columns."""
    lr, beta1, beta2, eps, decay = hyper
    params, device = tensors[0], tensors[0][0].device
    numbers = [1.0 - beta1, beta2, 1.0 - beta2, eps, decay, lr]
    for step in steps:
        numbers += 1.0 / (1.0 - beta1**step), (1.0 - beta2**step) ** 0.5
    table, floats = multi_tensor.table([[t.data_ptr() for t in row] for row in zip(*tensors)], numbers, device)
    parts = tuple(widths) or (multi_tensor.PART,) * len(params)
    spans = multi_tensor.spans(tuple(p.numel() for p in params), parts, device)
    constants: dict[str, Any] = {
        "WEIGHT": TYPES[params[0].dtype],
        "STATE": TYPES[tensors[2][0].dtype],
        "ALIGNED": all(part % 16 == 0 for part in parts) and multi_tensor.aligned(*(t for c in tensors for t in c)),
        "ACC": TYPES[torch.promote_types(params[0].dtype, torch.float32)],
        "enable_fp_fusion": False,
    }
    return table, floats, spans, constants | config("lamb", params[0])


def moments(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[int],
    scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    widths: Sequence[int],
    good: Tensor | None = None,
) -> Tensor:
    """Step the moments. Returns [R, 2] float64: of each row, of length `widths`, the squares of weights and directions.

    With no widths there are no trust ratios: the weights are stepped too, and nothing is returned ([0, 2]).
    """
    hyper = lr, beta1, beta2, eps, decay
    table, numbers, spans, constants = _prepare((params, grads, exp_avgs, exp_avg_sqs), steps, hyper, widths)
    squares = torch.empty(len(spans) if widths else 0, 2, dtype=torch.float64, device=params[0].device)
    if len(spans):
        with on_device(params[0]):
            _moments[(len(spans),)](
                table, numbers, spans, scale, good, squares,
                GRAD=TYPES[grads[0].dtype], ADAPT=bool(widths), **constants,
            )  # fmt: skip
    return squares


def apply(
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    squares: Tensor,
    rows: Sequence[int],
    steps: Sequence[int],
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    widths: Sequence[int],
    good: Tensor | None = None,
) -> None:
    """Step the weights; `squares` are those of all rows of the whole tensors, of which each has `rows`."""
    hyper, device = (lr, beta1, beta2, eps, decay), params[0].device
    table, numbers, spans, constants = _prepare((params, params, exp_avgs, exp_avg_sqs), steps, hyper, widths)
    offsets = multi_tensor.offsets(tuple(rows), device)
    ratios = torch.empty(len(rows), dtype=torch.float64, device=device)
    with on_device(params[0]):
        _ratios[(len(rows),)](squares, offsets, ratios, BLOCK=1024)
        if len(spans):
            _apply[(len(spans),)](table, numbers, spans, ratios, good, **constants)
