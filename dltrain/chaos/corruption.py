"""Checkpoints with something wrong in them: is it seen before a weight is used, and is the file named?"""

import os
import shutil
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dltrain import checkpoint
from dltrain.errors import UserError
from dltrain.progress import track
from dltrain.seeds import key

Harm = Callable[[Path, Path, np.random.Generator], None]  # (file, its namesake in the older checkpoint, draw)


def _flip(file: Path, _: Path, draw: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    data[int(draw.integers(len(data)))] ^= 1 << int(draw.integers(8))
    file.write_bytes(data)


def _cut(file: Path, _: Path, draw: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes()[: int(draw.integers(file.stat().st_size))])


def _lengthen(file: Path, _: Path, draw: np.random.Generator) -> None:
    file.write_bytes(file.read_bytes() + draw.bytes(int(draw.integers(1, 4096))))


def _zeros(file: Path, _: Path, draw: np.random.Generator) -> None:
    data = bytearray(file.read_bytes())
    at = int(draw.integers(len(data)))
    data[at : at + 512] = bytes(len(data[at : at + 512]))
    file.write_bytes(data)


def _delete(file: Path, _: Path, draw: np.random.Generator) -> None:
    file.unlink()


def _swap(file: Path, older: Path, draw: np.random.Generator) -> None:
    shutil.copy(older, file)


def _neighbour(file: Path, older: Path, draw: np.random.Generator) -> None:
    others = sorted(path for path in file.parent.iterdir() if path != file)
    shutil.copy(others[int(draw.integers(len(others)))], file)


def _whole(file: Path, older: Path, draw: np.random.Generator) -> None:
    shutil.rmtree(file.parent)
    shutil.copytree(older.parent, file.parent)


HARMS: dict[str, Harm] = {
    "a bit flipped": _flip, "cut short": _cut, "lengthened": _lengthen, "512 bytes of zeros": _zeros,
    "deleted": _delete, "the older checkpoint's file": _swap, "another file's content": _neighbour,
    "the older checkpoint under this name": _whole,
}  # fmt: skip


def corrupt(run: Path, folder: Path, n: int, seed: int) -> dict[str, Any]:
    """Harm the newest of the run's two newest checkpoints `n` times, each time from whole. What was found, by kind.

    Each time the harm must be seen and its file named, the older checkpoint taken and its very tensors loaded.

    Raises:
        UserError: for a run with fewer than two checkpoints.
    """
    if len(checkpoint.steps(run / "checkpoints")) < 2:
        raise UserError(f"{run} has fewer than two checkpoints: nothing to go back to")
    older, newer = checkpoint.steps(run / "checkpoints")[-2:]
    want = checkpoint.read(older, "")
    tried: Counter[str] = Counter()
    missed: list[str] = []
    for i in track(range(n), "corruptions"):
        draw = np.random.Generator(np.random.Philox(key=key("corruption", seed, i)))
        shutil.rmtree(folder, ignore_errors=True)
        for path in (older, newer):
            shutil.copytree(path, folder / path.name, copy_function=os.link)
        names = sorted(path.name for path in newer.iterdir())
        while True:  # until something has changed
            kind, name = list(HARMS)[int(draw.integers(len(HARMS)))], names[int(draw.integers(len(names)))]
            before = (newer / name).read_bytes()
            victim = folder / newer.name / name
            victim.unlink()
            victim.write_bytes(before)  # no longer a link
            HARMS[kind](victim, older / name, draw)
            if not victim.exists() or victim.read_bytes() != before:
                break
        tried[kind] += 1
        if why := _missed(folder, want, older.name, "" if kind.startswith("the older checkpoint under") else name):
            missed.append(f"{i}: {name} {kind}: {why}")
    return {"tried": dict(sorted(tried.items())), "corruptions": n, "detected": n - len(missed), "missed": missed}


def _missed(folder: Path, want: dict[str, Tensor], older: str, name: str) -> str:
    """What went wrong in the detection; empty if nothing did."""
    told: list[str] = []
    found = checkpoint.restore(
        folder, lambda: {k: torch.empty_like(t) for k, t in want.items()}, lambda _, why: told.append(why)
    )
    if len(told) != 1:
        return f"told of {told}"
    if name not in told[0]:
        return f"another file is named: {told[0]}"
    if found is None or f"step-{found[0]['step']:08d}" != older:
        return "the older one is not what was taken"
    if differ := [k for k, t in want.items() if not torch.equal(found[1][k], t)]:
        return f"{differ[0]} is not the older one's"
    return ""


def cost(folder: Path, mebibytes: int = 512, times: int = 15) -> dict[str, Any]:
    """Seconds to load a checkpoint of that size from the page cache without verification and with it, in turns."""
    torch.set_num_threads(1)
    tensors = {f"model/{i}": torch.randn(1 << 22) for i in range(mebibytes // 16)}
    for step in (1, 2):
        checkpoint.save(folder, step, tensors, {}, keep=2)
    path = checkpoint.steps(folder)[-1]
    seconds: dict[str, list[float]] = {"alone": [], "verified": []}
    for _ in range(times):
        began = time.perf_counter()
        checkpoint.load(path, tensors)
        middle = time.perf_counter()
        checkpoint.restore(folder, lambda: tensors, lambda path, why: None)
        seconds["alone"].append(middle - began)
        seconds["verified"].append(time.perf_counter() - middle)
    medians = {name: float(np.median(times)) for name, times in seconds.items()}
    share = medians["verified"] / medians["alone"] - 1
    return {"mebibytes": mebibytes, "times": times, "seconds": medians, "share": share}
