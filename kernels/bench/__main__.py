"""Kernels timed on this GPU: `python -m dltrain.kernels.bench [op ...] [--smoke] [--minutes 9]`.

Writes kernels/results/<date>-<GPU>.json and .png with what it measured, and nothing else: a case for which there was no
time, or that failed, is named and left out. `--smoke` runs everything once on tiny shapes, on any device, and keeps
nothing.
"""

import argparse
import datetime
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from dltrain.errors import UserError
from dltrain.kernels.bench.frame import TURNS, Clock, measure

OPS = sorted(p.stem for p in Path(__file__).parent.glob("*.py") if p.stem not in ("__main__", "frame"))
RESULTS = Path(__file__).resolve().parents[1] / "results"


def run(ops: list[str], smoke: bool, minutes: float, folder: Path) -> Path:
    """Measure, printing a line a case; the JSON file written. Raises UserError without a GPU."""
    if not smoke and not torch.cuda.is_available():
        raise UserError("no GPU to measure on: --smoke runs the benchmark on tiny shapes and keeps nothing")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    clock, began = Clock(device, turns=1 if smoke else TURNS), time.monotonic()
    ceilings = clock.ceilings(smoke)
    records, left_out = [], []
    for op in ops:
        try:
            for record in measure(
                clock, importlib.import_module(f"dltrain.kernels.bench.{op}").cases(smoke, device), ceilings
            ):
                records.append(record)
                print(f"{record['op']} {record['shape']} runs" if smoke else _line(record), flush=True)
                if time.monotonic() - began > 60 * minutes:
                    raise TimeoutError(f"{minutes} minutes are over")
        except (TimeoutError, RuntimeError) as fault:
            if smoke:
                raise
            left_out.append({"op": op, "why": str(fault).splitlines()[0]})
            print(f"{op}: the rest is left out: {fault}", file=sys.stderr)
    folder.mkdir(parents=True, exist_ok=True)
    where = {"device": _name(device), "driver": _driver(), "torch": torch.__version__, "triton": _triton()}
    found = {
        "date": datetime.date.today().isoformat(), **where, "turns": clock.turns,
        "ceilings": ceilings, "results": records, "left_out": left_out,
    }  # fmt: skip
    target = folder / f"{found['date']}-{where['device'].lower().replace(' ', '-')}.json"
    partial = target.with_name(f".{target.name}.tmp")
    with partial.open("w") as file:
        file.write(json.dumps(found, indent=2) + "\n")
        file.flush()
        os.fsync(file.fileno())
    partial.replace(target)
    plot(found, target.with_suffix(".png"))
    return target


def plot(found: dict[str, Any], target: Path) -> None:
    """Milliseconds of all providers, a panel an op, a group of bars a shape; our share of the ceiling above ours."""
    from matplotlib.figure import Figure

    ops = list(dict.fromkeys(record["op"] for record in found["results"]))
    figure = Figure(figsize=(9, 2.6 * len(ops)), layout="constrained")
    figure.suptitle(f"{found['device']}, driver {found['driver']}, torch {found['torch']}, {found['date']}")
    for axes, op in zip(figure.subplots(len(ops), 1, squeeze=False)[:, 0], ops):
        records = [record for record in found["results"] if record["op"] == op]
        providers = list(dict.fromkeys(name for record in records for name in record["milliseconds"]))
        for i, name in enumerate(providers):
            at = [j for j, record in enumerate(records) if name in record["milliseconds"]]
            times = [records[j]["milliseconds"][name] for j in at]
            errors = [[t["median"] - t["low"] for t in times], [t["high"] - t["median"] for t in times]]
            bars = axes.bar(
                [j + i * 0.8 / len(providers) for j in at], [t["median"] for t in times], 0.8 / len(providers),
                yerr=errors, label=name,
            )  # fmt: skip
            if i == 0:
                shares = [records[j].get("of_copy") or records[j].get("of_gemm") for j in at]
                axes.bar_label(bars, [f"{share:.0%}" if share else "" for share in shares], fontsize=7)
        axes.set_xticks([j + 0.4 for j in range(len(records))], [record["shape"] for record in records], fontsize=7)
        axes.set(title=op, ylabel="ms")
        axes.legend(fontsize=7)
    figure.savefig(target, dpi=120)


def _line(record: dict[str, Any]) -> str:
    ratios = "".join(f"  {ratio:5.2f}x {name}" for name, ratio in record["times"].items())
    shares = "".join(f"  {record[f'of_{c}']:.2f} of {c}" for c in ("copy", "gemm") if f"of_{c}" in record)
    ours = next(iter(record["milliseconds"].values()))["median"]
    return f"{record['op']:34} {record['shape']:26} {ours:9.4f} ms{shares}{ratios}"


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def _driver() -> str:
    try:
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return "unknown"


def _triton() -> str:
    try:
        import triton
    except ImportError:
        return "none"
    return triton.__version__


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m dltrain.kernels.bench", description=__doc__)
    parser.add_argument("ops", nargs="*", help=f"of {', '.join(OPS)}; all by default")
    parser.add_argument("--smoke", action="store_true", help="tiny shapes, once, nothing kept")
    parser.add_argument("--minutes", type=float, default=8.5, help="no new case after so long")
    asked = parser.parse_args()
    try:
        if unknown := set(asked.ops) - set(OPS):
            raise UserError(f"no benchmark {', '.join(sorted(unknown))}: there are {', '.join(OPS)}")
        if asked.smoke:
            with tempfile.TemporaryDirectory() as folder:
                run(asked.ops or OPS, True, asked.minutes, Path(folder))
        else:
            print(run(asked.ops or OPS, False, asked.minutes, RESULTS))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
