"""Attention in Triton: the forward kernel, and what the backward kernels share with it.

One program computes a tile of queries of one head: a running maximum and sum of the softmax while it walks over the
keys (Milakov and Gimelshein 2018, https://arxiv.org/abs/1805.02867; Dao et al. 2022, https://arxiv.org/abs/2205.14135),
in base 2, since that is what the hardware's exponential computes. Every mask is an interval of keys per query whose
ends do not decrease from query to query, so a tile walks over three runs of key tiles: cut by a left end, whole, cut by
a right end. Only the outer two compare positions.

The configuration chooses between two ways of reading: by pointers, for all options; and TMA, by descriptors, for what
leaves registers and alignment for it. With TMA, SPECIALIZE parts the warps into two groups that compute and one that
loads (Triton does so on Hopper where num_warps is 4 and nothing else is loaded in the loop).
"""

# M queries of a tile, N keys of a tile, E features of a query and key, V features of a value (BE, BV: rounded up)

from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels import dropout, launch
from dltrain.kernels.dropout_triton import keep

UNSPECIALIZED = ["n_heads", "n_queries", "n_keys", "left", "right", "threshold"]  # one binary for all


@triton.jit
def load_rows(
    source, row, stride, n_rows, N_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TMA: tl.constexpr
):
    """Tile [ROWS, COLUMNS] from `row` on of a matrix [n_rows, N_COLUMNS] (a pointer or a descriptor), zeros outside."""
    if TMA:
        tile = source.load([row, 0])
    else:
        rows = tl.arange(0, ROWS)[:, None]
        columns = tl.arange(0, COLUMNS)[None, :]
        mask = rows < n_rows - row
        if N_COLUMNS < COLUMNS:
            mask = mask & (columns < N_COLUMNS)
        tile = tl.load(source + tl.cast(row, tl.int64) * stride + rows * stride + columns, mask=mask, other=0.0)
    return tile


