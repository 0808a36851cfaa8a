"""AdamW. Loshchilov and Hutter 2019, https://arxiv.org/abs/1711.05101, algorithm 2.

    g = scale grad;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
    w = (1 - lr decay) w - lr m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps)

In float32, or float64 where w is. Every element is for itself: the bits do not depend on how a tensor is sharded.

The kernel moves each number once: 28 bytes for a parameter of float32 weight and moments with gradients in float32;
bfloat16 weights may have float32 masters in the state, which are what is stepped, or be rounded at random: up with the
probability of what is cut off (Gupta et al. 2015, https://arxiv.org/abs/1502.02551, section 2), so that steps smaller
than half a unit in the last place are not lost.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim.adamw import adamw as torch_adamw

from dltrain.errors import UserError
from dltrain.kernels import multi_tensor
from dltrain.kernels.dispatch import use_kernel
from dltrain.kernels.registration import register


def reference(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    *,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    decay: float,
    scale: Tensor | None = None,
) -> None:
    """One step, in place; `step` counts from 1. The moments are in the weight's type or wider."""
    wide = exp_avg.dtype
    g = grad.to(wide) if scale is None else grad.to(wide) * scale.to(wide)
    exp_avg.lerp_(g, 1.0 - betas[0])
    exp_avg_sq.mul_(betas[1]).addcmul_(g, g, value=1.0 - betas[1])
    root = (exp_avg_sq.sqrt() / (1.0 - betas[1] ** step) ** 0.5).add_(eps)
    w = weight.to(wide) * (1.0 - lr * decay)
    weight.copy_(w.addcdiv_(exp_avg, root, value=-lr / (1.0 - betas[0] ** step)))


