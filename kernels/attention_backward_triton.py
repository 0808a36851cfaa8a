"""Attention in Triton, backward: two passes over the scores, each recomputed from the saved log-sum-exp.

    dv_j = sum_i p_ij do_i,   ds_ij = p_ij (do_i . v_j - delta_i),   delta_i = o_i . do_i
    dq_i = scale sum_j ds_ij k_j,   dk_j = scale sum_i ds_ij q_i

(Dao et al. 2022, https://arxiv.org/abs/2205.14135, appendix B.4.) One kernel owns tiles of keys and walks over queries,
the other owns tiles of queries and walks over keys: two of seven products are computed twice, and no two programs add
to one number, so the result depends on nothing but the inputs. With dropout p_ij in dv, and do_i . v_j, are the masked
and rescaled ones; with a soft-cap ds_ij is multiplied by 1 - tanh^2.
"""

# M queries of a tile, N keys of a tile, E features of a query and key, V features of a value (BE, BV: rounded up)

import triton
import triton.language as tl
from torch import Tensor

from dltrain.kernels import launch
from dltrain.kernels.attention_triton import (
    UNSPECIALIZED,
    Options,
    accumulator,
    empty_heads,
    empty_rows,
    hide,
    key_runs,
    layout,
    load_rows,
    load_vector,
    matrix,
    own_keys,
    soft,
    store_rows,
)
from dltrain.kernels.dropout_triton import keep


