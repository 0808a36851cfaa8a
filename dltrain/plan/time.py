"""Seconds of a step, bytes on the wire, and what failures cost: an alpha-beta model.

A message takes alpha + bytes / beta (Hockney 1994, https://doi.org/10.1016/S0167-8191(06)80021-9). A ring over a node's
links and the network takes as long as the slower of both; the tree's all-to-all (dltrain/lanes.py) sends to each rank
by itself, so it does not share a node's network as a ring does.

Legend: W processes, S ranks that share a copy of the weights, g processes of a node.
"""

import math
from dataclasses import dataclass

from dltrain.config import Config
from dltrain.plan.machines import Machine
from dltrain.plan.memory import Place, Size
from dltrain.plan.trace import Trace
from dltrain.strategy import DTYPES

HIDDEN = 0.9  # of communication beside computation: the rest slows it, sharing its memory and processors. Assumed
DISK = 1e9  # bytes/s that a node writes of a checkpoint. Assumed
RESTART = 300.0  # seconds from a failure to the next step. Assumed
# Interruptions of Llama 3's training: 419 unexpected in 54 days of 16,384 GPUs (Dubey et al. 2024,
# https://arxiv.org/abs/2407.21783, section 3.3.4)
GPU_HOURS_TO_FAILURE = 54 * 24 * 16_384 / 419


@dataclass(frozen=True)
class Step:
    """Seconds and bytes of an optimizer step, of one rank."""

    compute: float
    gather: float  # weights put together, of sharded ones
    reduce: float  # gradients
    exposed: float  # of both, what compute does not hide
    update: float
    sent: float  # bytes over the links and the network together
    micro_batches: int

    @property
    def seconds(self) -> float:
        return self.compute + self.exposed + self.update


def ring(size: float, ranks: int, machine: Machine) -> float:
    """Seconds of an all-gather, or of a reduce-scatter, whose whole has `size` bytes."""
    inside = min(ranks, machine.node)
    nodes = -(-ranks // machine.node)
    within = size * (inside - 1) / inside / machine.link + (inside - 1) * machine.link_latency
    between = size * (nodes - 1) / nodes / (machine.network * inside) + (nodes - 1) * machine.network_latency
    return max(within, between) if nodes > 1 else within


def all_to_all(size: float, ranks: int, machine: Machine) -> float:
    """Seconds in which every rank sends each other one its part of `size` bytes."""
    inside = min(ranks, machine.node)
    within = size * (inside - 1) / ranks / machine.link + (inside - 1) * machine.link_latency
    between = size * (ranks - inside) / ranks / machine.network + (ranks - inside) * machine.link_latency
    return max(within, between)


def step(found: list[Size], cfg: Config, place: Place, machine: Machine, trace: Trace, rows: int) -> Step:
    """`trace` is of a micro-batch of `rows`. Communication of sharded weights, and of the backend's own reduction, runs
    beside the computation; the tree of ddp comes after it."""
    W, shards, low = place.world, place.shards(cfg.strategy), DTYPES[cfg.precision].itemsize
    if cfg.strategy == "zero3":
        shards = W
    lanes = cfg.lanes or W
    here = -(-lanes // W)  # lanes of the busiest rank
    micros = here * max(1, cfg.batch // lanes // rows)
    elements = sum(size.elements for size in found)
    exchanges = 2 + len({size.unit for size in found})  # messages are cut into units
    gather = reduce = sent = 0.0
    if shards > 1:
        gather = 2 * micros * _each(ring, low * elements, shards, machine, exchanges)
        sent += 2 * micros * low * elements * (shards - 1) / shards
        way = ring if cfg.lanes == 0 or cfg.strategy == "zero3" else all_to_all
        reduce = here * _each(way, 4 * elements, shards, machine, exchanges)
        sent += here * 4 * elements * (shards - 1) / shards
        if shards < W:
            reduce += here * ring(4 * elements / shards * (W // shards), W, machine)
            sent += here * 4 * elements / shards * (W // shards - 1)
    elif W > 1:
        tree = cfg.lanes > 0 and not cfg.strategy.startswith("zero")
        reduce = (all_to_all if tree else ring)(4 * elements, W, machine) + ring(4 * elements, W, machine)
        sent = 2 * 4 * elements * (W - 1) / W
    compute = micros * (trace.forward + trace.backward)
    if shards == 1 and cfg.lanes > 0:
        exposed = reduce
    else:
        first = (gather / max(1, 2 * micros) + reduce / max(1, here)) / exchanges  # nothing runs beside the ends
        overlapped = gather + reduce
        exposed = first + max(overlapped - compute, (1 - HIDDEN) * overlapped) if W > 1 else 0.0
    mine = elements / max(1, shards if not cfg.strategy.startswith("zero") else W)
    update = 28 * mine / (machine.hbm * 0.85)  # AdamW reads and writes weight and moments, and reads the gradient
    return Step(compute, gather, reduce, exposed, update, sent, micros)


def _each(way, size: float, ranks: int, machine: Machine, messages: int) -> float:
    return messages * way(size / messages, ranks, machine)


@dataclass(frozen=True)
class Failures:
    """Of a training of some hours on some GPUs."""

    expected: float
    interval: float  # seconds between checkpoints that lose the least
    lost: float  # share of the time: checkpoints, and what is done again


def failures(gpus: int, seconds: float, save: float) -> Failures:
    """The best interval between checkpoints that take `save` seconds each.

    Daly 2006, https://doi.org/10.1016/j.future.2004.11.016, equation 37, which is Young's sqrt(2 save M) (1974,
    https://doi.org/10.1145/361147.361115) and its next terms; M, the mean time between failures, is that of Llama 3's
    training for so many GPUs.
    """
    mean = GPU_HOURS_TO_FAILURE * 3600 / gpus
    share = save / (2 * mean)
    best = mean if save >= 2 * mean else math.sqrt(2 * save * mean) * (1 + math.sqrt(share) / 3 + share / 9) - save
    lost = save / best + (best / 2 + RESTART) / mean
    return Failures(seconds / mean, best, min(1.0, lost))
