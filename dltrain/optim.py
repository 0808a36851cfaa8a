"""Optimizers: hyper-parameters -> (module -> optimizer). A builder, because sharding must come before the optimizer.

Every parameter group keeps its peak learning rate as `base_lr`; a trainer sets `group["lr"] = group["base_lr"] *
multiplier` before each step. Updates are elementwise, or sum rows that are never cut, so that an optimizer over shards
gives the bits of one over whole tensors.
"""

from collections.abc import Callable

import torch
from torch import nn

from dltrain.kernels.adamw import AdamW
from dltrain.kernels.lamb import Lamb

Builder = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, decay: float = 0.01) -> Builder:
    """AdamW (Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101, algorithm 2) with BERT's defaults.

    Matrices and embeddings decay; biases and norms (fewer than two dimensions) do not. Unlike BERT's own code it
    corrects the bias of the moments.
    """

    def build(module: nn.Module) -> torch.optim.Optimizer:
        parameters = _parameters(module)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay, "base_lr": lr},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "base_lr": lr},
        ]
        return AdamW([g for g in groups if g["params"]], lr, betas, eps)

    return build


def lamb(lr: float, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, decay: float = 0.01) -> Builder:
    """LAMB (You et al. 2020, https://arxiv.org/abs/1904.00962, algorithm 2), for batches of many thousand rows.

    Biases and norms neither decay nor adapt their learning rate to a norm. Not under zero1 to zero3, which cut tensors.
    """

    def build(module: nn.Module) -> torch.optim.Optimizer:
        parameters = _parameters(module)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay, "adapt": True, "base_lr": lr},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "adapt": False, "base_lr": lr},
        ]
        return Lamb([g for g in groups if g["params"]], lr, betas, eps)

    return build


def sgd(lr: float, momentum: float = 0.0, decay: float = 0.0, nesterov: bool = False) -> Builder:
    """Stochastic gradient descent with momentum (Sutskever et al. 2013, https://proceedings.mlr.press/v28/sutskever13).

    `decay` is added to the gradient of every parameter, as He et al. 2015 do (section 3.4).
    """

    def build(module: nn.Module) -> torch.optim.Optimizer:
        group = {"params": _parameters(module), "base_lr": lr}
        return torch.optim.SGD([group], lr, momentum, weight_decay=decay, nesterov=nesterov, foreach=True)

    return build


def take_turns(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Let only those parameter groups move whose `turn` is true; the others' state stays as it is, as if every group
    had an optimizer of its own. For players who train in turns (Goodfellow et al. 2014, algorithm 1)."""

    def skip_idle(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
        for group in optimizer.param_groups:
            for p in group["params"] if not group["turn"] else []:
                p.grad = None

    optimizer.register_step_pre_hook(skip_idle)
    return optimizer


def _parameters(module: nn.Module) -> list[nn.Parameter]:
    """Trainable parameters in the order of their names, which is the order of the optimizer's state."""
    named = sorted((name, p) for name, p in module.named_parameters() if p.requires_grad)
    return [p for _, p in named]