class AdamW(torch.optim.AdamW):
    """torch.optim.AdamW with the kernel where it can run; elsewhere it is torch's own step, to the bit.

    The state is torch's (`step`, `exp_avg`, `exp_avg_sq`) and its checkpoints are exchangeable with it. For bfloat16 or
    float16 weights, `masters` adds `master` in float32 to the state, the moments being float32 then too; `stochastic`
    rounds bfloat16 weights at random, a function of (seed, step, number of the parameter, element) and nothing else.
    Parameters may be DTensors, of which a process steps its own part.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        masters: bool = False,
        stochastic: bool = False,
        seed: int = 0,
    ):
        super().__init__(params, lr, betas, eps, weight_decay, foreach=True)
        if masters and stochastic:
            raise UserError("AdamW: masters keep what rounding at random would save: choose one")
        self.masters, self.stochastic, self.seed = masters, stochastic, seed
        if masters:  # now, since they are the weights themselves
            for p in self._params():
                self._init_state(p)

    def _params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"]]

    def _init_state(self, p: Tensor) -> dict[str, Tensor]:
        state = self.state[p]
        if not state:
            wide = torch.promote_types(p.dtype, torch.float32) if self.masters or self.stochastic else p.dtype
            state["step"] = torch.tensor(0.0)
            state["exp_avg"], state["exp_avg_sq"] = (torch.zeros_like(p, dtype=wide) for _ in range(2))
            if self.masters and p.dtype != wide:
                state["master"] = p.detach().to(wide, copy=True)
        return state

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        scale: Tensor | None = None,
        good: Tensor | None = None,
    ) -> float | None:
        """One step with `scale` (a scalar tensor; None: 1) times the gradients, which may be overwritten.

        `good` (0-d bool on the device; None: true): where it is false the kernel moves nothing, of which the host, who
        counts the step all the same, need not know yet. Without the kernel it is waited for, and the step not counted.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        plain = not (self.masters or self.stochastic)
        found = [p for p in self._params() if p.grad is not None]
        kinds = {(p.device, p.dtype): local(p) for p in found}
        lacking = "weights with gaps in memory" if any(not multi_tensor.dense(local(p)) for p in found) else ""
        if all(use_kernel("adamw", lacking, p) for p in kinds.values()):
            self._fused(scale, None if good is None else good.long())
        elif good is not None and not bool(good):
            pass
        elif plain:
            if scale is not None and found:
                torch._foreach_mul_([local(p.grad) for p in found], scale.to(found[0].dtype))
            self._torchs()
        else:
            self._plain(scale)
        return loss

    def _fused(self, scale: Tensor | None, good: Tensor | None) -> None:
        number = 0
        for group in self.param_groups:
            buckets: dict[Any, list[tuple[Tensor, Tensor, int]]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    self._init_state(p)
                    key = p.device, p.dtype, p.grad.dtype, "master" in self.state[p]
                    buckets.setdefault(key, []).append((p, p.grad, number))
                number += 1
            for (device, *_), members in buckets.items():
                params = [local(p) for p, _, _ in members]
                states = [self.state[p] for p, _, _ in members]
                for state in states:
                    state["step"] += 1
                adamw(
                    params,
                    [multi_tensor.like(local(g), q) for (_, g, _), q in zip(members, params)],
                    [local(s["exp_avg"]) for s in states],
                    [local(s["exp_avg_sq"]) for s in states],
                    [local(s["master"]) for s in states if "master" in s],
                    [int(s["step"]) for s in states],
                    scale,
                    float(group["lr"]),
                    *group["betas"],
                    group["eps"],
                    group["weight_decay"],
                    _seed(self.seed, device) if self._rounds(params[0]) else None,
                    [n for _, _, n in members],
                    [first_element(p) if self._rounds(p) else 0 for p, _, _ in members],
                    good,
                )

    def _torchs(self) -> None:
        """torch's step of what this process has: DTensors would be unwrapped at each of its operations. Not the fused
        one, whose bits on a CPU depend on where a tensor is cut."""
        for group in self.param_groups:
            found = [p for p in group["params"] if p.grad is not None]
            states = [self._init_state(p) for p in found]
            torch_adamw(
                [local(p) for p in found],
                [local(p.grad) for p in found],
                [local(s["exp_avg"]) for s in states],
                [local(s["exp_avg_sq"]) for s in states],
                [],
                [s["step"] for s in states],
                foreach=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )

    def _rounds(self, p: Tensor) -> bool:
        return self.stochastic and p.dtype == torch.bfloat16

    def _plain(self, scale: Tensor | None) -> None:
        """The reference, parameter by parameter."""
        for group in self.param_groups:
            options = {k: group[k] for k in ("lr", "betas", "eps")} | {"decay": group["weight_decay"]}
            for p in group["params"]:
                if p.grad is None:
                    continue
                if self._rounds(p):
                    raise UserError("AdamW rounds at random in its kernel alone: take a GPU, or leave stochastic out")
                state = self._init_state(p)
                state["step"] += 1
                weight = local(state.get("master", p))
                moments = local(state["exp_avg"]), local(state["exp_avg_sq"])
                reference(weight, local(p.grad), *moments, int(state["step"]), **options, scale=scale)
                if "master" in state:
                    local(p).copy_(weight)


@functools.lru_cache(maxsize=8)
def _seed(seed: int, device: torch.device) -> Tensor:
    return torch.tensor([seed], device=device)


def local(tensor: Any) -> Tensor:
    """What this process has of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def first_element(param: Tensor) -> int:
    """The number, within the whole parameter, of the first element that this process has."""
    if not isinstance(param, DTensor):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    _, offset = compute_local_shape_and_global_offset(param.shape, param.device_mesh, param.placements)
    return sum(o * s for o, s in zip(offset, param.stride(), strict=True))


def _run(*inputs: Any) -> None:
    from dltrain.kernels import adamw_triton

    adamw_triton.step(*inputs)


adamw = register(
    "adamw(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] masters,"
    " int[] steps, Tensor? scale, float lr, float beta1, float beta2, float eps, float decay, Tensor? seed,"
    " int[] indices, int[] starts, Tensor? good=None) -> ()",
    _run,
    lambda *_: None,
)
