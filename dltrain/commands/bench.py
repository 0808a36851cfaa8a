"""dltrain bench train: our trainer beside a bare loop and Hugging Face's Trainer, as tables."""

import argparse
import datetime
import os
import sys
from pathlib import Path
from typing import Any

from dltrain import launch, rundir
from dltrain.errors import UserError

ABOUT = """Trains each size by our trainer, by a bare loop and by Hugging Face's Trainer, in turns within one process;
prints tables of throughput, memory, and where a step's time goes. `checkpoint` measures what saving costs a run."""
CHECKPOINT = "checkpoint"


def main(argv: list[str]) -> None:
    """`dltrain bench ARGV`. UserError for a size that is not known, or has no place here."""
    parser = argparse.ArgumentParser("dltrain bench", description=ABOUT)
    parser.add_argument("what", choices=["train"])
    parser.add_argument("--sizes", default="", help="with commas between; by default those for the device at hand")
    parser.add_argument("--rounds", type=int, default=16, help="turns of each side")
    parser.add_argument("--json", default="", metavar="FILE", help="all figures; and the tables beside it, as FILE.md")
    asked = parser.parse_args(argv)
    if asked.rounds < 2:
        raise UserError(f"--rounds {asked.rounds}: quartiles need at least 2")
    if (world := launch.detect(os.environ).world) > 1:
        raise UserError(f"{world} processes were started: dltrain bench train measures one; start it with dltrain")
    target = Path(asked.json) if asked.json else None
    if target and (target.suffix != ".json" or not target.parent.is_dir()):
        raise UserError(f"--json {target}: name a file .json in a folder that exists")
    found = bench(asked.sizes, asked.rounds)
    text = "\n".join(markdown(found))
    print(text)
    if target:
        rundir.write_json(target, found)
        rundir.write_atomic(target.with_suffix(".md"), f"{text}\n".encode())


def bench(sizes: str, rounds: int) -> dict[str, Any]:
    """Measure and return all figures, with date, hardware and versions."""
    import torch

    from dltrain.throughput.compare import compare
    from dltrain.throughput.stall import stall
    from dltrain.throughput.workloads import ON_CPU, ON_GPU, SAVED, SIZES, installed

    kind = "cuda" if torch.cuda.is_available() and os.environ.get("DLTRAIN_DEVICE") != "cpu" else "cpu"
    names = sizes.split(",") if sizes else [*(ON_GPU if kind == "cuda" else ON_CPU), CHECKPOINT]
    if unknown := [name for name in names if name not in (*SIZES, CHECKPOINT)]:
        raise UserError(f"no size {', '.join(unknown)}: there are {', '.join((*SIZES, CHECKPOINT))}")
    if kind == "cpu" and (large := [name for name in names if name in ON_GPU]):
        raise UserError(f"{', '.join(large)} is for a GPU, and there is none: on a CPU take {', '.join(ON_CPU)}")
    if kind == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # our runs ask for it; before the first product
    torch.set_num_threads(int(os.environ.get("DLTRAIN_THREADS", 1)))  # as our runs do
    load, at = os.getloadavg()[0], torch.device(kind)
    found: dict[str, Any] = {"sizes": [], "checkpoint": None}
    for name in names:
        if name == CHECKPOINT:
            found["checkpoint"] = stall(SAVED[kind], SIZES[SAVED[kind]](), max(2, rounds // 4), at)
        else:
            found["sizes"].append(compare(name, SIZES[name](), rounds, at))
    left_out = [f"{name} is not installed" for name in ("transformers", "timm") if not installed(name)]
    where = {"date": datetime.date.today().isoformat(), "load": load, "command": f"dltrain {' '.join(sys.argv[1:])}"}
    return found | {"left_out": left_out, "measured": where | rundir.environment()[0]}


def markdown(found: dict[str, Any]) -> list[str]:
    """The lines of all tables."""
    about = found["measured"]
    device = ", ".join(about["gpus"]) or f"{about['cpu']}, {about['threads']} of {about['cores']} cores"
    packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items() if version)
    lines = [f"Measured {about['date']}: {device}, load {about['load']:.1f}. {packages}. `{about['command']}`", ""]
    for record in found["sizes"]:
        lines += _sides(record)
    if saved := found["checkpoint"]:
        lines += _checkpoint(saved)
    return [*lines, *(f"Left out: {what}." for what in found["left_out"])]


def _sides(record: dict[str, Any]) -> list[str]:
    head = f"**{record['size']}**: {record['what']}; {record['precision']}, {record['rounds']} rounds of "
    head += f"{record['steps_of_a_turn']} steps"
    rows = [["", f"{record['unit']}/s", "dltrain is times as fast", "goal", "state, MiB", "a step adds, MiB"]]
    rows[0] += [f"{phase}, ms" for phase in next(iter(record["sides"].values()))["phase_milliseconds"]]
    for side, it in record["sides"].items():
        rate, goal = it["per_second"][1], ""
        if it["least"]:
            goal = f">= {it['least']:,.0f} {record['unit']}/s on an H200: {_verdict(rate >= it['least'])}"
        if it["goal"]:
            goal = f">= {it['goal']}: {_verdict(it['times'][1] >= it['goal'])}"
        times = _quartiles(it["times"], ".3f") if it["times"] else ""
        memory = [f"{it['state_mib']:,.1f}", f"{it['step_mib']:,.1f}"]
        phases = [f"{ms:.2f}" for ms in it["phase_milliseconds"].values()]
        rows.append([side, _quartiles(it["per_second"], ",.0f"), times, goal, *memory, *phases])
    return [head, "", *_table(rows), ""]


def _checkpoint(saved: dict[str, Any]) -> list[str]:
    rows = [["", "median (quartiles)", "goal, of 1.3B on an H200"]]
    stall, after = saved["stall_seconds"], saved["next_steps_times"]
    rows.append(["the step that saves is longer by, s", _quartiles(stall, ".3f"), f"<= {saved['stall_goal']}"])
    rows.append(["the next 20 steps take, times", _quartiles(after, ".3f"), f"<= {saved['next_steps_goal']}"])
    rows.append(["published after, s", _quartiles(saved["published_after_seconds"], ".2f"), ""])
    head = f"**checkpoint of {saved['size']}** with --save-async: {saved['checkpoint_bytes'] / 2**20:,.0f} MiB, "
    return [f"{head}{saved['rounds']} of them, steps of {saved['step_seconds']:.3f} s", "", *_table(rows), ""]


def _quartiles(values: list[float], form: str) -> str:
    low, middle, high = (format(value, form) for value in values)
    return f"{middle} ({low} to {high})"


def _verdict(reached: bool) -> str:
    return "yes" if reached else "NO"


def _table(rows: list[list[str]]) -> list[str]:
    wide = [max(map(len, column)) for column in zip(*rows, strict=True)]
    rows = [rows[0], ["-" * n for n in wide], *rows[1:]]
    return ["| " + " | ".join(f"{cell:{n}}" for cell, n in zip(row, wide, strict=True)) + " |" for row in rows]
