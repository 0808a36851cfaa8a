"""Bytes of a rank: what lasts from step to step, exactly, and the most that is alive within one.

Legend: S ranks that share a copy of the weights, n rows of a parameter, W processes.
"""

from collections import Counter
from dataclasses import dataclass

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from dltrain.config import Config
from dltrain.flops import Work
from dltrain.lanes import Tree, blocks, rounds
from dltrain.plan.trace import Trace
from dltrain.strategy import DTYPES, materialise, units

SMALL = 100_000  # elements of a parameter that ZeRO-3 keeps whole: DeepSpeed's param_persistence_threshold
BUCKET = 500_000_000  # elements of ZeRO's bucket of gradients: DeepSpeed's reduce_bucket_size
CONTEXT, FRAGMENTS = 1.5e9, 0.04  # of a GPU: its context and NCCL's buffers; of what comes and goes. Assumed


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
    moments: int  # bytes an element
    scalars: int
    group: int  # of the optimizer
    unit: int  # of sharding; -1: the rest, which is the root's

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
    gradients: float  # those that there are by then
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
    found, where = [], {p: i for i, unit in enumerate(units(task)) for p in unit.parameters()}
    groups = {p: i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
    for p in task.parameters():
        state = [v for v in optimizer.state.get(p, {}).values() if isinstance(v, torch.Tensor)]
        moments = sum(v.itemsize for v in state if v.shape == p.shape and p.ndim)
        scalars = sum(v.nbytes for v in state if v.shape != p.shape)
        found.append(Size(tuple(p.shape), p.requires_grad, moments, scalars, groups.get(p, -1), where.get(p, -1)))
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


def _zero(found: list[Size], buffers: int, cfg: Config, place: Place) -> Lasting:
    """DeepSpeed's flat buffers, one for each group of the optimizer, with their padding, and the float32 partition of
    each, from which it updates at every precision."""
    W, low = place.world, DTYPES[cfg.precision].itemsize
    whole = gradients = partition = state = 0
    for group in sorted({size.group for size in found if size.trained}):
        members = [size for size in found if size.group == group]
        elements = sum(size.elements for size in members)
        if cfg.strategy == "zero3":
            mine = sum(-(-size.elements // W) for size in members)
            whole += low * mine + sum(low * size.elements for size in members if size.elements <= SMALL)
            gradients += low * mine
        else:
            mine = -(-elements // (2 * W)) * 2
            whole += low * elements
            gradients += low * (elements if cfg.strategy == "zero1" else mine)
            whole += low * (mine * W - elements)  # padding
        partition += 4 * mine
        state += members[0].moments * mine + members[0].scalars
    whole += sum(low * size.elements for size in found if not size.trained)
    return Lasting(whole + partition, gradients, state, buffers)


def memory(found: list[Size], buffers: int, cfg: Config, place: Place, step: Trace, gpu: bool = True) -> Memory:
    """The most that a rank holds in a step: in the backward of its last lane, when the activations are alive, in the
    exchange that follows, when they are gone, or in the update."""
    held = lasting(found, buffers, cfg, place)
    shards, low = place.shards(cfg.strategy), DTYPES[cfg.precision].itemsize
    elements = sum(size.elements for size in found if size.trained)
    of_unit = Counter[int]()
    for size in found:
        of_unit[size.unit] += size.elements
    root = of_unit.pop(-1, 0)
    unit = max(of_unit.values(), default=0)
    whole, waiting, exchange, end = 0.0, 0.0, 0.0, 0.0
    if cfg.strategy.startswith("zero"):
        bucket = min(BUCKET, elements) * low
        whole = bucket if cfg.strategy != "zero3" else bucket + low * (root + 2 * unit)
        waiting = 0.0 if cfg.strategy != "zero2" else bucket
    elif shards > 1:
        whole = low * (2 * root + 3 * unit) + 8 * unit
        end = (2 * low + 8) * root
        deal = rounds(cfg.lanes or place.world, place.world, 0)
        waiting = 4 * elements / shards * _waiting(cfg.lanes, len(deal), place.world)
    else:
        if low < 4:
            whole = low * (elements + root + unit) + 4 * unit
        lanes = blocks(cfg.lanes, place.world, place.rank) if cfg.lanes else [0]
        waiting = 4 * elements * _waiting(cfg.lanes, len(lanes), 1)
        if place.world > 1 and cfg.lanes:
            nodes = max(1.0, _waiting(cfg.lanes, len(lanes) + 1, 1))
            exchange = 4 * elements * (2 * nodes + 1)
    rows = cfg.batch // max(cfg.lanes or place.world, 1)
    grown = float(held.gradients)
    if cfg.lanes and cfg.micro_batch in (0, rows):  # a lane of one micro-batch: its gradients grow as activations go
        grown = (step.grown - step.peak) / shards
    phases = [
        (grown, waiting, whole, step.peak, step.batch),
        (held.gradients, exchange, end, 0.0, 0.0),
        (held.gradients, 0.0, 0.0, step.update / shards, 0.0),
    ]
    gradients, tree, whole, activations, batch = max(phases, key=sum)
    margin = CONTEXT + FRAGMENTS * (tree + whole + activations) if gpu else 0.0
    return Memory(
        held.parameters, gradients, held.optimizer, held.buffers, tree=tree, whole=whole, activations=activations,
        batch=batch, margin=margin,
    )  # fmt: skip


def _waiting(lanes: int, mine: int, at_once: int) -> int:
    """Nodes of the lanes' tree that wait while the last of `mine` turns, of `at_once` lanes each, is computed."""
    tree: Tree[int] = Tree(max(lanes, 1), lambda a, b: 0)
    for lane in range(min((mine - 1) * at_once, max(lanes, 1))):
        tree.push(0, lane, 0)
    return len(tree.nodes)