@triton.jit
def store_rows(target, row, stride, n_rows, tile, N_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write `tile` at `row` of a matrix [n_rows, N_COLUMNS], cut to it."""
    rows = tl.arange(0, ROWS)[:, None]
    columns = tl.arange(0, COLUMNS)[None, :]
    mask = (rows < n_rows - row) & (columns < N_COLUMNS)
    pointers = target + tl.cast(row, tl.int64) * stride + rows * stride + columns
    tl.store(pointers, tile.to(target.dtype.element_ty), mask=mask)


@triton.jit
def load_vector(source, position, n, SIZE: tl.constexpr, TMA: tl.constexpr):
    """[SIZE] from `position` on of a vector of n elements, zeros behind its end."""
    if TMA:
        vector = source.load([position])
    else:
        offsets = tl.arange(0, SIZE)
        vector = tl.load(source + position + offsets, mask=offsets < n - position, other=0.0)
    return vector


@triton.jit
def matrix(pointer, n_rows, stride, N_COLUMNS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Descriptor of a matrix [n_rows, N_COLUMNS], read in tiles [ROWS, COLUMNS]."""
    return tl.make_tensor_descriptor(pointer, [n_rows, N_COLUMNS], [stride, 1], [ROWS, COLUMNS])


@triton.jit
def soft(qk, inner, SOFTCAP: tl.constexpr):
    """The scores up to a factor: qk, or tanh(inner qk). tanh by a sigmoid, which the interpreter has too."""
    if SOFTCAP:
        qk = 2.0 * tl.sigmoid(2.0 * inner * qk) - 1.0
    return qk


@triton.jit
def own_keys(lengths, b, n_keys, LENGTHS: tl.constexpr):
    """Number of keys that row b of the batch has."""
    if LENGTHS:
        n_keys = tl.maximum(tl.minimum(n_keys, tl.load(lengths + b)), 0).to(tl.int32)
    return n_keys


@triton.jit
def key_runs(
    i, start, end, n_queries, n_keys, left, right,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Keys that the queries from i to i + BM see: (first, first whole, end of whole, end), the inner two in tiles.

    `start` and `end` point to the documents of this row.
    """
    last = tl.minimum(i + BM, n_queries) - 1
    lo = 0
    whole = 0
    hi = n_keys
    whole_end = n_keys
    if LEFT:
        lo = tl.maximum(lo, i - left)
        whole = tl.maximum(whole, last - left)
    if RIGHT:
        hi = tl.minimum(hi, last + right + 1)
        whole_end = tl.minimum(whole_end, i + right + 1)
    if DOCUMENTS:
        lo = tl.maximum(lo, tl.load(start + i))
        whole = tl.maximum(whole, tl.load(start + last))
        hi = tl.minimum(hi, tl.load(end + last))
        whole_end = tl.minimum(whole_end, tl.load(end + i))
    lo = lo // BN * BN
    whole = tl.maximum(tl.minimum(tl.cdiv(whole, BN) * BN, hi), lo)
    whole_end = tl.maximum(whole_end // BN * BN, whole)
    return lo, whole, whole_end, hi


@triton.jit
def hide(
    x_MN, hidden, i_M, j_N, first_M, last_M, n_keys, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """x with `hidden` where query i does not see key j; `first` and `last` bound the keys of each query's document."""
    i = i_M[:, None]
    j = j_N[None, :]
    ok = j < n_keys
    if LEFT:
        ok = ok & (j >= i - left)
    if RIGHT:
        ok = ok & (j <= i + right)
    if DOCUMENTS:
        ok = ok & (j >= first_M[:, None]) & (j < last_M[:, None])
    return tl.where(ok, x_MN, hidden)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward(
    query, key, value, out, lse, seed, lengths, start, end,
    query_b, query_h, query_l, key_b, key_h, key_l, value_b, value_h, value_l, out_b, out_h, out_l, lse_bh,
    n_heads, n_queries, n_keys, left, right, threshold,
    SCALE: tl.constexpr, CAP: tl.constexpr, RESCALE: tl.constexpr, GROUP: tl.constexpr,
    E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """Output and log-sum-exp (base 2; +inf where a query sees no key) of one tile of queries."""
    SOFTCAP: tl.constexpr = CAP > 0
    FACTOR: tl.constexpr = (CAP if CAP > 0 else SCALE) * 1.4426950408889634  # log2(e)
    INNER: tl.constexpr = SCALE / CAP if CAP > 0 else 1.0
    n_tiles = tl.cdiv(n_queries, BM)
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles  # under a causal mask the longest first
    head = tl.program_id(0) // n_tiles
    b = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    i = tile * BM
    query += b * query_b + h * query_h
    key += b * key_b + (h // GROUP) * key_h
    value += b * value_b + (h // GROUP) * value_h
    n_keys = own_keys(lengths, b, n_keys, LENGTHS)
    i_M = i + tl.arange(0, BM)
    first_M = tl.zeros([BM], tl.int32)
    last_M = tl.zeros([BM], tl.int32)
    if DOCUMENTS:
        start += b * n_queries
        end += b * n_queries
        first_M = tl.load(start + i_M, mask=i_M < n_queries, other=0)
        last_M = tl.load(end + i_M, mask=i_M < n_queries, other=0)
    if DROPOUT:
        random = tl.load(seed)
    else:
        random = 0
    if TMA:
        queries = matrix(query, n_queries, query_l, E, BM, BE)
        keys = matrix(key, n_keys, key_l, E, BN, BE)
        values = matrix(value, n_keys, value_l, V, BN, BV)
    else:
        queries = query
        keys = key
        values = value
    q_ME = load_rows(queries, i, query_l, n_queries, E, BM, BE, TMA)
    max_M = tl.full([BM], float("-inf"), ACC)
    sum_M = tl.zeros([BM], ACC)
    acc_MV = tl.zeros([BM, BV], ACC)
    lo, whole, whole_end, hi = key_runs(i, start, end, n_queries, n_keys, left, right, BM, BN, LEFT, RIGHT, DOCUMENTS)
    for j in tl.range(lo, hi, BN, warp_specialize=SPECIALIZE):
        k_NE = load_rows(keys, j, key_l, n_keys, E, BN, BE, TMA)
        v_NV = load_rows(values, j, value_l, n_keys, V, BN, BV, TMA)
        score_MN = soft(tl.dot(q_ME, k_NE.T, out_dtype=ACC, input_precision=PRECISION), INNER, SOFTCAP)
        j_N = j + tl.arange(0, BN)
        if SPECIALIZE:  # noqa: SIM114, a branch of the GPU would stop the specialisation
            score_MN = hide(
                score_MN, float("-inf"), i_M, j_N, first_M, last_M, n_keys, left, right, LEFT, RIGHT, DOCUMENTS
            )
        elif (j < whole) | (j >= whole_end):
            score_MN = hide(
                score_MN, float("-inf"), i_M, j_N, first_M, last_M, n_keys, left, right, LEFT, RIGHT, DOCUMENTS
            )
        new_M = tl.maximum(max_M, tl.max(score_MN, 1) * FACTOR)
        shift_M = tl.where(new_M == float("-inf"), 0.0, new_M)  # a query that has seen no key yet
        p_MN = tl.exp2(score_MN * FACTOR - shift_M[:, None])
        fade_M = tl.exp2(max_M - shift_M)
        sum_M = sum_M * fade_M + tl.sum(p_MN, 1)
        if DROPOUT:
            p_MN = tl.where(keep(random, head, i_M, j, BN, threshold), p_MN, 0.0)
        acc_MV = acc_MV * fade_M[:, None]
        acc_MV = tl.dot(p_MN.to(v_NV.dtype), v_NV, acc_MV, out_dtype=ACC, input_precision=PRECISION)
        max_M = new_M
    seen_M = sum_M > 0
    sum_M = tl.where(seen_M, sum_M, 1.0)
    store_rows(out + b * out_b + h * out_h, i, out_l, n_queries, acc_MV * (RESCALE / sum_M)[:, None], V, BM, BV)
    lse_M = tl.where(seen_M, max_M + tl.log2(sum_M), float("inf"))
    tl.store(lse + head.to(tl.int64) * lse_bh + i_M, lse_M, mask=i_M < n_queries)


@dataclass(frozen=True)
class Options:
    """What an attention call has besides its tensors; left and right are -1 where the window has no such end."""

    seed: Tensor | None
    key_lengths: Tensor | None  # [B]
    start: Tensor | None  # [B, L]
    end: Tensor | None
    scale: float
    softcap: float
    dropout_p: float
    left: int
    right: int

    def pointers(self) -> tuple[Tensor | None, ...]:
        given = self.seed, self.key_lengths, self.start, self.end
        return tuple(None if x is None else x.contiguous() for x in given)

    def constants(self, query: Tensor, value: Tensor) -> dict[str, Any]:
        E, V = query.shape[-1], value.shape[-1]
        return {
            "GROUP": query.shape[1] // value.shape[1],
            "SCALE": self.scale,
            "CAP": self.softcap,
            "RESCALE": dropout.scale(self.dropout_p),
            "E": E,
            "V": V,
            "BE": max(16, triton.next_power_of_2(E)),
            "BV": max(16, triton.next_power_of_2(V)),
            "ACC": accumulator(query),
            "PRECISION": "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32",
            "LEFT": self.left >= 0,
            "RIGHT": self.right >= 0,
            "LENGTHS": self.key_lengths is not None,
            "DOCUMENTS": self.start is not None,
            "DROPOUT": self.dropout_p > 0,
        }

    def numbers(self, query: Tensor, key: Tensor) -> tuple[int, ...]:
        """The kernels' arguments from n_heads to threshold."""
        H, Q = query.shape[1:3]
        return H, Q, key.shape[2], self.left, self.right, dropout.threshold(self.dropout_p)

    def config(self, kernel: str, *tensors: Tensor) -> dict[str, Any]:
        """Tiles for these tensors, query and key first, which the kernel reads."""
        head = max(16, triton.next_power_of_2(max(x.shape[-1] for x in tensors)))
        extras = self.start is not None or self.softcap > 0 or self.dropout_p > 0 or self.left >= 0
        use = launch.config(
            kernel,
            tensors[0],
            head=head,
            group=tensors[0].shape[1] // tensors[1].shape[1],
            extras=extras,  # what takes many registers
            descriptors=not extras and self.key_lengths is None and all(_described(x) for x in tensors),
        )
        if use["TMA"]:
            launch.allow_descriptors()
        return use


def accumulator(x: Tensor) -> tl.dtype:
    return tl.float64 if x.dtype == torch.float64 else tl.float32


def _described(x: Tensor) -> bool:
    """Whether a TMA descriptor can be made of each head: all is a multiple of 16 bytes."""
    return (
        x.data_ptr() % 16 == 0
        and x.stride(-2) > 0
        and all(n * x.element_size() % 16 == 0 for n in (x.shape[-1], *x.stride()[:-1]))
    )


def layout(x: Tensor) -> Tensor:
    """x, copied where the kernels cannot read it: rows are dense, and offsets within a tile of rows fit 32 bits."""
    return x if x.stride(-1) == 1 and x.stride(-2) < 2**23 else x.contiguous()


def empty_heads(like: Tensor, B: int, H: int, L: int, features: int) -> Tensor:
    """[B, H, L, features] in memory as [B, L, H, features]: the projection that follows reads it without a copy."""
    return like.new_empty(B, L, H, features).transpose(1, 2)


def empty_rows(like: Tensor) -> Tensor:
    """A number for each query, [B, H, Q]: float32, or float64 for tests. Each head's begin on 16 bytes, for TMA."""
    B, H, Q, _ = like.shape
    dtype = torch.float64 if like.dtype == torch.float64 else torch.float32
    return like.new_empty(B, H, (Q + 3) // 4 * 4, dtype=dtype)[..., :Q]


def attention(query: Tensor, key: Tensor, value: Tensor, options: Options) -> tuple[Tensor, Tensor]:
    """Output [B, H, Q, V], and the log-sum-exp [B, H, Q] of the scores in base 2 (+inf where no key is seen)."""
    query, key, value = (layout(x) for x in (query, key, value))
    B, H, Q, _ = query.shape
    out, lse = empty_heads(query, B, H, Q, value.shape[-1]), empty_rows(query)
    if not out.numel():
        return out, lse
    use = options.config("attention_forward", query, key, value)
    strides = (n for x in (query, key, value, out) for n in x.stride()[:3])
    with launch.on_device(query):
        forward[(triton.cdiv(Q, use["BM"]) * B * H,)](
            query, key, value, out, lse, *options.pointers(), *strides, lse.stride(1),
            *options.numbers(query, key), **options.constants(query, value), **use,
        )  # fmt: skip
    return out, lse
