"""Gaussian error linear unit. Hendrycks and Gimpel 2016, https://arxiv.org/abs/1606.08415, section 2.

gelu(x) = x Phi(x) = x (1 + erf(x / sqrt(2))) / 2
tanh:     x (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2
"""

import torch.nn.functional as F
from torch import Tensor


def reference(x: Tensor, approximate: str = "none") -> Tensor:
    """Elementwise; `approximate` is "none" (erf: BERT) or "tanh" (GPT-2)."""
    return F.gelu(x, approximate=approximate)
