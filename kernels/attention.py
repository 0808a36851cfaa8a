"""Scaled dot-product attention. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1.

    o_i = sum_j dropout(p_ij) v_j,   p_ij = softmax_j(c(scale q_i . k_j))   over the keys j that query i may see

The softmax is computed in float32 (float64 for float64 inputs); a query that sees no key gets zeros, not NaN. c is the
identity, or with a soft-cap c(s) = softcap tanh(s / softcap) (Gemma 2, https://arxiv.org/abs/2408.00118, section 2).
Query i sees key j where all that is given agrees:

    attn_mask     its entry is true, or is added to the score
    is_causal     j <= i, from the first query and key as in torch
    window        i - left <= j <= i + right; -1 is without an end (Beltagy et al. 2020, https://arxiv.org/abs/2004.05150)
    key_lengths   j < key_lengths[b]: the rest is padding
    documents     i and j lie in one document, a run of equal numbers in documents[b]
    cu_seqlens    i and j lie in one sequence: cu_seqlens[n] <= i, j < cu_seqlens[n + 1]; what lies in none sees nothing
"""

# B batch, H query heads, G key heads, Q queries, K keys, L positions where Q = K, E features of a query and key,
# V features of a value

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels.dispatch import use_kernel
from dltrain.kernels.dropout import draw_seed
from dltrain.kernels.dropout import scale as rescale
from dltrain.kernels.registration import register

Bounds = tuple[Tensor, Tensor]  # int32 [B, L] twice: where the document or sequence of each position starts and ends


def document_bounds(documents_BL: Tensor) -> Bounds:
    """Bounds of runs of equal numbers."""
    L = documents_BL.shape[1]
    position_L = torch.arange(L, dtype=torch.int32, device=documents_BL.device)
    new_BL = torch.ones_like(documents_BL, dtype=torch.bool)
    new_BL[:, 1:] = documents_BL[:, 1:] != documents_BL[:, :-1]
    start_BL = torch.where(new_BL, position_L, 0).cummax(1).values
    next_BL = torch.where(new_BL, position_L, L).flip(1).cummin(1).values.flip(1)  # first start at or behind a position
    return start_BL, F.pad(next_BL[:, 1:], (0, 1), value=L)


def sequence_bounds(cu_seqlens: Tensor, L: int) -> Bounds:
    """Bounds of sequences that lie one behind the other: sequence n is [cu_seqlens[n], cu_seqlens[n + 1])."""
    cu = cu_seqlens.int()
    n_L = torch.searchsorted(cu, torch.arange(L, dtype=torch.int32, device=cu.device), right=True)
    start_L = F.pad(cu, (1, 0))[n_L]
    end_L = torch.cat([torch.zeros_like(cu[:1]), cu[1:], cu[-1:]])[n_L]
    return start_L[None], end_L[None]


def visible(
    Q: int,
    K: int,
    device: torch.device,
    *,
    is_causal: bool = False,
    key_lengths: Tensor | None = None,
    bounds: Bounds | None = None,
    window: tuple[int, int] | None = None,
) -> Tensor | None:
    """Boolean, broadcasts to [B, 1, Q, K]: true where a query sees a key; None where all see all."""
    i_Q1, j_K = torch.arange(Q, device=device)[:, None], torch.arange(K, device=device)
    left, right = window or (-1, -1)
    masks = []
    if is_causal:
        masks.append((j_K <= i_Q1)[None, None])
    if left >= 0:
        masks.append((j_K >= i_Q1 - left)[None, None])
    if right >= 0:
        masks.append((j_K <= i_Q1 + right)[None, None])
    if key_lengths is not None:
        masks.append((j_K < key_lengths[:, None])[:, None, None])
    if bounds is not None:
        start_BL, end_BL = bounds
        masks.append(((j_K >= start_BL[..., None]) & (j_K < end_BL[..., None]))[:, None])
    mask = None
    for one in masks:
        mask = one if mask is None else mask & one
    return mask


def explicit(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    scale: float,
    softcap: float = 0.0,
    dropout_p: float = 0.0,
    keep_BHQK: Tensor | None = None,
) -> Tensor:
    """The formula, word for word, with all scores in memory. `keep_BHQK` is dropout's mask; drawn where not given."""
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    dtype = torch.promote_types(query.dtype, torch.float32)
    score_BHQK = query.to(dtype) @ key.to(dtype).mT * scale
    if softcap:
        score_BHQK = softcap * torch.tanh(score_BHQK / softcap)
    if mask is not None and mask.dtype != torch.bool:
        score_BHQK = score_BHQK + mask
    elif mask is not None:
        score_BHQK = score_BHQK.masked_fill(~mask, -math.inf)
    p_BHQK = score_BHQK.softmax(-1)
    p_BHQK = p_BHQK.masked_fill((score_BHQK == -math.inf).all(-1, keepdim=True), 0.0)
    if keep_BHQK is not None:
        p_BHQK = p_BHQK * keep_BHQK * rescale(dropout_p)
    else:
        p_BHQK = F.dropout(p_BHQK, dropout_p)
    return (p_BHQK @ value.to(dtype)).to(query.dtype)


