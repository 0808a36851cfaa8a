"""Predicted weak scaling on 1 to 4,096 GPUs beside what others have published of models of that size."""

from dataclasses import dataclass, replace
from pathlib import Path

from dltrain.plan.check import Training, work_of
from dltrain.plan.machines import machine
from dltrain.plan.memory import Place, sizes
from dltrain.plan.time import step
from dltrain.plan.trace import trace
from dltrain.plot import curves

MODEL = Training(layers=32, width=4096, row=8192, precision="bf16", strategy="fsdp", remat="full")  # 6.5 G parameters


@dataclass(frozen=True)
class Published:
    """Speed of a GPU by the number of GPUs, each with as many rows."""

    what: str
    source: str
    machine: str
    by_gpus: dict[int, float]


POINTS = (
    Published(
        "torchtitan, Llama 8B, fp8, H100", "torchtitan, benchmarks/llama3_h100_202412_torchtitan.md: tokens/s of a GPU",
        "h100", {8: 8532, 128: 8380},
    ),
    Published(
        "torchtitan, Llama 8B, fp8, H200",
        "torchtitan, benchmarks/llama3-8b_h200_202506_trainy-whitefiber.md: tokens/s of a GPU", "h200",
        {32: 10_938, 64: 10_753},
    ),
    Published(
        "KempnerForge, 7B, H200", "KempnerForge, benchmarks/mfu_scaling/mfu_scaling.md: MFU in %", "h200",
        {1: 57.8, 4: 53.8, 32: 26.9},
    ),
    Published(
        "Megatron, 175B, strong scaling", "Megatron-LM, README: MFU in %, with tensor and pipeline parallelism", "h100",
        {96: 47, 4608: 42},
    ),
)  # fmt: skip


def predicted(worlds: list[int], name: str, lanes: bool) -> dict[int, float]:
    """Share of one GPU's speed, a row of 8,192 tokens for each; with the lanes' tree, or the backend's reduction."""
    where, work = machine(name), work_of(MODEL)
    traced, (found, _) = trace(work, MODEL, 1, where), sizes(work)
    seconds = {}
    for world in (1, *worlds):
        cfg = replace(MODEL, batch=world, lanes=world if lanes else 0)
        seconds[world] = step(found, cfg, Place(world, min(world, where.node)), where, traced, 1).seconds
    return {world: seconds[1] / seconds[world] for world in worlds}


def compared() -> list[tuple[Published, int, float, float]]:
    """(published, GPUs, speed of a GPU over that with the fewest GPUs as published, as predicted)."""
    found = []
    for published in POINTS:
        ours = predicted(list(published.by_gpus), published.machine, lanes=False)
        least = min(published.by_gpus)
        for gpus, speed in published.by_gpus.items():
            if gpus > least:
                found.append((published, gpus, speed / published.by_gpus[least], ours[gpus] / ours[least]))
    return found


def draw(path: Path) -> str:
    """Write the plot, with what was published from the prediction for its fewest GPUs on; the table of differences."""
    worlds = [2**n for n in range(13)]
    lines = {}
    for label, lanes in (("predicted, backend's reduction", False), ("predicted, lanes' tree", True)):
        lines[f"{label}, H100"] = (worlds, list(predicted(worlds, "h100", lanes).values()))
    rows = [f"{'published':<36}{'GPUs':>6}{'published':>11}{'predicted':>11}{'off':>8}"]
    for published in POINTS:
        least = min(published.by_gpus)
        base = predicted([least], published.machine, lanes=False)[least]
        xs, ys = list(published.by_gpus), [base * y / published.by_gpus[least] for y in published.by_gpus.values()]
        lines[published.what] = (xs, ys)
    for published, gpus, was, said in compared():
        rows.append(f"{published.what:<36}{gpus:>6}{was:>11.1%}{said:>11.1%}{said / was - 1:>8.1%}")
    curves(path, {"speed of a GPU, of that of one alone": lines}, x="GPUs")
    return "\n".join([*rows, "", f"{path}; sources:", *(f"  {p.what}: {p.source}" for p in POINTS)])
