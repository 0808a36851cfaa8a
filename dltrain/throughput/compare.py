"""Our trainer, a bare loop and Hugging Face's Trainer, with one model, on one batch after the other.

In each round every side takes a turn of some steps. A ratio is the median, with quartiles, of those within a round.
"""

import contextlib
import io
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from dltrain.config import Config
from dltrain.loop import fit
from dltrain.progress import track
from dltrain.run import Run
from dltrain.strategy import units
from dltrain.throughput.hugging_face import drive_trainer
from dltrain.throughput.phases import Memory, Phases, Watched, state_bytes, synchronise
from dltrain.throughput.turns import Player
from dltrain.throughput.workloads import Mean, Workload, batches, installed, pulled

CLIP, LOG_EVERY = 1.0, 10
OURS, BARE, TRAINER = "dltrain", "bare loop", "Trainer"


def settings(load: Workload, out: str) -> Config:
    """Of a run without end, with the defaults but for the workload's."""
    return Config(
        steps=1 << 30, batch=load.batch, micro_batch=load.micro, lanes=1, precision=load.precision, clip=CLIP,
        compile=load.compile, log_every=LOG_EVERY, out=out,
    )  # fmt: skip


def drive_ours(player: Player, load: Workload, rows: Watched, out: str) -> None:
    def schedule(step: int) -> float:
        player.boundary()
        return 1.0

    with Run(settings(load, out)) as run:
        run.doctor.stop()  # who would take the others' turns for a hang
        player.module, player.optimizer = run.prepare(load.task, load.optimizer)
        fit(run, player.module, player.optimizer, schedule, run.batches(rows))


def drive_bare(player: Player, load: Workload, build: Callable[[], nn.Module], rows: Watched, at: torch.device) -> None:
    """What one writes by hand: autocast, torch's fused optimizer, clipping, the loss looked at every ten steps."""
    player.module, player.optimizer = module, optimizer = _built(load, build, at)
    data, parts = pulled(batches(rows, load.micro, at.type == "cuda"), at), load.batch // load.micro
    for step in range(1 << 30):
        player.boundary()
        for _ in range(parts):
            with torch.autocast(at.type, torch.bfloat16, enabled=load.precision == "bf16"):
                loss = module(**next(data))["loss"]
            (loss / parts).backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        if step % LOG_EVERY == 0:
            print(f"step {step} loss {loss.item()} norm {norm.item()}")


def drive_hugging_face(
    player: Player, load: Workload, build: Callable[[], nn.Module], rows: Watched, at: torch.device, out: str
) -> None:
    module, optimizer = _built(load, build, at)
    loader = batches(rows, load.micro, at.type == "cuda")
    drive_trainer(
        player, module, optimizer, loader, micros=load.batch // load.micro, clip=CLIP, precision=load.precision,
        folder=out,
    )  # fmt: skip


def _built(load: Workload, build: Callable[[], nn.Module], at: torch.device) -> tuple[nn.Module, torch.optim.Optimizer]:
    """Ours is compiled as our trainer does, unit by unit, others as a whole."""
    torch.manual_seed(0)
    module = build().to(at).train()
    if load.compile:
        for unit in units(module) if isinstance(module, Mean) else [module.model]:
            assert isinstance(unit, nn.Module)
            unit.compile()
    return module, load.usual(module)


@contextlib.contextmanager
def usual_switches() -> Iterator[None]:
    """For the others' turns: without the determinism that our runs ask for."""
    before = torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(False)
    torch.backends.cudnn.benchmark = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.backends.cudnn.benchmark = before[1]


def sides(load: Workload, rows: Watched, at: torch.device, folder: str) -> dict[str, Player]:
    """All that can be run here, by name; ours first."""
    ours = lambda: Mean(load.task())  # noqa: E731
    drives: dict[str, Callable[[Player], None]] = {BARE: partial(drive_bare, load=load, build=ours, rows=rows, at=at)}
    drives |= {name: partial(drive_bare, load=load, build=b, rows=rows, at=at) for name, b in load.plain.items()}
    if installed("transformers"):
        for name, build in {TRAINER: ours, **load.hugging_face}.items():
            drives[name] = partial(drive_hugging_face, load=load, build=build, rows=rows, at=at, out=f"{folder}/hf")
    others = {name: Player(drive, usual_switches) for name, drive in drives.items()}
    return {OURS: Player(partial(drive_ours, load=load, rows=rows, out=f"{folder}/run")), **others}


@dataclass(frozen=True)
class Measured:
    """One side. `seconds` are of each turn; bytes: what lasts, and the most that a step adds."""

    seconds: list[float]
    state_bytes: int
    step_bytes: int
    phases: dict[str, float]  # seconds of a step, when looked at


def compare(name: str, load: Workload, rounds: int, at: torch.device) -> dict[str, Any]:
    """A record of plain values: throughput, ratios, memory and phases of each side."""
    rows = Watched(load.rows())
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.ExitStack() as stack,
    ):
        players = sides(load, rows, at, folder)
        for player in players.values():
            stack.callback(player.end)
        for player in players.values():  # builds, compiles and warms up
            player.play(load.turn)
        spent: dict[str, list[float]] = {side: [] for side in players}
        phases = {side: Phases(at) for side in players}
        for turn in track(range(rounds), f"{name}, rounds"):
            for side in list(players)[:: 1 if turn % 2 else -1]:
                spent[side].append(_seconds(players[side], load.turn, at))
            if turn % 4 == 0:  # turns that do not count
                for side, player in players.items():
                    with phases[side].of(player, rows):
                        player.play(load.turn)
        looked = load.turn * -(-rounds // 4)
        found = {}
        for side, player in players.items():
            memory = Memory(at)
            player.play(1, memory)
            each = {phase: seconds / looked for phase, seconds in phases[side].seconds.items()}
            found[side] = Measured(spent[side], state_bytes(player), memory.bytes, each)
    return _record(name, load, found)


def _seconds(player: Player, steps: int, at: torch.device) -> float:
    synchronise(at)
    began = time.perf_counter()
    player.play(steps)
    synchronise(at)
    return time.perf_counter() - began


def _record(name: str, load: Workload, found: dict[str, Measured]) -> dict[str, Any]:
    units_of_turn, ours = load.turn * load.batch * load.per_row, found[OURS].seconds
    record: dict[str, Any] = {
        "size": name, "what": load.what, "precision": load.precision, "unit": load.unit, "rounds": len(ours),
        "steps_of_a_turn": load.turn, "sides": {},
    }  # fmt: skip
    for side, it in found.items():
        record["sides"][side] = {
            "per_second": quartiles([units_of_turn / s for s in it.seconds]),
            "times": None if side == OURS else quartiles([s / o for s, o in zip(it.seconds, ours, strict=True)]),
            "goal": load.times.get(side, 0.98 if side == BARE else None) if side != OURS else None,
            "least": (load.least or None) if side == OURS else None,
            "state_mib": it.state_bytes / 2**20,
            "step_mib": it.step_bytes / 2**20,
            "phase_milliseconds": {phase: 1e3 * s for phase, s in it.phases.items()},
        }
    return record


def quartiles(values: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile."""
    return statistics.quantiles(values, n=4) if len(values) > 1 else values * 3
