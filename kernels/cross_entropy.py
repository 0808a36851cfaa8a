"""Cross-entropy of a softmax. Label smoothing: Szegedy et al. 2015, https://arxiv.org/abs/1512.00567, section 7.

    loss_i = (1 - s) (lse_i - z_i[t_i]) + s (lse_i - mean_c z_i[c]),   lse_i = log sum_c exp(z_i[c])

Logits z, targets t, smoothing s. Rows whose target is `ignore_index` give 0 and do not count in the mean.
"""

import torch.nn.functional as F
from torch import Tensor


def reference(
    logits: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """Logits [N, C, ...] and class numbers [N, ...] -> a float32 scalar, or [N, ...] with reduction="none".

    In float32 whatever the logits: bfloat16 has 8 bits, so a loss near 10 would come in steps of 0.06.
    """
    return F.cross_entropy(
        logits.float(), target, ignore_index=ignore_index, reduction=reduction, label_smoothing=label_smoothing
    )
