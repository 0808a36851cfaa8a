"""Triton kernels of cross_entropy.py, which has the formula. A program has one row of logits, or one chunk of one.

The largest logit m and l = log sum_c exp(z[c] - m) are taken in one sweep over chunks of BLOCK columns (Milakov and
Gimelshein 2018, https://arxiv.org/abs/1805.02867, algorithm 3) and kept apart: m + l would lose l's digits where m is
large. Chunks that are full have no mask, so that loads are 128 bits wide wherever rows begin at multiples of 16 bytes.
A target out of range gives NaN and is never read at.

Legend: N rows, V classes.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels.launch import config, on_device


@triton.jit
def _fold(x, m, s, total, inside, SMOOTHED: tl.constexpr):
    """One chunk x into the running maximum m (a scalar), the sums s of exp(x - m) and, if SMOOTHED, of x."""
    new = tl.maximum(m, tl.max(x, 0))
    shift = tl.where(new == -float("inf"), 0.0, new)  # of nothing but -inf: exp(-inf - 0), not exp(-inf + inf)
    s = s * tl.exp(m - shift) + tl.exp(x - shift)
    if SMOOTHED:
        total += tl.where(inside, x, 0.0)
    return new, s, total


@triton.jit
def _statistics(z, V, ACC: tl.constexpr, SMOOTHED: tl.constexpr, BLOCK: tl.constexpr):
    """m and l of the row at z, and the sum of its logits (0 unless SMOOTHED)."""
    lane = tl.arange(0, BLOCK)
    m = tl.full([], -float("inf"), ACC)
    s = tl.zeros([BLOCK], ACC)
    total = tl.zeros([BLOCK], ACC)
    full = V // BLOCK * BLOCK
    for start in range(0, full, BLOCK):
        x = tl.load(z + start + lane).to(ACC)
        m, s, total = _fold(x, m, s, total, lane < BLOCK, SMOOTHED)
    if full < V:
        x = tl.load(z + full + lane, mask=full + lane < V, other=-float("inf")).to(ACC)
        m, s, total = _fold(x, m, s, total, full + lane < V, SMOOTHED)
    return m, tl.log(tl.sum(s, 0)), tl.sum(total, 0)


@triton.jit
def _loss(z, t, m, l, total, V, ignore_index, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr):
    """The loss of a row with target t, and l made NaN where t is out of range, so that its gradient is NaN too."""
    valid = (t >= 0) & (t < V)
    picked = tl.load(z + t, mask=valid, other=0.0).to(ACC)
    l = tl.where(valid | (t == ignore_index), l, float("nan"))
    loss = l + (m - picked)
    if SMOOTHING > 0:
        loss = (1 - SMOOTHING) * loss + SMOOTHING * (l + (m - total / V))
    if Z_LOSS > 0:
        loss += Z_LOSS * (m + l) * (m + l)
    return tl.where(t == ignore_index, 0.0, loss), l


@triton.jit
def _gradient(x, column, t, m, l, V, factor, SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr):
    """`factor` times the derivative of a row's loss by the logits x in `column`."""
    p = tl.exp((x - m) - l)
    if Z_LOSS > 0:
        p *= 1 + 2 * Z_LOSS * (m + l)
    if SMOOTHING > 0:
        p -= tl.full([], SMOOTHING, ACC) / V
    return factor * tl.where(column == t, p - (1 - SMOOTHING), p)


