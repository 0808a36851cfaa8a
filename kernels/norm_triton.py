"""Kernels of norm.py: residual sum, dropout, statistics and scaling in one pass over memory.

    h = dropout(x) + residual      y = (h - mean) rstd weight + bias      (RMS norm: mean and bias are 0)

Backward, with g = dL/dy weight and n = (h - mean) rstd:

    dL/dh = rstd (g - sum(g) / N - n sum(g n) / N) + what arrives at h itself,   sums over the N columns of the row
    dL/dweight = sum over rows of dL/dy n,   dL/dbias = sum over rows of dL/dy

Rows of up to ROW columns are held in registers; wider ones are walked in blocks and read twice. Each program sums the
gradients of weight and bias over its own range of rows in their order, and a second kernel adds the programs' sums in
order: no locks, no atomics, the same bits each time.
"""


# M rows, N columns (the width that is normalised), P partial sums; SX, SR, ... strides of rows

import torch
import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels import dropout, launch
from dltrain.kernels.column_sums_triton import column_sums, shares
from dltrain.kernels.dropout_triton import keep

FORWARD_ROW = 16384  # the widest row that a program holds
BACKWARD_ROW = 8192  # where it also holds the sums for weight and bias


@triton.jit
def _sum_of_branches(
    X, R, seed, rows, first, columns, mask, SX, SR, DROP: tl.constexpr, KEPT: tl.constexpr, ACC: tl.constexpr
):
    """h of a block of rows and columns, whose first column is `first`."""
    h = tl.load(X + rows.to(tl.int64)[:, None] * SX + columns[None, :], mask=mask, other=0.0).to(ACC)
    if DROP is not None:
        h = tl.where(keep(seed, 0, rows, first, columns.shape[0], DROP), h * KEPT, 0.0)
    if R is not None:
        h += tl.load(R + rows.to(tl.int64)[:, None] * SR + columns[None, :], mask=mask, other=0.0).to(ACC)
    return h


@triton.jit
def _scaled(n, W, B, columns, N, ACC: tl.constexpr):
    """n weight + bias."""
    if W is not None:
        n = n * tl.load(W + columns, mask=columns < N, other=0.0).to(ACC)[None, :]
    if B is not None:
        n = n + tl.load(B + columns, mask=columns < N, other=0.0).to(ACC)[None, :]
    return n


