"""The feed-forward network of a Transformer. Vaswani et al. 2017, https://arxiv.org/abs/1706.03762, section 3.3.

    y = gelu(x up_weight^T + up_bias) down_weight^T + down_bias

The widest tensors are the two between the projections. For backward only one is kept, what the first projection gave
without its bias: one pass over it and the gradient gives the GELU again, its gradient and that of the bias.
"""

# ... rows, D width of the network, F width between the projections

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels import gelu
from dltrain.kernels.dispatch import use_kernel


def reference(
    x: Tensor,
    up_weight_FD: Tensor,
    up_bias_F: Tensor,
    down_weight_DF: Tensor,
    down_bias_D: Tensor,
    approximate: str = "none",
) -> Tensor:
    """[..., D] of x [..., D], with weights and biases as in torch.nn.Linear; `approximate` as in gelu."""
    return F.linear(F.gelu(F.linear(x, up_weight_FD, up_bias_F), approximate=approximate), down_weight_DF, down_bias_D)


def mlp(
    x: Tensor,
    up_weight_FD: Tensor,
    up_bias_F: Tensor,
    down_weight_DF: Tensor,
    down_bias_D: Tensor,
    approximate: str = "none",
) -> Tensor:
    """As `reference`, by the kernel where DLTRAIN_KERNELS and the tensors allow it."""
    tensors = x, up_weight_FD, up_bias_F, down_weight_DF, down_bias_D
    if approximate in ("none", "tanh") and use_kernel("mlp", _unsupported(*tensors), *tensors):
        if torch.is_autocast_enabled(x.device.type):
            narrow = torch.get_autocast_dtype(x.device.type)
            with torch.autocast(x.device.type, enabled=False):
                return _MLP.apply(*(t.to(narrow) for t in tensors), approximate == "tanh")
        return _MLP.apply(*tensors, approximate == "tanh")
    return reference(*tensors, approximate)


def _unsupported(x: Tensor, *weights: Tensor) -> str:
    up_weight, up_bias, down_weight, down_bias = (tuple(w.shape) for w in weights)
    width = x.shape[-1:]
    if up_weight[1:] != width or up_bias != up_weight[:1] or down_weight != up_weight[::-1] or down_bias != width:
        return f"weights {up_weight}, {up_bias}, {down_weight}, {down_bias} on {tuple(x.shape)}"
    if not torch.is_autocast_enabled(x.device.type) and any(w.dtype != x.dtype for w in weights):
        return "weights of other types than the input's"
    return ""


class _MLP(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up_weight: Tensor, up_bias: Tensor, down_weight: Tensor, down_bias: Tensor, tanh: bool
    ) -> Tensor:
        between = F.linear(x, up_weight)
        ctx.tanh = tanh
        ctx.save_for_backward(x, up_weight, up_bias, down_weight, between)
        return F.linear(gelu.forward(between, up_bias, tanh), down_weight, down_bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, up_weight, up_bias, down_weight, between = ctx.saved_tensors
        dbetween, dup_bias, after = gelu.backward(grad @ down_weight, between, up_bias, ctx.tanh, True)
        grad_MD, dbetween_MF = grad.flatten(0, -2), dbetween.flatten(0, -2)
        return (
            dbetween @ up_weight if ctx.needs_input_grad[0] else None,
            dbetween_MF.t() @ x.flatten(0, -2),
            dup_bias,
            grad_MD.t() @ after.flatten(0, -2),
            grad_MD.sum(0),
            None,
        )
