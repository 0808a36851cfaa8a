"""dltrain data explain: which samples a rank reads at a step, from the order alone.

Shapes: M rows of a micro-batch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dltrain import rundir, skipped
from dltrain.data.mix import Mix, from_state
from dltrain.data.order import Order, Ordering, Windowed
from dltrain.data.ramp import Ramp
from dltrain.data.shards import Shards
from dltrain.errors import UserError
from dltrain.lanes import blocks, rounds
from dltrain.seeds import key
from dltrain.skipped import Skipped


@dataclass(frozen=True)
class Stream:
    """All that decides which rows a rank reads."""

    order: Ordering
    ramp: Ramp
    lanes: int
    micro_batch: int
    sharded: bool  # the strategy deals lanes in rounds
    world: int
    samples: Shards | None  # whose numbers the rows are
    note: str = ""
    skipped: Sequence[tuple[int, int]] = ()  # (step, rows): from it on, so many positions further

    def rows(self, step: int, rank: int) -> list[tuple[int, int, np.ndarray]]:
        """(lane, micro-batch, positions [M]) of a step, which counts from 0."""
        n, batch = self.lanes, self.ramp.batch(step)
        deal = rounds if self.sharded and self.world > 1 else blocks
        parts = batch // n // self.micro_batch
        start = self.ramp.position(step) + sum(rows for at, rows in self.skipped if at <= step)
        return [
            (lane, part, start + (lane * parts + part) * self.micro_batch + np.arange(self.micro_batch))
            for lane in deal(n, self.world, rank)
            if lane < n
            for part in range(parts)
        ]


def explain(
    target: list[str],
    step: int,
    rank: int,
    world: int | None,
    shards: list[str] | None,
    **of_shards: Any,
) -> None:
    """Print lane, micro-batch, position, epoch, row and sample. UserError for what run or shards cannot have."""
    if len(target) == 1 and (Path(target[0]) / "config.json").exists():
        if given := [f"--{name.replace('_', '-')}" for name, value in of_shards.items() if value is not None]:
            raise UserError(f"{', '.join(given)}: {target[0]} is a run, which has its own; leave them out")
        stream = of_run(Path(target[0]), world, shards)
    else:
        if shards:
            raise UserError("--shards is for a run directory; give the shards alone")
        stream = of_pattern(target, world or 1, **of_shards)
    if step < 1 or not 0 <= rank < stream.world:
        raise UserError(f"--step {step} --rank {rank}: steps count from 1, ranks from 0 to {stream.world - 1}")
    for line in table(stream, step, rank):
        print(line)


def of_run(run: Path, world: int | None, shards: list[str] | None) -> Stream:
    """From the newest checkpoint's state. UserError if there is none, or its loop does not read through Run.batches."""
    config = rundir.read_json(run / "config.json")["config"]
    saved = sorted(run.glob("checkpoints/step-*/state.json"))
    if not saved:
        raise UserError(f"{run} has no checkpoint yet; give its shards, --batch, --seed and so on")
    state = rundir.read_json(saved[-1])
    data = state["data"]
    if not data:
        raise UserError(f"{run}: its loop reads its data in a way of its own, of which the checkpoint tells nothing")
    patterns = shards or [p for p in [config.get("shards")] if p and not str(p).startswith("embedded:")]
    known = [Shards(p, on_error="skip") for p in patterns]
    samples = Shards(patterns, on_error="skip") if len(patterns) > 1 else next(iter(known), None)
    order = from_state(data["order"], [each.counts_S for each in [*known, *([samples] if samples else [])]])
    note = f"the {data['rows']:,} rows are taken for the samples of {', '.join(patterns)}, which are as many"
    if samples is None or {len(samples)} != {data["rows"], order.n}:
        samples, note = None, f"the {data['rows']:,} rows of this run are not samples, but made of them: no keys"
    ramp = Ramp([(position, size) for position, size in data["batch"]])
    micro_batch = config.get("micro_batch") or min(size for _, size in ramp.sizes) // data["lanes"]
    sharded = config.get("strategy") in ("fsdp", "hybrid")
    world = world or int(state["written_by"]["world"])
    jumps = Skipped(run, skipped.read(run)).jumps()
    return Stream(order, ramp, data["lanes"], micro_batch, sharded, world, samples, note, jumps)


def of_pattern(
    pattern: list[str],
    world: int,
    batch: int | None,
    lanes: int | None,
    micro_batch: int | None,
    seed: int | None,
    window: int | None,
    strategy: str | None,
) -> Stream:
    """As Run.batches would read samples with a configuration like this."""
    if not batch:
        raise UserError("give --batch, the rows of a step over all processes")
    shards = Shards(pattern, on_error="skip")
    lanes = lanes or world
    micro_batch = micro_batch or batch // lanes
    if min(batch, lanes, micro_batch, world) < 1 or batch % (lanes * micro_batch):
        raise UserError(f"batch ({batch} rows) must be a multiple of lanes ({lanes}) x micro_batch ({micro_batch})")
    if not len(shards):
        raise UserError(f"{' '.join(pattern)}: no samples at all; check the pattern")
    seed = key("order", seed or 0)
    order = Windowed(shards.counts_S, seed, window) if window is not None else Order(len(shards), seed)
    sharded = strategy in ("fsdp", "hybrid")
    return Stream(order, Ramp(((0, batch),)), lanes, micro_batch, sharded, world, shards)


def table(stream: Stream, step: int, rank: int) -> list[str]:
    """Its lines, notes at the end."""
    lines = [f"step {step}, rank {rank} of {stream.world}, {stream.lanes} lanes, {stream.ramp.batch(step - 1)} rows"]
    mixed = stream.order.deal if isinstance(stream.order, Mix) else None
    source = "  source" if mixed else ""
    lines.append(f"{'lane':>4} {'micro':>5} {'position':>14} {'epoch':>6}{source} {'row':>12}  sample")
    for lane, part, position_M in stream.rows(step - 1, rank):
        epoch_M, index_M = stream.order.at(position_M)
        source_M = mixed(position_M)[0].tolist() if mixed else [0] * len(position_M)
        for position, epoch, index, k in zip(position_M.tolist(), epoch_M.tolist(), index_M.tolist(), source_M):
            told = stream.samples.name(index) if stream.samples else ""
            source = f"  {k:>6}" if mixed else ""
            lines.append(f"{lane:>4} {part:>5} {position:>14} {epoch:>6}{source} {index:>12}  {told}".rstrip())
    if len(lines) == 2:
        lines.append("no rows: there are more processes than lanes")
    return [*lines, stream.note] if stream.note else lines