@triton.jit
def _forward(
    logits, target, loss, statistics, stride, N, V, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    z = logits + row * stride
    t = tl.load(target + row)
    m, l, total = _statistics(z, V, ACC, SMOOTHING > 0, BLOCK)
    value, l = _loss(z, t, m, l, total, V, ignore_index, SMOOTHING, Z_LOSS, ACC)
    tl.store(loss + row, value)
    tl.store(statistics + row, m)
    tl.store(statistics + N + row, l)


@triton.jit
def _backward(
    grad, logits, target, statistics, dlogits, grad_stride, stride, out_stride, N, V, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One chunk of one row: nothing is summed. dlogits may be the logits themselves."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    t = tl.load(target + row)
    m = tl.load(statistics + row)
    l = tl.load(statistics + N + row)
    factor = tl.load(grad + row * grad_stride).to(ACC)
    z, dz = logits + row * stride + column, dlogits + row * out_stride + column
    if t == ignore_index:
        tl.store(dz, tl.zeros([BLOCK], ACC).to(dlogits.dtype.element_ty), mask=column < V)
    elif tl.program_id(1) * BLOCK + BLOCK <= V:
        x = tl.load(z).to(ACC)
        dx = _gradient(x, column, t, m, l, V, factor, SMOOTHING, Z_LOSS, ACC)
        tl.store(dz, dx.to(dlogits.dtype.element_ty))
    else:
        x = tl.load(z, mask=column < V, other=-float("inf")).to(ACC)
        dx = _gradient(x, column, t, m, l, V, factor, SMOOTHING, Z_LOSS, ACC)
        tl.store(dz, dx.to(dlogits.dtype.element_ty), mask=column < V)


@triton.jit
def _in_place(
    logits, target, loss, scale, stride, V, ignore_index,
    SMOOTHING: tl.constexpr, Z_LOSS: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The loss of a row, and over its logits `scale` times their gradient: the second sweep finds them in the cache."""
    row = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    z = logits + row * stride
    t = tl.load(target + row)
    factor = tl.load(scale).to(ACC)
    m, l, total = _statistics(z, V, ACC, SMOOTHING > 0, BLOCK)
    value, l = _loss(z, t, m, l, total, V, ignore_index, SMOOTHING, Z_LOSS, ACC)
    tl.store(loss + row, value)
    tl.debug_barrier()  # every thread has read the target's logit before one writes over it
    full = V // BLOCK * BLOCK
    kept = t != ignore_index
    for start in range(0, full, BLOCK):
        x = tl.load(z + start + lane).to(ACC)
        dx = tl.where(kept, _gradient(x, start + lane, t, m, l, V, factor, SMOOTHING, Z_LOSS, ACC), 0.0)
        tl.store(z + start + lane, dx.to(logits.dtype.element_ty))
    if full < V:
        x = tl.load(z + full + lane, mask=full + lane < V, other=-float("inf")).to(ACC)
        dx = tl.where(kept, _gradient(x, full + lane, t, m, l, V, factor, SMOOTHING, Z_LOSS, ACC), 0.0)
        tl.store(z + full + lane, dx.to(logits.dtype.element_ty), mask=full + lane < V)


@triton.jit
def _scale_rows(grad, matrix, grad_stride, stride, V, ACC: tl.constexpr, BLOCK: tl.constexpr):
    """matrix[n] *= grad[n], one chunk a program; a row whose factor is 1, as of a summed loss, is not touched."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    factor = tl.load(grad + row * grad_stride).to(ACC)
    at = matrix + row * stride + column
    if factor != 1.0:
        if tl.program_id(1) * BLOCK + BLOCK <= V:
            tl.store(at, (tl.load(at).to(ACC) * factor).to(matrix.dtype.element_ty))
        else:
            x = tl.load(at, mask=column < V, other=0.0).to(ACC)
            tl.store(at, (x * factor).to(matrix.dtype.element_ty), mask=column < V)


# ---- launchers ----


def _use(logits: Tensor) -> dict[str, Any]:
    acc = tl.float64 if logits.dtype == torch.float64 else tl.float32
    return {"ACC": acc, **config("cross_entropy", logits, width=logits.shape[1])}


def _with_rows(matrix: Tensor) -> Tensor:
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def forward(
    logits: Tensor, target: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> tuple[Tensor, Tensor]:
    """Losses [N] and the statistics m, l [2, N] that backward needs."""
    (N, V), acc = logits.shape, torch.promote_types(logits.dtype, torch.float32)
    loss, statistics = logits.new_empty(N, dtype=acc), logits.new_empty(2, N, dtype=acc)
    logits, target = _with_rows(logits), target.contiguous()
    if N:
        with on_device(logits):
            _forward[(N,)](
                logits, target, loss, statistics, logits.stride(0), N, V, ignore_index,
                SMOOTHING=label_smoothing, Z_LOSS=z_loss, **_use(logits),
            )  # fmt: skip
    return loss, statistics


def backward(
    grad: Tensor,
    logits: Tensor,
    target: Tensor,
    statistics: Tensor,
    ignore_index: int,
    label_smoothing: float,
    z_loss: float,
    out: Tensor | None = None,
) -> Tensor:
    """The logits' gradient, in new memory or in `out`, which may be the logits; `grad` [N] has any stride."""
    N, V = logits.shape
    dlogits = logits.new_empty(N, V) if out is None else out
    logits, target = _with_rows(logits), target.contiguous()
    use = _use(logits)
    if N:
        with on_device(logits):
            _backward[N, triton.cdiv(V, use["BLOCK"])](
                grad, logits, target, statistics, dlogits,
                grad.stride(0), logits.stride(0), dlogits.stride(0), N, V, ignore_index,
                SMOOTHING=label_smoothing, Z_LOSS=z_loss, **use,
            )  # fmt: skip
    return dlogits


def in_place(
    logits: Tensor, target: Tensor, scale: Tensor, ignore_index: int, label_smoothing: float, z_loss: float
) -> Tensor:
    """Losses [N]; logits, whose rows are contiguous, become `scale` (a scalar tensor) times their sum's gradient."""
    N, V = logits.shape
    loss = logits.new_empty(N, dtype=torch.promote_types(logits.dtype, torch.float32))
    if N:
        with on_device(logits):
            _in_place[(N,)](
                logits, target.contiguous(), loss, scale, logits.stride(0), V, ignore_index,
                SMOOTHING=label_smoothing, Z_LOSS=z_loss, **_use(logits),
            )  # fmt: skip
    return loss


def scale_rows(matrix: Tensor, grad: Tensor) -> None:
    """matrix[n] *= grad[n]."""
    (N, V), use = matrix.shape, _use(matrix)
    if N:
        with on_device(matrix):
            _scale_rows[N, triton.cdiv(V, use["BLOCK"])](grad, matrix, grad.stride(0), matrix.stride(0), V, **use)
