"""What the doctor costs a small step: `python tests/doctor/doctor_cost.py` (4 minutes) writes docs/bench/doctor.json.

Windows of a few seconds with the doctor and without, in turn, in one process. Its thread's own CPU time says the same
without the noise of a machine that others use too.
"""

import json
import statistics
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # as pytest does for the folder of conftest.py

import torch
from toy import Config, Toy, ToyRows

from dltrain import rundir
from dltrain.doctor.doctor import Doctor
from dltrain.optim import adamw
from dltrain.progress import track
from dltrain.run import Run

WINDOW, PAIRS = 4.0, 30  # seconds


def on_cpu(doctor: Doctor) -> float:
    """Seconds of the doctor's thread on a CPU (man 5 proc_pid_schedstat)."""
    return int(Path(f"/proc/self/task/{doctor.thread.native_id}/schedstat").read_text().split()[0]) / 1e9


def main() -> None:
    seconds: dict[bool, list[float]] = {True: [], False: []}
    used = []
    with tempfile.TemporaryDirectory() as folder, Run(Config(out=f"{folder}/run", lanes=1, steps=10**6)) as run:
        task, _ = run.prepare(lambda: Toy(0.1), adamw(1e-2))
        data = run.batches(ToyRows())
        run.doctor.stop()

        def steps(until: float) -> int:
            n = 0
            while time.perf_counter() < until:
                for batch in run.lanes(data):
                    run.backward(task(batch))
                run.step()
                n += 1
            return n

        steps(time.perf_counter() + 2)
        for pair in track(range(PAIRS), "measuring"):
            for there in (pair % 2 == 0, pair % 2 == 1):
                doctor = Doctor(run.cfg.out, run.me, lambda: run.step_done, 300) if there else None
                began = time.perf_counter()
                n = steps(began + WINDOW)
                seconds[there].append((time.perf_counter() - began) / n)
                if doctor:
                    used.append(on_cpu(doctor) / (time.perf_counter() - began))
                    doctor.stop()
        found, _ = rundir.environment()
    ratios = [a / b for a, b in zip(seconds[True], seconds[False], strict=True)]
    quartiles = statistics.quantiles(ratios, n=4)
    result = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": "python tests/doctor/doctor_cost.py",
        "windows": f"{PAIRS} pairs of {WINDOW:g} s",
        "step_ms": round(statistics.median(seconds[False]) * 1000, 3),
        "ratio": {"median": round(quartiles[1], 4), "quartiles": [round(q, 4) for q in quartiles[::2]]},
        "doctor_cpu_percent": {"median": round(100 * statistics.median(used), 3), "most": round(100 * max(used), 3)},
        "threads": torch.get_num_threads(),
        **{k: found[k] for k in ("python", "packages", "cpu", "cores", "commit", "dirty")},
    }
    path = Path(__file__).parents[2] / "docs/bench/doctor.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    print({k: result[k] for k in ("step_ms", "ratio", "doctor_cpu_percent")})


if __name__ == "__main__":
    main()
