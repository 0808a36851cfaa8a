"""What a recipe computes, without its data; and the FLOPs of a row, counted on tensors that have shapes but no memory.

Counted are matrix products and convolutions, at 2 FLOPs per multiply-add, in the order in which autograd really runs
them: the first convolution of a network has no gradient of its input, a penalty on a gradient is differentiated twice.
Attention is that of its formula, whatever kernel computes it: scores that a backward makes again are no model FLOPs.
"""

# B rows; N parameters

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from dltrain.optim import Builder
from dltrain.strategy import remat

Batch = dict[str, Tensor]
ATTENTION = {torch.ops.aten.bmm, torch.ops.aten.baddbmm}  # its two products and their gradients; layers have mm, addmm


def loss_of(task: nn.Module, batch: Batch) -> Tensor:
    return task(batch)["loss"]


@dataclass(frozen=True)
class Work:
    """What a recipe computes: enough to measure it, and to plan it on a machine that is not there."""

    task: Callable[[], nn.Module]
    optimizer: Builder
    row: Batch  # a batch of one row: of tensors with dimensions the first is rows
    tokens: int = 0  # of a row; 0: rows are no text
    causal: bool = False  # attention looks back alone
    steps: Sequence[Callable[[nn.Module, Batch], Tensor]] = (loss_of,)  # the losses of steps that take turns

    def batch(self, rows: int, device: str) -> Batch:
        """A batch of so many rows, whose contents are not set."""
        return {k: torch.empty((v.shape[0] * rows, *v.shape[1:]) if v.ndim else (), dtype=v.dtype, device=device)
                for k, v in self.row.items()}  # fmt: skip


@dataclass(frozen=True)
class Flops:
    """FLOPs of a row, forward and backward, by four conventions."""

    needed: float  # look-ups cost nothing, and of causal attention the masked half does not count
    full: float  # with attention in full, as a formula without regard to the mask has it
    run: float  # and with what is computed again under remat: what the hardware does
    by_parameters: float  # 6 N a token, tables that are only looked up included, and attention in full; 0: no text


def count(work: Work, rows: int, again: str = "none") -> Flops:
    """FLOPs of a row in a batch of `rows`; `again` is `cfg.remat`.

    `by_parameters` is the convention of Chowdhery et al. 2022, https://arxiv.org/abs/2204.02311, appendix B, which most
    publish: 6 N + 12 (layers) (width) (row) a token.
    """
    products, attention = per_unit(work, lambda task: _counted(work, task, rows, "none"))
    full = products + attention
    run = full if again == "none" else sum(per_unit(work, lambda task: _counted(work, task, rows, again)))
    by_parameters = 6.0 * parameters(work) * work.tokens + attention if work.tokens else 0.0
    return Flops(full - attention / 2 if work.causal else full, full, run, by_parameters)


def parameters(work: Work) -> int:
    """Trainable ones."""
    with torch.device("meta"):
        return sum(p.numel() for p in work.task().parameters() if p.requires_grad)


def per_unit(work: Work, cost: Callable[[nn.Module], Sequence[float]]) -> list[float]:
    """Costs of a task that grow by the same for every further one of its alike units (the layers of a Transformer):
    those of a task of two and of three, drawn out to as many as there are. A task without a stack of alike units is
    gone through as it is."""
    few = [_shortened(work, units) for units in (2, 3)]
    (two, n), (three, _) = few
    if n <= 3:
        return list(cost(three))
    return [a + (b - a) * (n - 2) for a, b in zip(cost(two), cost(three), strict=True)]


def _shortened(work: Work, units: int) -> tuple[nn.Module, int]:
    """The task with so many of its alike units at most, and how many there are."""
    with torch.device("meta"):
        task = work.task()
    stacks = [m for m in task.modules() if isinstance(m, nn.ModuleList) and len({_kind(unit) for unit in m}) == 1]
    if len(stacks) != 1:
        return task, 0
    n = len(stacks[0])
    del stacks[0][units:]
    return task, n


def _kind(unit: nn.Module) -> tuple[str, ...]:
    return repr(unit), *(str(p.shape) for p in unit.parameters())


class _Counter(TorchDispatchMode):
    """As FlopCounterMode, by its formulas, without its tree of modules, which takes most of its time."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[Any, float] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if (op := func._overloadpacket) in flop_registry:
            flops = flop_registry[op](*args, **(kwargs or {}), out_val=out)
            self.found[op] = self.found.get(op, 0.0) + flops
        return out


def _counted(work: Work, task: nn.Module, rows: int, again: str) -> tuple[float, float]:
    """FLOPs of a row outside and inside of attention."""
    with FakeTensorMode():
        task._apply(lambda tensor: torch.empty(tensor.shape, dtype=tensor.dtype))
        remat(task, again)
        batch = work.batch(rows, "cpu")
        with _Counter() as counter, sdpa_kernel(SDPBackend.MATH), torch.random.fork_rng(devices=[]):
            for loss in work.steps:
                loss(task, batch).backward()
    attention = sum(flops for op, flops in counter.found.items() if op in ATTENTION)
    each = rows * len(work.steps)
    return (sum(counter.found.values()) - attention) / each, attention / each
