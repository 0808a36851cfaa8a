"""Scaled dot-product attention. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, equation 1.

    o_i = sum_j dropout(p_ij) v_j,   p_ij = softmax_j(scale q_i . k_j)   over the keys j that query i may see

The softmax is computed in float32 whatever the inputs' type; a query that sees no key gets zeros, not NaN.
"""

# B batch, H heads, Q queries, K keys, E features of a query and key, V features of a value

import torch.nn.functional as F
from torch import Tensor


def reference(
    query_BHQE: Tensor,
    key_BHKE: Tensor,
    value_BHKV: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
) -> Tensor:
    """[B, H, Q, V]. `attn_mask` broadcasts to [B, H, Q, K]: true where a query may look, or added to the scores.

    `scale` is 1 / sqrt(E) unless given. Dropout draws from torch's generator whenever `dropout_p` > 0.
    """
    return F.scaled_dot_product_attention(
        query_BHQE, key_BHKE, value_BHKV, attn_mask, dropout_p, is_causal, scale=scale
    )
