"""Optimizers: hyper-parameters -> (module -> optimizer). A builder, because sharding must come before the optimizer.

Every parameter group keeps its peak learning rate as `base_lr`; a trainer sets `group["lr"] = group["base_lr"] *
multiplier` before each step. Updates are elementwise, or sum rows that are never cut, so that an optimizer over shards
gives the bits of one over whole tensors.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.kernels.adamw import AdamW, local
from dltrain.kernels.lamb import Lamb, gather, row_squares

Builder = Callable[[nn.Module], torch.optim.Optimizer]


def adamw(
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-6,
    decay: float = 0.01,
    hidden_rate: float = 1.0,
) -> Builder:
    """AdamW (Loshchilov and Hutter 2017, https://arxiv.org/abs/1711.05101, algorithm 2) with BERT's defaults.

    Matrices and embeddings decay; biases and norms (fewer than two dimensions) do not. Unlike BERT's own code it
    corrects the bias of the moments. `hidden_rate` is muP's multiplier of the rate of nn.Linear's weights (Yang et al.
    2022, https://arxiv.org/abs/2203.03466, table 8); what they decay in a step stays the same.
    """

    def build(module: nn.Module) -> torch.optim.Optimizer:
        parameters = _parameters(module)
        scaled = {m.weight for m in module.modules() if isinstance(m, nn.Linear)} if hidden_rate != 1 else set()
        hidden = {"weight_decay": decay / hidden_rate, "base_lr": lr * hidden_rate}
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2 and p not in scaled]}
            | {"weight_decay": decay, "base_lr": lr},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "base_lr": lr},
            {"params": [p for p in parameters if p in scaled]} | hidden,
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


def lars(lr: float, momentum: float = 0.9, decay: float = 1e-4, trust: float = 1e-3, nesterov: bool = False) -> Builder:
    """LARS (You et al. 2017, https://arxiv.org/abs/1708.03888, algorithm 1), for batches of many thousand images.

    Biases and norms (fewer than two dimensions) have plain momentum: they neither decay nor adapt their learning rate
    to a norm. `lr` is thus the rate of plain SGD for them, and many times that for the rest. Not under zero1 to zero3,
    which cut tensors.
    """

    def build(module: nn.Module) -> torch.optim.Optimizer:
        parameters = _parameters(module)
        groups = [
            {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": decay, "adapt": True, "base_lr": lr},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0, "adapt": False, "base_lr": lr},
        ]
        return Lars([g for g in groups if g["params"]], lr, momentum, trust, nesterov)

    return build


class Lars(torch.optim.Optimizer):
    """v = momentum v + lr r (g + decay w);  w -= v, or momentum v + lr r (g + decay w) with Nesterov's.

    r = trust |w| / (|g| + decay |w|) for each tensor, 1 where a norm is 0 and in groups whose `adapt` is false. Norms
    are sums over rows in one order, as LAMB's (`kernels/lamb.py`), so shards have the bits of the whole tensor.

    Raises:
        UserError: for parameters that it was not made with, such as DeepSpeed's flat partitions.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float,
        momentum: float = 0.9,
        trust: float = 1e-3,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        adapt: bool = True,
    ):
        rest = {"trust": trust, "nesterov": nesterov, "weight_decay": weight_decay, "adapt": adapt}
        super().__init__(params, {"lr": lr, "momentum": momentum} | rest)
        self.known = {id(p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not self.known.issuperset(map(id, params)):
                raise UserError("LARS needs whole tensors for its norms: take another strategy than zero1 to zero3")
            for p in params:
                if not self.state[p]:
                    self.state[p]["momentum_buffer"] = torch.zeros_like(p)
            rates = self._ratios(params, group) if group["adapt"] and params else [1.0] * len(params)
            for p, rate in zip(params, rates, strict=True):
                w, v = local(p), local(self.state[p]["momentum_buffer"])
                change = (local(p.grad) + group["weight_decay"] * w) * (group["lr"] * rate)
                v.mul_(group["momentum"]).add_(change)
                w.sub_(change + group["momentum"] * v if group["nesterov"] else v)

    def _ratios(self, params: list[Any], group: dict[str, Any]) -> list[Tensor]:
        squares = [torch.stack((row_squares(local(p)), row_squares(local(p.grad))), 1) for p in params]
        norms = [whole.sum(0).sqrt() for whole in gather(torch.cat(squares), params).split([len(p) for p in params])]
        return [
            torch.where((w > 0) & (g > 0), group["trust"] * w / (g + group["weight_decay"] * w), 1.0)
            for w, g in (norm.unbind() for norm in norms)
        ]


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
