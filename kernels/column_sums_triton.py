"""The second half of a gradient summed over rows: partial sums [P, N] added in the order of P, by no more than one
program per column, so that the result has the same bits each time."""


# P partial sums, N columns

import torch
import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels import launch


@triton.jit
def _column_sums(PARTIAL, SUM, P, N, BLOCK_P: tl.constexpr, BLOCK_N: tl.constexpr):
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros([BLOCK_P, BLOCK_N], PARTIAL.dtype.element_ty)
    for first in tl.range(0, P, BLOCK_P):
        rows = first + tl.arange(0, BLOCK_P)
        mask = (rows < P)[:, None] & (columns < N)[None, :]
        total += tl.load(PARTIAL + rows.to(tl.int64)[:, None] * N + columns[None, :], mask=mask, other=0.0)
    tl.store(SUM + columns, tl.sum(total, 0).to(SUM.dtype.element_ty), mask=columns < N)


def shares(m: int, block: int, most: int) -> tuple[int, int]:
    """How many programs, `most` or fewer, share m rows taken `block` at a time, and the rows of each."""
    share = triton.cdiv(triton.cdiv(m, block), max(1, most)) * block
    return triton.cdiv(m, share), share


def column_sums(partial_PN: Tensor, dtype: torch.dtype) -> Tensor:
    """[N] in `dtype`."""
    p, n = partial_PN.shape
    total_N = torch.empty(n, dtype=dtype, device=partial_PN.device)
    use = launch.config("column_sums", partial_PN)
    _column_sums[triton.cdiv(n, use["BLOCK_N"]),](partial_PN, total_N, p, n, **use)
    return total_N