@triton.jit(do_not_specialize=["n_heads", "n_queries"])
def delta(
    out, grad, result, out_b, out_h, out_l, grad_b, grad_h, grad_l, result_bh, n_heads, n_queries,
    V: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """delta_i = o_i . do_i of one tile of queries."""
    n_tiles = tl.cdiv(n_queries, BM)
    i = tl.program_id(0) % n_tiles * BM
    head = tl.program_id(0) // n_tiles
    b = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    o_MV = load_rows(out + b * out_b + h * out_h, i, out_l, n_queries, V, BM, BV, False).to(ACC)
    do_MV = load_rows(grad + b * grad_b + h * grad_h, i, grad_l, n_queries, V, BM, BV, False).to(ACC)
    i_M = i + tl.arange(0, BM)
    tl.store(result + head.to(tl.int64) * result_bh + i_M, tl.sum(o_MV * do_MV, 1), mask=i_M < n_queries)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def query_gradient(
    query, key, value, grad, lse, deltas, dq, seed, lengths, start, end,
    query_b, query_h, query_l, key_b, key_h, key_l, value_b, value_h, value_l, grad_b, grad_h, grad_l,
    dq_b, dq_h, dq_l, lse_bh, n_heads, n_queries, n_keys, left, right, threshold,
    SCALE: tl.constexpr, CAP: tl.constexpr, RESCALE: tl.constexpr, GROUP: tl.constexpr,
    E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """dq of one tile of queries."""
    SOFTCAP: tl.constexpr = CAP > 0
    FACTOR: tl.constexpr = (CAP if CAP > 0 else SCALE) * 1.4426950408889634  # log2(e)
    INNER: tl.constexpr = SCALE / CAP if CAP > 0 else 1.0
    n_tiles = tl.cdiv(n_queries, BM)
    tile = n_tiles - 1 - tl.program_id(0) % n_tiles
    head = tl.program_id(0) // n_tiles
    b = (head // n_heads).to(tl.int64)
    h = (head % n_heads).to(tl.int64)
    i = tile * BM
    query += b * query_b + h * query_h
    key += b * key_b + (h // GROUP) * key_h
    value += b * value_b + (h // GROUP) * value_h
    grad += b * grad_b + h * grad_h
    lse += head.to(tl.int64) * lse_bh
    deltas += head.to(tl.int64) * lse_bh
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
        grads = matrix(grad, n_queries, grad_l, V, BM, BV)
        keys = matrix(key, n_keys, key_l, E, BN, BE)
        values = matrix(value, n_keys, value_l, V, BN, BV)
        lses = tl.make_tensor_descriptor(lse, [n_queries], [1], [BM])
        deltas = tl.make_tensor_descriptor(deltas, [n_queries], [1], [BM])
    else:
        queries = query
        grads = grad
        keys = key
        values = value
        lses = lse
    q_ME = load_rows(queries, i, query_l, n_queries, E, BM, BE, TMA)
    do_MV = load_rows(grads, i, grad_l, n_queries, V, BM, BV, TMA)
    lse_M = load_vector(lses, i, n_queries, BM, TMA)
    delta_M = load_vector(deltas, i, n_queries, BM, TMA)
    dq_ME = tl.zeros([BM, BE], ACC)
    lo, whole, whole_end, hi = key_runs(i, start, end, n_queries, n_keys, left, right, BM, BN, LEFT, RIGHT, DOCUMENTS)
    for j in tl.range(lo, hi, BN, warp_specialize=SPECIALIZE):
        k_NE = load_rows(keys, j, key_l, n_keys, E, BN, BE, TMA)
        v_NV = load_rows(values, j, value_l, n_keys, V, BN, BV, TMA)
        score_MN = soft(tl.dot(q_ME, k_NE.T, out_dtype=ACC, input_precision=PRECISION), INNER, SOFTCAP)
        p_MN = tl.exp2(score_MN * FACTOR - lse_M[:, None])
        j_N = j + tl.arange(0, BN)
        if SPECIALIZE:  # noqa: SIM114, a branch of the GPU would stop the specialisation
            p_MN = hide(p_MN, 0.0, i_M, j_N, first_M, last_M, n_keys, left, right, LEFT, RIGHT, DOCUMENTS)
        elif (j < whole) | (j >= whole_end):
            p_MN = hide(p_MN, 0.0, i_M, j_N, first_M, last_M, n_keys, left, right, LEFT, RIGHT, DOCUMENTS)
        dp_MN = tl.dot(do_MV, v_NV.T, out_dtype=ACC, input_precision=PRECISION)
        if DROPOUT:
            dp_MN = tl.where(keep(random, head, i_M, j, BN, threshold), dp_MN * RESCALE, 0.0)
        ds_MN = p_MN * (dp_MN - delta_M[:, None])
        if SOFTCAP:
            ds_MN = ds_MN * (1.0 - score_MN * score_MN)
        dq_ME = tl.dot(ds_MN.to(k_NE.dtype), k_NE, dq_ME, out_dtype=ACC, input_precision=PRECISION)
    store_rows(dq + b * dq_b + h * dq_h, i, dq_l, n_queries, dq_ME * SCALE, E, BM, BE)


@triton.jit
def query_runs(
    j, start, end, n_queries, n_keys, left, right,
    BM: tl.constexpr, BN: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """Queries that see the keys from j to j + BN: (first, first whole, end of whole, end), the inner two in tiles."""
    last = tl.minimum(j + BN, n_keys) - 1
    lo = 0
    whole = 0
    hi = n_queries
    whole_end = n_queries
    if RIGHT:
        lo = tl.maximum(lo, j - right)
        whole = tl.maximum(whole, last - right)
    if LEFT:
        hi = tl.minimum(hi, last + left + 1)
        whole_end = tl.minimum(whole_end, j + left + 1)
    if DOCUMENTS:
        at = tl.maximum(last, 0)
        lo = tl.maximum(lo, tl.load(start + j))
        whole = tl.maximum(whole, tl.load(start + at))
        hi = tl.minimum(hi, tl.load(end + at))
        whole_end = tl.minimum(whole_end, tl.load(end + j))
    hi = tl.where(last < j, 0, hi)  # keys behind the end have no queries
    lo = lo // BM * BM
    whole = tl.maximum(tl.minimum(tl.cdiv(whole, BM) * BM, hi), lo)
    # Rows behind the last query need no mask: do is zero there, so they add nothing.
    if LEFT or DOCUMENTS:
        whole_end = tl.where(whole_end >= n_queries, hi, whole_end // BM * BM)
        whole_end = tl.maximum(tl.minimum(whole_end, hi), whole)
    else:
        whole_end = tl.maximum(hi, whole)
    return lo, whole, whole_end, hi


@triton.jit
def hide_transposed(
    x_NM, i_M, j_N, first_N, last_N, left, right,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """x with 0 where query i does not see key j; `first` and `last` bound the queries of each key's document."""
    i = i_M[None, :]
    j = j_N[:, None]
    ok = j >= 0
    if LEFT:
        ok = ok & (j >= i - left)
    if RIGHT:
        ok = ok & (j <= i + right)
    if DOCUMENTS:
        ok = ok & (i >= first_N[:, None]) & (i < last_N[:, None])
    return tl.where(ok, x_NM, 0.0)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def key_value_gradient(
    query, key, value, grad, lse, deltas, dk, dv, seed, lengths, start, end,
    query_b, query_h, query_l, key_b, key_h, key_l, value_b, value_h, value_l, grad_b, grad_h, grad_l,
    dk_b, dk_h, dk_l, dv_b, dv_h, dv_l, lse_bh, n_heads, n_queries, n_keys, left, right, threshold,
    SCALE: tl.constexpr, CAP: tl.constexpr, RESCALE: tl.constexpr, GROUP: tl.constexpr,
    E: tl.constexpr, V: tl.constexpr, BE: tl.constexpr, BV: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ACC: tl.constexpr, PRECISION: tl.constexpr, LEFT: tl.constexpr, RIGHT: tl.constexpr, LENGTHS: tl.constexpr,
    DOCUMENTS: tl.constexpr, DROPOUT: tl.constexpr, TMA: tl.constexpr, SPECIALIZE: tl.constexpr,
):  # fmt: skip
    """dk and dv of one tile of keys, summed over the GROUP query heads that share them."""
    SOFTCAP: tl.constexpr = CAP > 0
    FACTOR: tl.constexpr = (CAP if CAP > 0 else SCALE) * 1.4426950408889634  # log2(e)
    INNER: tl.constexpr = SCALE / CAP if CAP > 0 else 1.0
    n_tiles = tl.cdiv(n_keys, BN)
    all_keys = n_keys
    tile = tl.program_id(0) % n_tiles  # under a causal mask the longest first
    key_heads = n_heads // GROUP
    b = (tl.program_id(0) // n_tiles // key_heads).to(tl.int64)
    g = (tl.program_id(0) // n_tiles % key_heads).to(tl.int64)
    j = tile * BN
    key += b * key_b + g * key_h
    value += b * value_b + g * value_h
    n_keys = own_keys(lengths, b, n_keys, LENGTHS)
    j_N = j + tl.arange(0, BN)
    first_N = tl.zeros([BN], tl.int32)
    last_N = tl.zeros([BN], tl.int32)
    if DOCUMENTS:
        start += b * n_queries
        end += b * n_queries
        first_N = tl.load(start + j_N, mask=j_N < n_keys, other=0)
        last_N = tl.load(end + j_N, mask=j_N < n_keys, other=0)
    if DROPOUT:
        random = tl.load(seed)
    else:
        random = 0
    if TMA:
        keys = matrix(key, n_keys, key_l, E, BN, BE)
        values = matrix(value, n_keys, value_l, V, BN, BV)
    else:
        keys = key
        values = value
    k_NE = load_rows(keys, j, key_l, n_keys, E, BN, BE, TMA)
    v_NV = load_rows(values, j, value_l, n_keys, V, BN, BV, TMA)
    dk_NE = tl.zeros([BN, BE], ACC)
    dv_NV = tl.zeros([BN, BV], ACC)
    lo, whole, whole_end, hi = query_runs(j, start, end, n_queries, n_keys, left, right, BM, BN, LEFT, RIGHT, DOCUMENTS)
    for member in range(GROUP):
        h = g * GROUP + member
        row = (b * n_heads + h) * lse_bh
        head = (b * n_heads + h).to(tl.int32)
        if TMA:
            queries = matrix(query + b * query_b + h * query_h, n_queries, query_l, E, BM, BE)
            grads = matrix(grad + b * grad_b + h * grad_h, n_queries, grad_l, V, BM, BV)
            lses = tl.make_tensor_descriptor(lse + row, [n_queries], [1], [BM])
            some_deltas = tl.make_tensor_descriptor(deltas + row, [n_queries], [1], [BM])
        else:
            queries = query + b * query_b + h * query_h
            grads = grad + b * grad_b + h * grad_h
            lses = lse + row
            some_deltas = deltas + row
        for i in tl.range(lo, hi, BM, warp_specialize=SPECIALIZE):
            q_ME = load_rows(queries, i, query_l, n_queries, E, BM, BE, TMA)
            do_MV = load_rows(grads, i, grad_l, n_queries, V, BM, BV, TMA)
            lse_M = load_vector(lses, i, n_queries, BM, TMA)
            delta_M = load_vector(some_deltas, i, n_queries, BM, TMA)
            score_NM = soft(tl.dot(k_NE, q_ME.T, out_dtype=ACC, input_precision=PRECISION), INNER, SOFTCAP)
            p_NM = tl.exp2(score_NM * FACTOR - lse_M[None, :])
            i_M = i + tl.arange(0, BM)
            if SPECIALIZE and not (LEFT or RIGHT or DOCUMENTS):
                pass
            elif SPECIALIZE:  # noqa: SIM114
                p_NM = hide_transposed(p_NM, i_M, j_N, first_N, last_N, left, right, LEFT, RIGHT, DOCUMENTS)
            elif (i < whole) | (i >= whole_end):
                p_NM = hide_transposed(p_NM, i_M, j_N, first_N, last_N, left, right, LEFT, RIGHT, DOCUMENTS)
            dp_NM = tl.dot(v_NV, do_MV.T, out_dtype=ACC, input_precision=PRECISION)
            kept_NM = p_NM
            if DROPOUT:
                keep_NM = tl.trans(keep(random, head, i_M, j, BN, threshold))
                kept_NM = tl.where(keep_NM, p_NM, 0.0)
                dp_NM = tl.where(keep_NM, dp_NM * RESCALE, 0.0)
            dv_NV = tl.dot(kept_NM.to(do_MV.dtype), do_MV, dv_NV, out_dtype=ACC, input_precision=PRECISION)
            ds_NM = p_NM * (dp_NM - delta_M[None, :])
            if SOFTCAP:
                ds_NM = ds_NM * (1.0 - score_NM * score_NM)
            dk_NE = tl.dot(ds_NM.to(q_ME.dtype), q_ME, dk_NE, out_dtype=ACC, input_precision=PRECISION)
    # A key behind the end of its row was given weight above and gets nothing: rows of dk and dv do not mix.
    ours_N1 = (j_N < n_keys)[:, None]
    dk_NE = tl.where(ours_N1, dk_NE * SCALE, 0.0)
    dv_NV = tl.where(ours_N1, dv_NV * RESCALE, 0.0)
    store_rows(dk + b * dk_b + g * dk_h, j, dk_l, all_keys, dk_NE, E, BN, BE)
    store_rows(dv + b * dv_b + g * dv_h, j, dv_l, all_keys, dv_NV, V, BN, BV)


def gradients(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, options: Options
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk and dv; `out` and `lse` are what `attention` gave."""
    grad, query, key, value, out = (layout(x) for x in (grad, query, key, value, out))
    B, H, Q, E = query.shape
    G, K, V = value.shape[1:]
    dq, dk, dv = (empty_heads(query, B, *shape) for shape in ((H, Q, E), (G, K, E), (G, K, V)))
    if not out.numel() or not K:
        return dq.zero_(), dk.zero_(), dv.zero_()
    deltas = empty_rows(query)
    constants, numbers, pointers = options.constants(query, value), options.numbers(query, key), options.pointers()
    inputs = [n for x in (query, key, value, grad) for n in x.stride()[:3]]
    use = launch.config("attention_delta", query, head=constants["BV"])
    with launch.on_device(query):
        delta[(triton.cdiv(Q, use["BM"]) * B * H,)](
            out, grad, deltas, *out.stride()[:3], *grad.stride()[:3], lse.stride(1), H, Q,
            V=V, BV=constants["BV"], ACC=accumulator(query), **use,
        )  # fmt: skip
        use = options.config("attention_query_gradient", query, key, value, grad)
        query_gradient[(triton.cdiv(Q, use["BM"]) * B * H,)](
            query, key, value, grad, lse, deltas, dq, *pointers, *inputs, *dq.stride()[:3], lse.stride(1),
            *numbers, **constants, **use,
        )  # fmt: skip
        use = options.config("attention_key_value_gradient", query, key, value, grad)
        key_value_gradient[(triton.cdiv(K, use["BN"]) * B * G,)](
            query, key, value, grad, lse, deltas, dk, dv, *pointers, *inputs, *dk.stride()[:3], *dv.stride()[:3],
            lse.stride(1), *numbers, **constants, **use,
        )  # fmt: skip
    return dq, dk, dv
