"""Kill a run again and again, change the number of its processes each time, and see that nothing shows.

    python tests/data/exactly_once.py --kills 200 --seed 0 --json FILE

In rounds: an epoch of two mixed sources (packed text, or images with random crops), once undisturbed in one process,
once killed at random moments, at checkpoints among them. Then
- what the steps were taken on is every target token, or image, of both sources exactly once;
- a step that was taken again had the same rows and the same bytes;
- rows, their order and metrics.jsonl are to the byte those of the undisturbed run, and so are the weights.
"""
# ruff: noqa: E402

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import replace
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # as pytest does for the folder of conftest.py

import chaos_run
import numpy as np
import torch
import toy
import worlds

PATIENCE = 120  # seconds that a launch may take
Taken = dict[tuple[int, int, int], tuple[list[int], str]]  # (step, lane, part) -> what `chaos_run.seen` says


class Launch:
    """One launch of a run on `world` processes."""

    def __init__(self, folder: Path, number: int, world: int, cfg: chaos_run.Config):
        self.ledger, self.log = str(folder / "ledger" / f"{number:04d}"), folder / f"log-{number:04d}"
        Path(self.ledger).parent.mkdir(parents=True, exist_ok=True)
        variables = {
            "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": worlds.free_port(), "OMP_NUM_THREADS": 1, "DLTRAIN_DEVICE": "cpu",
        }  # fmt: skip
        self.processes = []
        for rank in range(world):
            strings = {k: str(v) for k, v in {**variables, "RANK": rank, "LOCAL_RANK": rank}.items()}
            work = (strings, str(self.log), cfg, self.ledger)
            self.processes.append(worlds._context.Process(target=chaos_run.launched, args=work))
            self.processes[-1].start()

    def wait(self, until: Any, seconds: float = PATIENCE) -> bool:
        """Whether `until()` became true before all processes ended, or the time did."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if until():
                return True
            if not any(process.is_alive() for process in self.processes):
                return False
            time.sleep(0.001)
        return False

    def steps(self) -> int:
        """That one of its processes has begun."""
        ledgers = Path(self.ledger).parent.glob(f"{Path(self.ledger).name}-*")
        return max((path.read_bytes().count(b"\n") for path in ledgers), default=0)

    def kill(self, which: list[int]) -> None:
        for rank in which:
            self.processes[rank].kill()

    def end(self) -> list[int | None]:
        for process in self.processes:
            process.join(PATIENCE)
            if process.is_alive():
                process.kill()
        return [process.exitcode for process in self.processes]


def strike(launch: Launch, out: Path, draw: np.random.Generator, counts: Counter) -> bool:
    """Kill a launch at a random moment; whether there was still something to kill."""
    moment = str(draw.choice(["starting", "stepping", "saving"], p=[0.2, 0.4, 0.4]))
    if moment == "starting":
        launch.wait(lambda: False, draw.uniform(0, 0.8))
    else:
        steps = int(draw.integers(1, 13))
        launch.wait(lambda: launch.steps() >= steps)
        if moment == "saving":
            launch.wait(lambda: any((out / "checkpoints").glob(".step-*.tmp")))
        launch.wait(lambda: False, draw.uniform(0, 0.05))
    world = len(launch.processes)
    one = draw.random() < 0.4
    first = [int(draw.integers(world))] if one else list(range(world))
    alive = [launch.processes[rank].is_alive() for rank in first]
    launch.kill(first)
    launch.wait(lambda: False, draw.uniform(0, 0.3) if one else 0)
    launch.kill(list(range(world)))
    codes = launch.end()
    if not any(a and codes[rank] == -signal.SIGKILL for a, rank in zip(alive, first)):
        assert set(codes) <= {0, -signal.SIGKILL}, (codes, launch.log.read_text()[-3000:])
        return False
    counts.update({"kills": 1, f"kills while {moment}": 1, "kills of one process of several": one and world > 1})
    counts["kills that tore a checkpoint"] += any((out / "checkpoints").glob(".step-*.tmp"))
    return True


def taken(folder: Path) -> tuple[Taken, int]:
    """What the committed steps were taken on: of each step the last time. And how often a step was taken again.

    AssertionError for a part of a step that was lost, came twice or was another the second time.
    """
    launches: dict[str, dict[int, list]] = {}
    for path in sorted((folder / "ledger").iterdir()):
        steps = launches.setdefault(path.name.split("-")[0], {})
        for line in path.read_bytes().split(b"\n")[:-1]:  # what follows the last one is torn, or nothing
            step, entries = json.loads(line)
            steps.setdefault(step, []).extend(entries)
    seen: Taken = {}
    last: dict[int, list] = {}
    again = 0
    for number in sorted(launches):
        for step, entries in launches[number].items():
            again += step in last
            last[step] = entries
            for lane, part, numbers, digest in entries:
                what = numbers, digest
                assert seen.setdefault((step, lane, part), what) == what, f"step {step} of launch {number} is another"
    parts = chaos_run.BATCH // chaos_run.LANES
    everyone = sorted((lane, part) for lane in range(chaos_run.LANES) for part in range(parts))
    for step, entries in last.items():
        assert sorted((lane, part) for lane, part, *_ in entries) == everyone, f"parts of step {step}"
    return seen, again


def epoch(folder: Path, kind: str, steps: int, kills: int, seed: int, counts: Counter) -> None:
    """One round with so many kills at most; what happened is added to `counts`."""
    draw = np.random.Generator(np.random.Philox(key=seed))
    make = chaos_run.make_text if kind == "text" else chaos_run.make_images
    wanted = make(folder / "data", steps, draw)
    cfg = chaos_run.Config(out="", data=str(folder / "data"), kind=kind, steps=steps, seed=seed)
    calm, killed = folder / "calm", folder / "killed"
    reference = Launch(calm, 0, 1, replace(cfg, out=str(calm / "run"), save_every=0))
    assert reference.end() == [0], reference.log.read_text()[-3000:]
    launches = 0
    while True:
        world = int(draw.integers(1, 5))
        how = {"strategy": str(draw.choice(["ddp", "fsdp"])), "save_async": bool(draw.random() < 0.3)}
        launch = Launch(killed, launches, world, replace(cfg, out=str(killed / "run"), **how))
        launches += 1
        counts[f"launches of {world}"] += 1
        if kills and strike(launch, killed / "run", draw, counts):
            kills -= 1
        else:
            codes = launch.end()
            assert codes == [0] * world, (codes, launch.log.read_text()[-3000:])
            break
    (calm_rows, _), (rows, again) = taken(calm), taken(killed)
    assert rows == calm_rows, "rows or their order"
    numbers = [number for what, _ in rows.values() for number in what]
    assert sorted(numbers) == wanted.tolist(), "not every item exactly once"
    assert len({step for step, _, _ in rows}) == steps
    weights, metrics = toy.outcome(killed / "run")
    calm_weights, calm_metrics = toy.outcome(calm / "run")
    assert metrics == calm_metrics, "metrics.jsonl"
    assert weights == calm_weights, "weights"
    events = [json.loads(line) for line in (killed / "run/events.jsonl").read_text().splitlines()]
    counts["launches that began at a checkpoint"] += sum(event["kind"] == "resume" for event in events)
    counts.update({"epochs": 1, "steps": steps, "steps taken again": again, f"{kind} items": len(numbers)})


def chaos(kills: int, seed: int, steps: int, folder: Path) -> dict[str, Any]:
    """Rounds until there were so many kills. AssertionError if anything shows; then `folder` is left as it is."""
    counts: Counter = Counter()
    began, number = time.monotonic(), 0
    while counts["kills"] < kills:
        kind = ("text", "images")[number % 2]
        at_most = min(kills - counts["kills"], -(-steps // 5))
        epoch(folder / "round", kind, steps, at_most, seed * 1000 + number, counts)
        shutil.rmtree(folder / "round")
        number += 1
        seconds = time.monotonic() - began
        print(f"{counts['kills']} of {kills} kills, {number} epochs, {seconds:.0f} s", file=sys.stderr, flush=True)
    return dict(sorted(counts.items())) | {"seconds": round(time.monotonic() - began, 1)}


def preload() -> None:
    """What each launch would import anew. The fork server has no other folders than those of PYTHONPATH."""
    folders = [str(HERE.parents[1]), str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, folders))
    modules = ["chaos_run", "toy", "torch._dynamo", "torch.utils.tensorboard", "webdataset.compat"]
    worlds._context.set_forkserver_preload(modules)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=150, help="of an epoch")
    parser.add_argument("--json", type=Path, help="write the result as data too")
    args = parser.parse_args()
    preload()
    folder = Path(tempfile.mkdtemp(prefix="exactly-once-"))
    result = {
        "date": date.today().isoformat(), "python": platform.python_version(), "torch": torch.__version__,
        "numpy": np.__version__, "webdataset": version("webdataset"), "cores": os.cpu_count(),
        "seed": args.seed, "result": "every item exactly once, and the bytes of an undisturbed run",
    }  # fmt: skip
    try:
        result |= chaos(args.kills, args.seed, args.steps, folder)
    except AssertionError as error:
        print(f"failed: {error}; what is left of it is in {folder}", file=sys.stderr)
        raise
    shutil.rmtree(folder)
    for name, value in result.items():
        print(f"{name:32} {value}")
    if args.json:
        args.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