@triton.jit
def _forward(
    X, R, W, B, SEED, Y, H, MEAN, RSTD, M, N, SX, SR,
    DROP: tl.constexpr, KEPT: tl.constexpr, EPS: tl.constexpr, CENTRE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """BLOCK_M whole rows. The variance is that of centred values: no cancellation."""
    rows = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = tl.arange(0, BLOCK_N)
    mask = (rows < M)[:, None] & (columns < N)[None, :]
    seed = tl.load(SEED) if SEED is not None else 0
    h = _sum_of_branches(X, R, seed, rows, 0, columns, mask, SX, SR, DROP, KEPT, ACC)
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if H is not None:
        h = h.to(H.dtype.element_ty).to(ACC)  # the statistics are of what backward reads
        tl.store(H + at, h.to(H.dtype.element_ty), mask=mask)
    if CENTRE:
        mean = tl.sum(h, 1) / N
        tl.store(MEAN + rows, mean, mask=rows < M)
        h = tl.where(mask, h - mean[:, None], 0.0)
    rstd = tl.rsqrt(tl.sum(h * h, 1) / N + EPS)
    tl.store(RSTD + rows, rstd, mask=rows < M)
    y = _scaled(h * rstd[:, None], W, B, columns, N, ACC)
    tl.store(Y + at, y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _forward_wide(
    X, R, W, B, SEED, Y, H, MEAN, RSTD, M, N, SX, SR,
    DROP: tl.constexpr, KEPT: tl.constexpr, EPS: tl.constexpr, CENTRE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_N: tl.constexpr,
):  # fmt: skip
    """One row in blocks, whose means and sums of squares are merged (Chan et al. 1979), then once more from cache."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    seed = tl.load(SEED) if SEED is not None else 0
    mean = tl.zeros([1], ACC)
    squares = tl.zeros([1], ACC)
    for first in tl.range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = (columns < N)[None, :]
        h = _sum_of_branches(X, R, seed, rows, first, columns, mask, SX, SR, DROP, KEPT, ACC)
        if H is not None:
            h = h.to(H.dtype.element_ty).to(ACC)
            tl.store(H + rows.to(tl.int64)[:, None] * N + columns[None, :], h.to(H.dtype.element_ty), mask=mask)
        if CENTRE:
            count = tl.minimum(N - first, BLOCK_N)
            here = tl.sum(h, 1) / count
            h = tl.where(mask, h - here[:, None], 0.0)
            apart = here - mean
            mean += apart * count / (first + count)
            squares += apart * apart * first * count / (first + count)
        squares += tl.sum(h * h, 1)
    rstd = tl.rsqrt(squares / N + EPS)
    if CENTRE:
        tl.store(MEAN + rows, mean)
    tl.store(RSTD + rows, rstd)
    for first in tl.range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = (columns < N)[None, :]
        h = _sum_of_branches(X, R, seed, rows, first, columns, mask, SX, SR, DROP, KEPT, ACC)
        if H is not None:  # computed again, as the first pass's stores may not have arrived
            h = h.to(H.dtype.element_ty).to(ACC)
        y = _scaled((h - mean[:, None]) * rstd[:, None], W, B, columns, N, ACC)
        tl.store(Y + rows.to(tl.int64)[:, None] * N + columns[None, :], y.to(Y.dtype.element_ty), mask=mask)


@triton.jit
def _normal(H, MEAN, RSTD, rows, columns, mask, M, SH, CENTRE: tl.constexpr, ACC: tl.constexpr):
    """n of a block and rstd of its rows."""
    h = tl.load(H + rows.to(tl.int64)[:, None] * SH + columns[None, :], mask=mask, other=0.0).to(ACC)
    rstd = tl.load(RSTD + rows, mask=rows < M, other=0.0)
    if CENTRE:
        h -= tl.load(MEAN + rows, mask=rows < M, other=0.0)[:, None]
    return tl.where(mask, h * rstd[:, None], 0.0), rstd


@triton.jit
def _store_gradients(
    dh, DH, DX, seed, rows, first, columns, mask, N, DROP: tl.constexpr, KEPT: tl.constexpr
):  # fmt: skip
    """dL/dh for the residual and, where x was dropped or has another type, dL/dx."""
    at = rows.to(tl.int64)[:, None] * N + columns[None, :]
    if DH is not None:
        tl.store(DH + at, dh.to(DH.dtype.element_ty), mask=mask)
    if DX is not None:
        if DROP is not None:
            dh = tl.where(keep(seed, 0, rows, first, columns.shape[0], DROP), dh * KEPT, 0.0)
        tl.store(DX + at, dh.to(DX.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    G, GH, H, W, SEED, MEAN, RSTD, DH, DX, DW, DB, M, N, SG, SGH, SH, SHARE,
    DROP: tl.constexpr, KEPT: tl.constexpr, CENTRE: tl.constexpr, ACC: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Whole rows p SHARE ... (p + 1) SHARE - 1, BLOCK_M at a time; DW, DB [P, N] are the sums over these rows."""
    columns = tl.arange(0, BLOCK_N)
    seed = tl.load(SEED) if SEED is not None else 0
    dw = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    db = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    start = tl.program_id(0) * SHARE
    for block in tl.range(start, tl.minimum(start + SHARE, M), BLOCK_M, num_stages=STAGES):
        rows = block + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        n, rstd = _normal(H, MEAN, RSTD, rows, columns, mask, M, SH, CENTRE, ACC)
        g = tl.load(G + rows.to(tl.int64)[:, None] * SG + columns[None, :], mask=mask, other=0.0).to(ACC)
        if DW is not None:
            dw += g * n
        if DB is not None:
            db += g
        g = _scaled(g, W, None, columns, N, ACC)
        dh = g - n * (tl.sum(g * n, 1) / N)[:, None]
        if CENTRE:
            dh -= (tl.sum(g, 1) / N)[:, None]
        dh *= rstd[:, None]
        if GH is not None:
            dh += tl.load(GH + rows.to(tl.int64)[:, None] * SGH + columns[None, :], mask=mask, other=0.0).to(ACC)
        _store_gradients(dh, DH, DX, seed, rows, 0, columns, mask, N, DROP, KEPT)
    at = tl.program_id(0).to(tl.int64) * N + columns
    if DW is not None:
        tl.store(DW + at, tl.sum(dw, 0), mask=columns < N)
    if DB is not None:
        tl.store(DB + at, tl.sum(db, 0), mask=columns < N)


@triton.jit
def _backward_wide(
    G, GH, H, W, SEED, MEAN, RSTD, DH, DX, M, N, SG, SGH, SH,
    DROP: tl.constexpr, KEPT: tl.constexpr, CENTRE: tl.constexpr, ACC: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """dL/dh of one row in blocks: the two sums, then, from cache, the row."""
    rows = tl.program_id(0) + tl.arange(0, 1)
    seed = tl.load(SEED) if SEED is not None else 0
    along = tl.zeros([1], ACC)
    total = tl.zeros([1], ACC)
    for first in tl.range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = (columns < N)[None, :]
        n, rstd = _normal(H, MEAN, RSTD, rows, columns, mask, M, SH, CENTRE, ACC)
        g = tl.load(G + rows.to(tl.int64)[:, None] * SG + columns[None, :], mask=mask, other=0.0).to(ACC)
        g = _scaled(g, W, None, columns, N, ACC)
        along += tl.sum(g * n, 1)
        total += tl.sum(g, 1)
    for first in tl.range(0, N, BLOCK_N):
        columns = first + tl.arange(0, BLOCK_N)
        mask = (columns < N)[None, :]
        n, rstd = _normal(H, MEAN, RSTD, rows, columns, mask, M, SH, CENTRE, ACC)
        g = tl.load(G + rows.to(tl.int64)[:, None] * SG + columns[None, :], mask=mask, other=0.0).to(ACC)
        dh = _scaled(g, W, None, columns, N, ACC) - n * (along / N)[:, None]
        if CENTRE:
            dh -= (total / N)[:, None]
        dh *= rstd[:, None]
        if GH is not None:
            dh += tl.load(GH + rows.to(tl.int64)[:, None] * SGH + columns[None, :], mask=mask, other=0.0).to(ACC)
        _store_gradients(dh, DH, DX, seed, rows, first, columns, mask, N, DROP, KEPT)


@triton.jit
def _backward_weights(
    G, H, MEAN, RSTD, DW, DB, M, N, SG, SH, SHARE,
    CENTRE: tl.constexpr, ACC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """Partial sums of the gradients of weight and bias for wide rows: program (i, p) has columns block i, rows of p."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    dw = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    db = tl.zeros([BLOCK_M, BLOCK_N], ACC)
    start = tl.program_id(1) * SHARE
    for block in tl.range(start, tl.minimum(start + SHARE, M), BLOCK_M):
        rows = block + tl.arange(0, BLOCK_M)
        mask = (rows < M)[:, None] & (columns < N)[None, :]
        n, _ = _normal(H, MEAN, RSTD, rows, columns, mask, M, SH, CENTRE, ACC)
        g = tl.load(G + rows.to(tl.int64)[:, None] * SG + columns[None, :], mask=mask, other=0.0).to(ACC)
        dw += g * n
        db += g
    at = tl.program_id(1).to(tl.int64) * N + columns
    if DW is not None:
        tl.store(DW + at, tl.sum(dw, 0), mask=columns < N)
    if DB is not None:
        tl.store(DB + at, tl.sum(db, 0), mask=columns < N)


def _rows(t: Tensor, width: int) -> tuple[Tensor, int]:
    """As [M, N] whose rows are without gaps, and the stride between them."""
    t = t.reshape(-1, width)
    t = t if t.stride(1) == 1 or width == 1 else t.contiguous()
    return t, t.stride(0)


def _dropout(seed: Tensor | None, p: float) -> dict[str, float | None]:
    return {"DROP": None if seed is None else dropout.threshold(p), "KEPT": dropout.scale(p)}


def _compute_type(t: Tensor) -> tl.dtype:
    return tl.float64 if t.dtype == torch.float64 else tl.float32


def forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    p: float, eps: float, width: int, centre: bool,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:  # fmt: skip
    """y, h (None where it is x), mean and rstd [M]."""
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    h = None
    if residual is not None or seed is not None:
        h = torch.empty_like(y, dtype=x.dtype if residual is None else torch.promote_types(x.dtype, residual.dtype))
    m, wide = x.numel() // width, width > FORWARD_ROW
    mean, rstd = (
        x.new_empty(k, dtype=torch.float64 if x.dtype == torch.float64 else torch.float32) for k in (m * centre, m)
    )
    if not m:
        return y, h, mean, rstd
    x, sx = _rows(x, width)
    r, sr = (None, 0) if residual is None else _rows(residual, width)
    weight, bias = (None if w is None else w.contiguous() for w in (weight, bias))
    use = launch.config("norm_forward_wide" if wide else "norm_forward", x, width=width)
    kernel = _forward_wide if wide else _forward
    if not wide:
        use = use | {"BLOCK_N": max(8, triton.next_power_of_2(width))}
    with launch.on_device(x):
        kernel[triton.cdiv(m, use.get("BLOCK_M", 1)),](
            x, r, weight, bias, seed, y, h, mean, rstd, m, width, sx, sr,
            **_dropout(seed, p), EPS=eps, CENTRE=centre, ACC=_compute_type(x), **use,
        )  # fmt: skip
    return y, h, mean, rstd


def backward(
    grad: Tensor, grad_h: Tensor | None, h: Tensor, weight: Tensor | None, bias: Tensor | None, seed: Tensor | None,
    mean: Tensor, rstd: Tensor, p: float, width: int, centre: bool,
    x_type: torch.dtype, residual_type: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """dL/dx (None where it is dL/dresidual), dL/dresidual, dL/dweight, dL/dbias: None where there is no such input."""
    dh = None if residual_type is None else torch.empty(h.shape, dtype=residual_type, device=h.device)
    apart = dh is None or seed is not None or x_type != residual_type
    dx = torch.empty(h.shape, dtype=x_type, device=h.device) if apart else None
    if not h.numel():
        dweight, dbias = (None if w is None else torch.zeros_like(w) for w in (weight, bias))
        return dx, dh, dweight, dbias
    acc, m, wide = _compute_type(grad), h.numel() // width, width > BACKWARD_ROW
    g, sg = _rows(grad, width)
    gh, sgh = (None, 0) if grad_h is None else _rows(grad_h, width)
    h, sh = _rows(h, width)
    w = None if weight is None else weight.contiguous()
    drop = _dropout(seed, p)
    with launch.on_device(h):
        if not wide:
            use = dict(launch.config("norm_backward", h, width=width))
            per_processor = use.pop("per_processor")
            parts, share = shares(m, use["BLOCK_M"], per_processor * launch.processors(h.device))
            dw, db = (None if t is None else rstd.new_empty(parts, width) for t in (weight, bias))
            _backward[parts,](
                g, gh, h, w, seed, mean, rstd, dh, dx, dw, db, m, width, sg, sgh, sh, share, **drop,
                CENTRE=centre, ACC=acc, BLOCK_N=max(8, triton.next_power_of_2(width)), **use,
            )  # fmt: skip
        else:
            use = launch.config("norm_backward_wide", h, width=width)
            _backward_wide[m,](
                g, gh, h, w, seed, mean, rstd, dh, dx, m, width, sg, sgh, sh, **drop, CENTRE=centre, ACC=acc, **use
            )
            use = launch.config("norm_backward_weights", h, width=width)
            blocks = triton.cdiv(width, use["BLOCK_N"])
            parts, share = shares(m, use["BLOCK_M"], 4 * launch.processors(h.device) // blocks)
            dw, db = (None if t is None else rstd.new_empty(parts, width) for t in (weight, bias))
            if dw is not None or db is not None:
                _backward_weights[blocks, parts](
                    g, h, mean, rstd, dw, db, m, width, sg, sh, share, CENTRE=centre, ACC=acc, **use
                )
        dweight = None if dw is None or weight is None else column_sums(dw, weight.dtype).view(weight.shape)
        dbias = None if db is None or bias is None else column_sums(db, bias.dtype).view(bias.shape)
    return dx, dh, dweight, dbias
