"""Dropout masks within kernels: see dropout.py."""

import triton
import triton.language as tl


@triton.jit
def keep(seed, stream, rows_M, first, COLUMNS: tl.constexpr, THRESHOLD: tl.constexpr):
    """Bool [M, COLUMNS] for these rows and columns first..first + COLUMNS - 1; `first` and COLUMNS multiples of 8."""
    c0 = (first // 8 + tl.arange(0, COLUMNS // 8))[None, :] + tl.zeros_like(rows_M)[:, None]
    c1 = rows_M[:, None] + tl.zeros_like(c0)
    c2 = tl.zeros_like(c0) + stream
    w0, w1, w2, w3 = tl.philox(
        seed, c0.to(tl.uint32), c1.to(tl.uint32), c2.to(tl.uint32), tl.zeros_like(c0).to(tl.uint32), 7
    )
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))  # [M, E, i, j]: word 2 i + j
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.join(low, high).reshape(rows_M.shape[0], COLUMNS).to(tl.int32) >= THRESHOLD
