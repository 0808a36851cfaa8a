"""Kernels of gelu.py. Forward reads x and writes y; backward reads x and dL/dy, and writes dL/dx, the bias gradient's
partial sums, and y again where a caller did not keep it: both move each byte once."""


# M rows, N columns (the length of the bias), P partial sums of the bias gradient

import torch
import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels import launch
from dltrain.kernels.column_sums_triton import column_sums, shares

SPLITS = 4  # programs per processor that share the rows of the bias gradient


@triton.jit
def _load(X, B, rows, columns, M, N, ACC: tl.constexpr):
    """x + bias of a block, the offsets of its elements and which of them exist."""
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    x = tl.load(X + at, mask=mask, other=0.0).to(ACC)
    if B is not None:
        x += tl.load(B + columns, mask=columns < N, other=0.0).to(ACC)[None, :]
    return x, at, mask


@triton.jit
def _gate(x, TANH: tl.constexpr):
    """What x is multiplied by, in (0, 1): Phi(x), or by tanh, (1 + tanh(u)) / 2 = sigmoid(2 u)."""
    if TANH:
        return tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _forward(X, B, Y, M, N, TANH: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    blocks = tl.cdiv(N, BLOCK_N)  # of a row; one axis for all, as the others have 65535 programs at most
    rows = (tl.program_id(0) // blocks).to(tl.int32) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (tl.program_id(0) % blocks).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    x, at, mask = _load(X, B, rows, columns, M, N, ACC)
    tl.store(Y + at, (x * _gate(x, TANH)).to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    G, X, B, DX, Y, PARTIAL, M, N, SHARE,
    TANH: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Program (i, p): columns block i of rows p SHARE ... (p + 1) SHARE - 1."""
    columns = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.program_id(1) * SHARE
    total = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    for first in tl.range(start, tl.minimum(start + SHARE, M), BLOCK_M):
        rows = first + tl.arange(0, BLOCK_M)
        x, at, mask = _load(X, B, rows, columns, M, N, ACC)
        gate = _gate(x, TANH)
        if TANH:
            slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x) * gate * (1.0 - gate)
        else:
            slope = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        dx = tl.load(G + at, mask=mask, other=0.0).to(ACC) * (gate + x * slope)
        tl.store(DX + at, dx.to(DX.dtype.element_ty), mask=mask)
        if Y is not None:
            tl.store(Y + at, (x * gate).to(Y.dtype.element_ty), mask=mask)
        if PARTIAL is not None:
            total += dx  # masked lanes of dL/dy are 0
    if PARTIAL is not None:
        tl.store(PARTIAL + tl.program_id(1).to(tl.int64) * N + columns, tl.sum(total, 0), mask=columns < N)


def _plan(kernel: str, x: Tensor, bias: Tensor | None) -> tuple[int, int, tl.dtype, dict]:
    """M, N, the type to compute in and the configuration: without a bias all elements are one row."""
    n = x.numel() if bias is None else bias.numel()
    use = launch.config(kernel if bias is None else f"{kernel}_bias", x)
    return x.numel() // n, n, tl.float64 if x.dtype == torch.float64 else tl.float32, use


def forward(x: Tensor, bias: Tensor | None, tanh: bool) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    if x.numel():
        m, n, acc, use = _plan("gelu_forward", x, bias)
        grid = (triton.cdiv(n, use["BLOCK_N"]) * triton.cdiv(m, use["BLOCK_M"]),)
        with launch.on_device(x):
            _forward[grid](x, bias, y, m, n, TANH=tanh, ACC=acc, **use)
    return y


def backward(grad: Tensor, x: Tensor, bias: Tensor | None, tanh: bool, again: bool) -> tuple[Tensor, Tensor, Tensor]:
    grad, x = grad.contiguous(), x.contiguous()
    dx = torch.empty_like(x)
    y = torch.empty_like(x) if again else x.new_empty(0)
    if not x.numel():
        return dx, x.new_zeros(0 if bias is None else bias.shape), y
    m, n, acc, use = _plan("gelu_backward", x, bias)
    blocks = triton.cdiv(n, use["BLOCK_N"])
    parts, share = shares(m, use["BLOCK_M"], SPLITS * launch.processors(x.device) // blocks)
    partial_PN = None
    if bias is not None:
        partial_PN = x.new_empty(parts, n, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32)
    with launch.on_device(x):
        _backward[blocks, parts](
            grad, x, bias, dx, y if again else None, partial_PN, m, n, share, TANH=tanh, ACC=acc, **use
        )
        dbias = x.new_empty(0) if bias is None or partial_PN is None else column_sums(partial_PN, bias.dtype)
    return dx, dbias, y
