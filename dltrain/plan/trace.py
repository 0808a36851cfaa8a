"""A micro-batch forward and backward on tensors without memory: the bytes that would be alive, and the time it takes.

Operations are those that the machine would run, on a GPU our kernels by their fake implementations. Storages are seen
when an operation returns them and gone when Python and autograd let go of them, so lifetimes are those of eager mode.
"""

import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map
from torch.utils.flop_counter import flop_registry

from dltrain.config import Config
from dltrain.flops import Work, per_unit
from dltrain.kernels import attention, linear_cross_entropy
from dltrain.kernels.dispatch import as_on_a_gpu
from dltrain.plan.machines import Machine
from dltrain.strategy import DTYPES, materialise, remat, units

# What of a peak is reached: large matrix products of cuBLAS and copies on a Hopper board. Assumed, not measured here.
PRODUCTS, COPIES = 0.70, 0.85
LAUNCH = 6e-6  # seconds that the host takes for an operation
CHUNK = 1 << 28  # bytes of logits that linear cross-entropy has at a time: inside of an operation, so not seen


def _attention(query: Any, key: Any, value: Any, *rest: Any, **_: Any) -> float:
    """Blocks that a causal mask hides are not computed: rest ends in left, right, where 0 is causal."""
    B, H, Q, E = query.shape
    return 2.0 * B * H * Q * key.shape[2] * (E + value.shape[-1]) / (2 if rest[-1] == 0 else 1)


def _logits(input: Any, weight: Any, *rest: Any, **_: Any) -> float:
    """The logits, and of the gradients those that are wanted."""
    return 2.0 * input.shape[0] * weight.numel() * (1 + (sum(rest[-1][:2]) if isinstance(rest[-1], list) else 0))


FORMULAS = flop_registry | {
    attention.forward.overloadpacket: _attention,
    attention.backward.overloadpacket: lambda grad, *rest, **_: 2.5 * _attention(*rest),
    linear_cross_entropy.sum_forward.overloadpacket: _logits,
    linear_cross_entropy.rows_forward.overloadpacket: _logits,
    linear_cross_entropy.rows_backward.overloadpacket: lambda grad, *rest, **_: _logits(*rest),
}
_VIEWS = (
    "view _unsafe_view t transpose expand detach permute slice select unsqueeze squeeze split unbind alias as_strided"
)
VIEWS = {f"aten::{name}" for name in _VIEWS.split()}


@dataclass(frozen=True)
class Trace:
    """Of one micro-batch: bytes, seconds and FLOPs."""

    batch: float  # bytes of the batch
    kept: float  # alive when forward ends: what backward needs
    peak: float  # most alive at any time beside weights and their gradients
    grown: float  # most alive beside weights, where gradients, in float32, grow while activations go
    layer: float  # of `kept` in one of the alike units, 0 where there are none
    forward: float  # seconds
    backward: float
    flops: float  # in matrix products, by the hardware
    update: float  # most alive in the optimizer's step beside its state


class _Watch(TorchDispatchMode):
    """Bytes alive of storages that operations made while it watches, and the seconds that these would take."""

    def __init__(self, seconds: Callable[[float, float, torch.dtype], float]):
        super().__init__()
        self.seconds, self.alive, self.peak, self.grads, self.grown = seconds, 0, 0, 0, 0
        self.host = self.device = self.flops = 0.0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = [x for x in tree_iter(out) if isinstance(x, Tensor)]
        for x in made:
            self._see(x)
        if func._schema.name in VIEWS or func.namespace == "prim":
            return out
        used = {
            id(x.untyped_storage()): x for x in (*tree_iter(args), *tree_iter(kwargs or {})) if isinstance(x, Tensor)
        }
        moved = sum(x.nbytes for x in (*used.values(), *made))
        formula = FORMULAS.get(func._overloadpacket)
        flops = float(formula(*args, **(kwargs or {}), out_val=out)) if formula else 0.0
        if "linear_cross_entropy" in func._schema.name and formula:
            self.peak = max(self.peak, self.alive + min(CHUNK, args[0].shape[0] * args[1].shape[0] * made[0].itemsize))
        self.flops += flops
        self.device += self.seconds(flops, moved, next(iter(used.values()), made[0]).dtype if made else torch.float32)
        self.host += LAUNCH
        return out

    def _see(self, x: Tensor) -> None:
        storage = x.untyped_storage()
        key = storage._cdata
        if key in self.known:
            return
        self.known[key] = size = storage.nbytes()
        self.alive += size
        self.peak, self.grown = max(self.peak, self.alive), max(self.grown, self.alive + self.grads)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.alive -= self.known.pop(key)

    def take(self, p: Tensor) -> None:
        """A gradient is done: from here on it is counted in float32."""
        p.grad, self.grads = None, self.grads + 4 * p.numel()
        self.grown = max(self.grown, self.alive + self.grads)

    def forget(self) -> float:
        """Seconds since the last call: what takes longer, the device or the host that feeds it."""
        spent, self.host, self.device = max(self.host, self.device), 0.0, 0.0
        return spent


