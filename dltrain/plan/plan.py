"""A recipe's configuration on so many GPUs of a machine -> all that can be said of it beforehand."""

import dataclasses
from dataclasses import dataclass
from typing import Any

from dltrain import config
from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.flops import Flops, Work, count
from dltrain.meter import human
from dltrain.plan.machines import Machine
from dltrain.plan.memory import Memory, Place, Size, memory, sizes
from dltrain.plan.time import DISK, Failures, Step, failures, step
from dltrain.plan.trace import Trace, trace


@dataclass(frozen=True)
class Plan:
    cfg: Config
    place: Place
    machine: Machine
    work: Work
    parameters: int
    flops: Flops
    trace: Trace
    memory: Memory
    step: Step
    save: float  # seconds of a checkpoint
    checkpoint: float  # bytes
    failures: Failures

    @property
    def rows_per_second(self) -> float:
        return self.cfg.batch / self.step.seconds

    @property
    def seconds(self) -> float:
        """Of the whole training, failures aside."""
        return self.cfg.steps * self.step.seconds

    def used(self, flops: float) -> float:
        """Share of the peak, by FLOPs of a row."""
        peak = self.machine.peak(self.cfg.precision)
        assert peak
        return self.rows_per_second * flops / self.place.world / peak

    @property
    def fits(self) -> bool:
        return self.memory.total <= self.machine.memory


def plan(recipe: Any, cfg: Config, world: int, machine: Machine) -> Plan:
    """`recipe` has `work(cfg)`. Raises UserError with all conflicts of the configuration at once."""
    local = min(world, machine.node)
    found: list[str] = []
    if not hasattr(recipe, "work"):
        raise UserError("this recipe has no work(cfg), so it cannot be planned")
    try:
        cfg, _ = config.settle(cfg, world, local, {}, {})
    except UserError as error:
        found.append(str(error))
    if machine.peak(cfg.precision.replace("auto", "fp32")) is None:
        found.append(f"{machine.name} has no {cfg.precision}: give another --precision")
    if found:
        raise UserError("; ".join(found))
    work = recipe.work(cfg)
    rows = cfg.micro_batch or cfg.batch // (cfg.lanes or world)
    return _planned(cfg, Place(world, local), machine, Known.of(work, cfg), trace(work, cfg, rows, machine), rows)


@dataclass(frozen=True)
class Known:
    """What does not depend on machine, strategy or micro-batch."""

    work: Work
    flops: Flops
    sizes: list[Size]
    buffers: int

    @classmethod
    def of(cls, work: Work, cfg: Config) -> "Known":
        return cls(work, count(work, cfg.batch, cfg.remat), *sizes(work))


def _planned(cfg: Config, place: Place, machine: Machine, known: Known, traced: Trace, rows: int) -> Plan:
    found, buffers = known.sizes, known.buffers
    taken = memory(found, buffers, cfg, place, traced)
    spent = step(found, cfg, place, machine, traced, rows)
    stored = sum((4 + size.moments) * size.elements + size.scalars for size in found) + buffers
    save = stored / (DISK * max(1, place.world // machine.node))
    total = cfg.steps * spent.seconds
    parameters = sum(size.elements for size in found)
    return Plan(
        cfg, place, machine, known.work, parameters, known.flops, traced, taken, spent, save, stored,
        failures(place.world, total, save),
    )  # fmt: skip


def refuse(planned: Plan) -> None:
    """Raises UserError where it does not fit into the GPU's memory."""
    if not planned.fits:
        need, have = human(planned.memory.total), human(planned.machine.memory)
        raise UserError(f"it needs {need}B of a {planned.machine.name}'s {have}B: see dltrain plan ... --fit")


def fit(recipe: Any, cfg: Config, world: int, machine: Machine) -> list[Plan]:
    """What fits of all strategies, micro-batches and rematerialisations, the fastest first."""
    fitting: list[Plan] = []
    cfg = dataclasses.replace(cfg, micro_batch=0)
    lanes = cfg.lanes if cfg.lanes > 0 else world
    most = cfg.batch // lanes
    if not most or cfg.batch % lanes:
        return [plan(recipe, cfg, world, machine)]  # which says why not
    for again in ("none", "selective", "full"):
        candidate = dataclasses.replace(cfg, remat=again)
        work = recipe.work(candidate)
        known = Known.of(work, candidate)
        one, two = (trace(work, candidate, rows, machine) for rows in (1, 2)) if most > 1 else (None, None)
        for rows in [n for n in range(1, most + 1) if most % n == 0]:
            traced = _drawn_out(one, two, rows) if one and two else trace(work, candidate, rows, machine)
            for strategy in ("ddp", "fsdp", "hybrid", "zero1", "zero2", "zero3") if world > 1 else ("single",):
                asked = dataclasses.replace(candidate, strategy=strategy, micro_batch=rows)
                try:
                    asked, _ = config.settle(asked, world, min(world, machine.node), {}, {})
                except UserError:
                    continue
                planned = _planned(asked, Place(world, min(world, machine.node)), machine, known, traced, rows)
                if planned.fits:
                    fitting.append(planned)
    return sorted(fitting, key=lambda planned: planned.step.seconds)


def _drawn_out(one: Trace, two: Trace, rows: int) -> Trace:
    """Bytes and seconds grow by the same with every row."""
    return Trace(*(a + (b - a) * (rows - 1) for a, b in zip(vars(one).values(), vars(two).values(), strict=True)))
