"""The Triton kernel of adamw.py: one launch for many tensors, each number read and written once.

Elementwise, and compiled without fused multiply-adds: an element's bits depend on its own history alone, not on how
its tensor is cut, sharded or aligned. Four elements a thread: eight would pass through shared memory where types mix.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels import multi_tensor
from dltrain.kernels.launch import config, on_device

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def pointer(table, column: tl.constexpr, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """An address of the table as a pointer."""
    at = tl.load(table + column).to(tl.pointer_type(TYPE))
    if ALIGNED:
        at = tl.multiple_of(at, 16)
    return at


@triton.jit
def round_at_random(x, random):
    """float32 -> bfloat16, up with the probability of what is cut off; `random` are 32 bits, of which 16 count."""
    bits = x.to(tl.uint32, bitcast=True) + (random & 0xFFFF)
    rounded = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return tl.where(x == x, rounded, x).to(tl.bfloat16)  # a NaN's bits could carry into the sign


@triton.jit
def _update(
    i, keep, param, grad, exp_avg, exp_avg_sq, master, shrink, rate1, beta2, rate2, eps, step_size, root, factor,
    seed, start, index, step, ACC: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """Elements i, those that `keep` has."""
    if master is not None:
        w = tl.load(master + i, mask=keep, other=0.0).to(ACC)
    else:
        w = tl.load(param + i, mask=keep, other=0.0).to(ACC)
    g = tl.load(grad + i, mask=keep, other=0.0).to(ACC) * factor
    m = tl.load(exp_avg + i, mask=keep, other=0.0).to(ACC)
    v = tl.load(exp_avg_sq + i, mask=keep, other=0.0).to(ACC)
    m += rate1 * (g - m)
    v = v * beta2 + rate2 * g * g
    w = w * shrink - step_size * (m / (tl.sqrt(v) / root + eps))
    tl.store(exp_avg + i, m.to(exp_avg.dtype.element_ty), mask=keep)
    tl.store(exp_avg_sq + i, v.to(exp_avg_sq.dtype.element_ty), mask=keep)
    if master is not None:
        tl.store(master + i, w, mask=keep)
    if STOCHASTIC:
        e = start + i
        c2 = tl.zeros_like(e) + index
        c3 = tl.zeros_like(e) + step
        random, _, _, _ = tl.philox(
            seed, e.to(tl.uint32), (e >> 32).to(tl.uint32), c2.to(tl.uint32), c3.to(tl.uint32), 7
        )
        tl.store(param + i, round_at_random(w, random), mask=keep)
    else:
        tl.store(param + i, w.to(param.dtype.element_ty), mask=keep)


@triton.jit
def _adamw(
    table, numbers, spans, scale, good, seed,
    WEIGHT: tl.constexpr, GRAD: tl.constexpr, STATE: tl.constexpr, MASTER: tl.constexpr, STOCHASTIC: tl.constexpr,
    ALIGNED: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program p has span p. `numbers` are those of the group, then two for each tensor."""
    span = spans + tl.program_id(0).to(tl.int64) * 3
    t, first, count = tl.load(span), tl.load(span + 1), tl.load(span + 2)
    if good is not None:
        count *= tl.load(good)
    row = table + t * 8
    param = pointer(row, 0, WEIGHT, ALIGNED)
    grad = pointer(row, 1, GRAD, ALIGNED)
    exp_avg = pointer(row, 2, STATE, ALIGNED)
    exp_avg_sq = pointer(row, 3, STATE, ALIGNED)
    master = pointer(row, 4, tl.float32, ALIGNED) if MASTER else None
    start, index, step = tl.load(row + 5), tl.load(row + 6), tl.load(row + 7)
    shrink, rate1 = tl.load(numbers).to(ACC), tl.load(numbers + 1).to(ACC)
    beta2, rate2 = tl.load(numbers + 2).to(ACC), tl.load(numbers + 3).to(ACC)
    eps = tl.load(numbers + 4).to(ACC)
    step_size, root = tl.load(numbers + 5 + t * 2).to(ACC), tl.load(numbers + 6 + t * 2).to(ACC)
    factor = tl.load(scale).to(ACC) if scale is not None else 1.0
    key = tl.load(seed) if STOCHASTIC else 0
    if ALIGNED:
        first = tl.multiple_of(first, 16)
    lane = tl.arange(0, BLOCK)
    whole = count // BLOCK * BLOCK
    for begin in range(0, whole, BLOCK):
        _update(
            first + begin + lane, lane < BLOCK, param, grad, exp_avg, exp_avg_sq, master,
            shrink, rate1, beta2, rate2, eps, step_size, root, factor, key, start, index, step, ACC, STOCHASTIC,
        )  # fmt: skip
    if whole < count:
        _update(
            first + whole + lane, whole + lane < count, param, grad, exp_avg, exp_avg_sq, master,
            shrink, rate1, beta2, rate2, eps, step_size, root, factor, key, start, index, step, ACC, STOCHASTIC,
        )  # fmt: skip


def step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    masters: Sequence[Tensor],
    steps: Sequence[int],
    scale: Tensor | None,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
    seed: Tensor | None,
    indices: Sequence[int],
    starts: Sequence[int],
    good: Tensor | None = None,
) -> None:
    """One step of tensors that share their types; see adamw.py."""
    device, sizes = params[0].device, tuple(p.numel() for p in params)
    none: list[Tensor | None] = [None] * len(params)
    buckets: dict[bool, list[int]] = {}
    for i, row in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, masters or none, strict=True)):
        if sizes[i]:
            buckets.setdefault(multi_tensor.aligned(*row), []).append(i)
    wide = torch.promote_types(params[0].dtype, torch.float32)
    for is_aligned, members in buckets.items():
        addresses, numbers = [], [1.0 - lr * decay, 1.0 - beta1, beta2, 1.0 - beta2, eps]
        for i in members:
            row = params[i], grads[i], exp_avgs[i], exp_avg_sqs[i]
            master = masters[i].data_ptr() if masters else 0
            addresses.append([*(t.data_ptr() for t in row), master, starts[i], indices[i], steps[i]])
            numbers += lr / (1.0 - beta1 ** steps[i]), (1.0 - beta2 ** steps[i]) ** 0.5
        table, floats = multi_tensor.table(addresses, numbers, device)
        spans = multi_tensor.spans(tuple(sizes[i] for i in members), (multi_tensor.PART,) * len(members), device)
        options: dict[str, Any] = config("adamw", params[0])
        with on_device(params[0]):
            _adamw[(len(spans),)](
                table, floats, spans, scale, good, seed,
                WEIGHT=TYPES[params[0].dtype], GRAD=TYPES[grads[0].dtype], STATE=TYPES[exp_avgs[0].dtype],
                MASTER=bool(masters), STOCHASTIC=seed is not None, ALIGNED=is_aligned, ACC=TYPES[wide],
                enable_fp_fusion=False, **options,
            )  # fmt: skip