def trace(work: Work, cfg: Config, rows: int, machine: Machine | None) -> Trace:
    """A micro-batch of `rows`; without a machine on this one's CPU, whose time is not told (0)."""
    first = per_unit(work, lambda task: _traced(work, cfg, rows, machine, task))
    return Trace(*first, *per_unit(work, lambda task: [_update(work, machine, task)]))


def _traced(work: Work, cfg: Config, rows: int, machine: Machine | None, task: nn.Module) -> list[float]:
    dtype = DTYPES[cfg.precision]

    def seconds(flops: float, moved: float, dtype: torch.dtype) -> float:
        if machine is None:
            return 0.0
        peak = machine.peak("fp32" if dtype == torch.float32 else cfg.precision) or machine.peak("fp16")
        assert peak
        return max(flops / (peak * PRODUCTS), moved / (machine.hbm * COPIES))

    def cast(module: nn.Module, args: Any) -> Any:
        def low(x: Any) -> Any:
            return x.to(dtype) if isinstance(x, Tensor) and x.is_floating_point() else x

        return tree_map(low, args)

    with FakeTensorMode(), as_on_a_gpu() if machine else nullcontext(), torch.random.fork_rng(devices=[]):
        task._apply(lambda t: torch.empty(t.shape, dtype=dtype if isinstance(t, nn.Parameter) else t.dtype))
        if dtype != torch.float32:
            task.register_forward_pre_hook(cast)
        remat(task, cfg.remat)
        stack = units(task)
        watch, layers = _Watch(seconds), [0.0]
        for p in task.parameters():
            if p.requires_grad:
                p.register_post_accumulate_grad_hook(watch.take)
        for unit in stack[-1:]:
            unit.register_forward_pre_hook(lambda *_: layers.append(-watch.alive))
            unit.register_forward_hook(lambda *_: layers.append(watch.alive))
        parts = []
        for loss_of in work.steps:
            watch.grads = 0
            with watch:
                batch = work.batch(rows, "cpu")
                held = watch.alive
                loss = loss_of(task, batch)
                kept, forward = watch.alive - held, watch.forget()
                loss.backward()
                parts.append((held, kept, forward, watch.forget(), watch.flops))
            del loss, batch
            watch.flops = 0.0
    n = len(parts)
    held, kept = (max(part[i] for part in parts) for i in range(2))
    forward, backward, flops = (sum(part[i] for part in parts) / n for i in range(2, 5))
    return [held, kept, watch.peak - held, watch.grown - held, sum(layers[1:3]), forward, backward, flops]


def _update(work: Work, machine: Machine | None, task: nn.Module) -> float:
    with FakeTensorMode(), as_on_a_gpu() if machine else nullcontext():
        task._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        optimizer = work.optimizer(task)
        materialise(optimizer)
        for p in task.parameters():
            p.grad = torch.empty_like(p) if p.requires_grad else None
        with _Watch(lambda *_: 0.0) as watch:
            optimizer.step()
    return watch.peak