def reference(
    query_BHQE: Tensor,
    key_BGKE: Tensor,
    value_BGKV: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    documents: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """[B, H, Q, V]. `attn_mask` broadcasts to [B, H, Q, K]: true where a query may look, or added to the scores.

    `scale` is 1 / sqrt(E) unless given. Dropout draws from torch's generator whenever `dropout_p` > 0. In torch alone.
    """
    Q, K = query_BHQE.shape[-2], key_BGKE.shape[-2]
    bounds = _bounds(documents, cu_seqlens, Q)
    if key_lengths is None and bounds is None and window is None and not softcap:
        return F.scaled_dot_product_attention(
            query_BHQE, key_BGKE, value_BGKV, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa
        )
    mask = visible(Q, K, query_BHQE.device, is_causal=is_causal, key_lengths=key_lengths, bounds=bounds, window=window)
    if attn_mask is not None and mask is not None:
        mask = attn_mask & mask if attn_mask.dtype == torch.bool else attn_mask.masked_fill(~mask, -math.inf)
    elif mask is None:
        mask = attn_mask
    if softcap:
        scale = 1 / math.sqrt(query_BHQE.shape[-1]) if scale is None else scale
        return explicit(query_BHQE, key_BGKE, value_BGKV, mask, scale=scale, softcap=softcap, dropout_p=dropout_p)
    return F.scaled_dot_product_attention(
        query_BHQE, key_BGKE, value_BGKV, mask, dropout_p, scale=scale, enable_gqa=enable_gqa
    )


def _bounds(documents: Tensor | None, cu_seqlens: Tensor | None, L: int) -> Bounds | None:
    if documents is not None:
        return document_bounds(documents)
    return None if cu_seqlens is None else sequence_bounds(cu_seqlens, L)


def scaled_dot_product_attention(
    query_BHQE: Tensor,
    key_BGKE: Tensor,
    value_BGKV: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
    key_lengths: Tensor | None = None,
    documents: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    window: tuple[int, int] | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """As `reference`, by the kernel where DLTRAIN_KERNELS and the tensors allow it; then dropout is dropout.py's.

    Raises ValueError where the arguments that torch does not have fit neither the tensors nor each other.
    """
    query, key, value = query_BHQE, key_BGKE, value_BGKV
    kind = query.device.type
    if kind in ("cpu", "cuda") and torch.is_autocast_enabled(kind) and query.dtype != torch.float64:  # as torch's own
        query, key, value = (x.to(torch.get_autocast_dtype(kind)) for x in (query, key, value))
    _check(query, key, key_lengths, documents, cu_seqlens, window, softcap)
    unsupported = _unsupported(query, key, value, attn_mask, scale, enable_gqa)
    if not use_kernel("scaled_dot_product_attention", unsupported, query, key, value):
        return reference(
            query_BHQE, key_BGKE, value_BGKV, attn_mask, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa,
            key_lengths=key_lengths, documents=documents, cu_seqlens=cu_seqlens, window=window, softcap=softcap,
        )  # fmt: skip
    start, end = _bounds(documents, cu_seqlens, query.shape[2]) or (None, None)
    left, right = window or (-1, -1)
    right = 0 if is_causal else right
    seed = draw_seed(query.device) if dropout_p > 0 else None
    scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    options = scale, softcap, dropout_p, min(left, query.shape[2]), min(right, key.shape[2])
    return forward(query, key, value, seed, key_lengths, start, end, *options)[0]


def _check(
    query: Tensor,
    key: Tensor,
    key_lengths: Tensor | None,
    documents: Tensor | None,
    cu_seqlens: Tensor | None,
    window: tuple[int, int] | None,
    softcap: float,
) -> None:
    """Raises ValueError; what is torch's to refuse is left to torch."""
    given = {"key_lengths": key_lengths, "documents": documents, "cu_seqlens": cu_seqlens}
    if all(x is None for x in given.values()) and window is None and not softcap:
        return
    shape = f"query {tuple(query.shape)}, key {tuple(key.shape)}"
    if not query.dim() == key.dim() == 4:
        raise ValueError(f"{shape}: key_lengths, documents, cu_seqlens, window and softcap need [B, H, L, E]")
    wanted = {
        "key_lengths": query.shape[:1],
        "documents": (*query.shape[:1], *query.shape[2:3]),
        "cu_seqlens": None if cu_seqlens is None else (max(1, cu_seqlens.numel()),),
    }
    for name, x in given.items():
        if x is not None and (x.dtype not in (torch.int32, torch.int64) or x.device != query.device):
            raise ValueError(f"{name} is {x.dtype} on {x.device}: int32 or int64 on {query.device} is needed")
        if x is not None and x.shape != wanted[name]:
            raise ValueError(f"{name} has shape {tuple(x.shape)}, {tuple(wanted[name])} is needed for {shape}")
    if documents is not None and cu_seqlens is not None:
        raise ValueError("documents and cu_seqlens say the same thing: give one")
    if (documents is not None or cu_seqlens is not None) and query.shape[2] != key.shape[2]:
        raise ValueError(f"{shape}: documents and cu_seqlens are for as many keys as queries")
    if cu_seqlens is not None and query.shape[0] != 1:
        raise ValueError(f"{shape}: cu_seqlens is for one row, of all sequences one behind the other")
    if window is not None and (len(window) != 2 or min(window) < -1):
        raise ValueError(f"window is {window}: (left, right) is needed, each a number of positions or -1 for no end")
    if softcap < 0:
        raise ValueError(f"softcap is {softcap}: a positive number is needed, or 0 for none")


def _unsupported(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None, scale: float | None, enable_gqa: bool
) -> str:
    """What no kernel does; among it the shapes that torch refuses."""
    shapes = [query.shape, key.shape, value.shape]
    if not query.dim() == key.dim() == value.dim() == 4:
        return f"query, key and value of {[tuple(x) for x in shapes]}"
    if attn_mask is not None:
        return "an attn_mask: give key_lengths, documents, cu_seqlens, window or is_causal"
    B, H, _, E = query.shape
    G, V = key.shape[1], value.shape[-1]
    same = key.shape[0] == B and key.shape[:3] == value.shape[:3] and key.shape[-1] == E
    if not same or not G or H % G or (H != G and not enable_gqa):
        return f"query, key and value of {[tuple(x) for x in shapes]}"
    if not 0 < E <= 256 or not 0 < V <= 256:
        return f"heads of no or more than 256 features: {[tuple(x) for x in shapes]}"
    if not query.dtype == key.dtype == value.dtype or (query.is_cuda and query.dtype == torch.float64):
        return f"{query.dtype}, {key.dtype} and {value.dtype}"
    if scale is not None and not 0 < scale < math.inf:
        return f"scale {scale}"
    return ""


def _forward(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    from dltrain.kernels import attention_triton

    return attention_triton.attention(query, key, value, attention_triton.Options(*options))


def _heads(like: Tensor, B: int, H: int, L: int, features: int) -> Tensor:
    return like.new_empty(B, L, H, features).transpose(1, 2)


def _forward_fake(query: Tensor, key: Tensor, value: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    B, H, Q, _ = query.shape
    dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
    return _heads(query, B, H, Q, value.shape[-1]), query.new_empty(B, H, (Q + 3) // 4 * 4, dtype=dtype)[..., :Q]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, *inputs[3:7])
    ctx.numbers = inputs[7:]
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
    return *backward(grad, *ctx.saved_tensors, *ctx.numbers), *[None] * 9


def _backward(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, out: Tensor, lse: Tensor, *options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    from dltrain.kernels import attention_backward_triton, attention_triton

    return attention_backward_triton.gradients(grad, query, key, value, out, lse, attention_triton.Options(*options))


def _backward_fake(
    grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor]:
    B, H, Q, E = query.shape
    G, K, V = value.shape[1:]
    return _heads(query, B, H, Q, E), _heads(query, B, G, K, E), _heads(query, B, G, K, V)


_OPTIONS = (
    "Tensor? seed, Tensor? key_lengths, Tensor? start, Tensor? end, "
    "float scale, float softcap, float dropout_p, int left, int right"
)
backward = register(
    "attention_backward(Tensor grad, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, "
    f"{_OPTIONS}) -> (Tensor, Tensor, Tensor)",
    _backward,
    _backward_fake,
)
forward = register(
    f"attention_forward(Tensor query, Tensor key, Tensor value, {_OPTIONS}) -> (Tensor, Tensor)",
    _forward,
    _forward_fake,
    setup=_save,
    backward=_differentiate,
)
