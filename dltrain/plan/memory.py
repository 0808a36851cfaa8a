"""Bytes of a rank: what lasts from step to step, exactly, and the most that is alive within one.

Legend: S ranks that share a copy of the weights, n rows of a parameter, W processes.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dltrain.config import Config
from dltrain.flops import Work
from dltrain.kernels.dispatch import as_on_a_gpu
from dltrain.lanes import Tree, blocks, rounds
from dltrain.plan.machines import Machine
from dltrain.plan.trace import Trace
from dltrain.strategy import DTYPES, materialise, units

SMALL = 100_000  # elements of a parameter that ZeRO-3 keeps whole: DeepSpeed's param_persistence_threshold
BUCKET = 500_000_000  # elements of ZeRO's bucket of gradients: DeepSpeed's reduce_bucket_size


@dataclass(frozen=True)
class Place:
    """Where a rank is: among how many processes, so many on each node."""

    world: int
    local_world: int
    rank: int = 0

    def shards(self, strategy: str) -> int:
        """Over how many ranks a copy of the weights is spread."""
        return {"fsdp": self.world, "hybrid": self.local_world}.get(strategy, 1)


@dataclass(frozen=True)
class Size:
    """A parameter's shape, whether it is trained, and the bytes that the optimizer keeps of it: of its own shape, and
    scalars."""

    shape: tuple[int, ...]
    trained: bool
    moments: int
    scalars: int

    @property
    def elements(self) -> int:
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class Lasting:
    """Bytes that a rank holds between the backward of a step and its update."""

    parameters: int
    gradients: int
    optimizer: int
    buffers: int

    @property
    def total(self) -> int:
        return self.parameters + self.gradients + self.optimizer + self.buffers


@dataclass(frozen=True)
class Memory:
    """The most that a rank holds, in bytes by what it is for."""

    parameters: float
    gradients: float
    optimizer: float
    buffers: float
    tree: float  # gradients of lanes that wait for their siblings, and what is on its way to other processes
    whole: float  # weights and gradients put together from shards, or in low precision
    activations: float
    batch: float
    margin: float  # fragments of the allocator, the context of the device and the libraries' own buffers

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def sizes(work: Work) -> tuple[list[Size], int]:
    """Of all parameters, and the bytes of buffers."""
    with torch.device("meta"):
        task = work.task()
    with FakeTensorMode():
        task._apply(lambda t: torch.empty(t.shape, dtype=t.dtype))
        optimizer = work.optimizer(task)
        materialise(optimizer)
    found = []
    for p in task.parameters():
        state = [v for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
        moments = sum(v.itemsize for v in state if v.shape == p.shape and p.ndim)
        found.append(Size(tuple(p.shape), p.requires_grad, moments, sum(v.nbytes for v in state if v.shape != p.shape)))
    return found, sum(b.nbytes for b in task.buffers())


def piece(size: Size, shards: int, rank: int) -> int:
    """Elements of a parameter that one of `shards` ranks has: FSDP2 deals rows of dimension 0 as torch.chunk does."""
    if not size.shape:
        return 1
    rows = size.shape[0]
    chunk = -(-rows // shards)
    return max(0, min(chunk, rows - rank % shards * chunk)) * (size.elements // rows if rows else 0)


def lasting(found: list[Size], buffers: int, cfg: Config, place: Place) -> Lasting:
    """Exact: what the tensors of a rank take."""
    if cfg.strategy.startswith("zero"):
        return _zero(found, buffers, cfg, place)
    shards = place.shards(cfg.strategy)
    mine = [(size, piece(size, shards, place.rank)) for size in found]
    return Lasting(
        sum(4 * n for _, n in mine),
        sum(4 * n for size, n in mine if size.trained),
        sum(size.moments * n + size.scalars for size, n in mine),
        buffers,
    )
