"""A run that is slow and well, for as long as you like: `python tests/doctor/slow_run.py --minutes 30`.

Two ranks, a data worker each. Every step one of them (or rank 0, where it is always rank 0) is slow in another way, the
other one waits. Writes docs/bench/healthy-slow.json, with the alarms that there were, and exits 1 if there was one.
"""

import argparse
import collections
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does for the folder of conftest.py

import worlds
from faults import Rows, Victim
from toy import Config

from dltrain import rundir
from dltrain.evaluation import evaluate
from dltrain.optim import adamw
from dltrain.progress import track
from dltrain.run import Run

NAP = 4.0  # seconds that a rank may do nothing at all, at a time
_fsync = os.fsync


def nap() -> None:
    time.sleep(NAP)


def compute(seconds: float) -> None:
    """Python: the GIL comes and goes."""
    until, x = time.time() + seconds, 0
    while time.time() < until:
        x += 1


def hold_gil(seconds: float) -> None:
    """One call that computes and does not give the GIL away, as an extension's may."""
    n, began = 10_000_000, time.time()
    sum(range(n))
    sum(range(int(n * seconds / (time.time() - began))))


def multiply(seconds: float) -> None:
    """Torch: without the GIL."""
    until, a_DD = time.time() + seconds, torch.ones(600, 600)
    while time.time() < until:
        torch.mm(a_DD, a_DD)


def compile_something(seconds: float) -> None:
    """A child computes, its parent waits for it."""
    code = f"import time\nuntil = time.time() + {seconds}\nwhile time.time() < until: pass"
    subprocess.run([sys.executable, "-c", code], check=True)


def write_slowly(seconds: float) -> None:
    """A megabyte a second."""
    with tempfile.TemporaryFile() as file:
        for _ in range(round(seconds)):
            file.write(bytes(1 << 20))
            file.flush()
            time.sleep(1)


def doze(seconds: float) -> None:
    """Waits, again and again, as for a slow server."""
    for _ in range(round(seconds / NAP)):
        nap()


def slow_fsync(handle: int) -> None:
    time.sleep(NAP / 2)
    _fsync(handle)


SCENES = {"compute": compute, "hold the GIL": hold_gil, "multiply": multiply, "compile": compile_something}
SCENES |= {"write slowly": write_slowly, "doze": doze}
TOGETHER = ("rank 0 first", "evaluate slowly", "save slowly")  # what all ranks do


def train(
    out: Path, seconds: float, seed: int, longest: float, names: Sequence[str] = (*SCENES, *TOGETHER), ranks: int = 2
) -> tuple[dict[str, int], int, float]:
    """One rank of a run in which, a step after another, one of the first `ranks` is slow in the way of a scene.

    Returns how often each was played, the steps, and the longest time in which nothing moved.
    """
    cfg = Config(out=str(out), steps=1_000_000, lanes=2, batch=4, workers=1, hang_exit=5)
    rows = Rows(10_000)
    rows.pause = 0.05
    slow_rows = Rows(8)
    slow_rows.pause = NAP
    dice, played, until = random.Random(seed), collections.Counter[str](), time.time() + seconds
    with Run(cfg) as run:
        task, _ = run.prepare(lambda: Victim(cfg.dropout), adamw(1e-2))
        data = run.batches(rows)
        for step in run.steps():
            if run.gather(time.time())[0] > until:
                break
            name, who, length = names[step % len(names)], dice.randrange(ranks), dice.uniform(longest / 2, longest)
            if name == "rank 0 first":
                run.first(lambda length=length: compute(length))
            elif name == "evaluate slowly":
                evaluate(run, task, slow_rows)
            elif run.me.rank == who and name in SCENES:
                SCENES[name](length)
            for batch in run.lanes(data):
                run.backward(task(batch))
            run.step()
            if name == "save slowly":
                os.fsync = slow_fsync
                run.save()
                os.fsync = _fsync
            played[name] += 1
        return dict(played), run.step_done, run.doctor.watch.longest


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--longest", type=float, default=40, help="seconds of the longest slow thing")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path(__file__).parents[2] / "docs/bench/healthy-slow.json")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        pipes, _ = worlds.start(2, train, out, args.minutes * 60, args.seed, args.longest)
        for _ in track(range(round(args.minutes * 6)), "waiting for an alarm"):
            pipes[0].poll(10)
        answers = [pipe.recv() for pipe in pipes]
        if any(kind != "ok" for kind, _ in answers):
            sys.exit(f"a rank ended: {answers}")
        events = rundir.read_rows(out / "events.jsonl")
        alarms = [event for event in events if event["kind"] in ("hang", "hang_over")]
        found, _ = rundir.environment()
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": f"python tests/doctor/slow_run.py --minutes {args.minutes:g} --seed {args.seed}",
        "minutes": args.minutes,
        "steps": answers[0][1][1],
        "scenes": answers[0][1][0],
        "longest_slow_s": args.longest,
        "longest_nothing_moved_s": max(answer[2] for _, answer in answers),
        "alarms": alarms,
        **{k: found[k] for k in ("python", "packages", "cpu", "cores", "commit", "dirty")},
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{len(alarms)} alarms in {args.minutes:g} minutes and {result['steps']} steps: {args.out}")
    sys.exit(bool(alarms))


if __name__ == "__main__":
    main()
