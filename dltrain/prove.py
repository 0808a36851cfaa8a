"""Are two runs the same run? Compared to the bit: what was logged, what the data did, weights and optimizer state."""

import hashlib
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dltrain import checkpoint, rundir
from dltrain.errors import UserError

LEDGER = {  # part of state.json -> words before its two values
    "data": "the data stands at", "left_out": "left out is", "window": "since the last row the sums are",
    "strategy": "the loss scale is", "guard": "the guard has",
}  # fmt: skip


def prove(a: Path, b: Path) -> tuple[bool, str]:
    """(whether the runs in `a` and `b` are identical, the first difference in words or the digest of both).

    Metrics are compared row by row, then the newest step of which both have a whole checkpoint: the ledger of samples
    (which data, in which order, how far, and what was left out; with the seed, of which all random numbers are pure
    functions), the state of loss scale and guard, weights and optimizer state, by name.

    Raises:
        UserError: for a folder that is no run, or two runs without a whole checkpoint of one step.
    """
    for run in (a, b):
        if not (run / "config.json").exists():
            raise UserError(f"{run}: not a run directory (it has no config.json)")
    if found := _rows(rundir.read_rows(a / "metrics.jsonl"), rundir.read_rows(b / "metrics.jsonl")):
        return False, found
    common = {p.name for p in checkpoint.steps(a / "checkpoints")} & {
        p.name for p in checkpoint.steps(b / "checkpoints")
    }
    whole = [n for n in sorted(common) if not any(checkpoint.damage(run / "checkpoints" / n) for run in (a, b))]
    if not whole:
        raise UserError(
            f"{a} and {b} have no whole checkpoint of the same step: compare runs with the same --save-every"
        )
    paths = [run / "checkpoints" / whole[-1] for run in (a, b)]
    seeds = [rundir.read_json(run / "config.json")["config"].get("seed") for run in (a, b)]
    if seeds[0] != seeds[1]:
        return False, f"the seed is {seeds[0]} in the first and {seeds[1]} in the second"
    states = [rundir.read_json(path / "state.json") for path in paths]
    for name, words in LEDGER.items():
        one, other = (state.get(name) for state in states)
        if one != other:
            return False, f"{whole[-1]}: {words} {one} in the first and {other} in the second"
    tensors = [checkpoint.read(path, "") for path in paths]
    if found := _tensors(*tensors):
        return False, f"{whole[-1]}: {found}"
    digest = hashlib.sha256((a / "metrics.jsonl").read_bytes())
    for name in sorted(tensors[0]):
        digest.update(name.encode() + _bytes(tensors[0][name]).numpy().tobytes())
    rows = len(rundir.read_rows(a / "metrics.jsonl"))
    samples = (states[0]["data"] or {}).get("position", 0)
    found = f"{rows} rows, {samples} samples, {len(tensors[0])} tensors of {whole[-1]}"
    return True, f"identical: {found}, SHA-256 {digest.hexdigest()[:16]}"


def _rows(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> str:
    """The first difference of two logs, in words."""
    for ours, theirs in zip_longest(a, b):
        if theirs is None:
            return f"metrics.jsonl: the second run ends before step {ours['step']}"
        if ours is None:
            return f"metrics.jsonl: the first run ends before step {theirs['step']}"
        for key in ours | theirs:
            if ours.get(key) != theirs.get(key):
                return (
                    f"metrics.jsonl: at step {ours['step']} {key} is {ours.get(key)} in the first run "
                    f"and {theirs.get(key)} in the second"
                )
    return ""


def _tensors(a: dict[str, Tensor], b: dict[str, Tensor]) -> str:
    """The first difference of two sets of tensors, in words."""
    for name in sorted(a | b):
        if name not in a or name not in b:
            return f"{name} is in the {'first' if name in a else 'second'} run only"
        x, y = a[name], b[name]
        if (x.shape, x.dtype) != (y.shape, y.dtype):
            return f"{name} is {x.dtype} {tuple(x.shape)} in the first run and {y.dtype} {tuple(y.shape)} in the second"
        if not torch.equal(_bytes(x), _bytes(y)):
            width = x.element_size()
            apart = (_bytes(x).view(-1, width) != _bytes(y).view(-1, width)).any(1).nonzero().flatten()
            at = int(apart[0])
            values = f"{x.flatten()[at].item()!r} and {y.flatten()[at].item()!r}"
            return f"{name} differs in {len(apart)} of {x.numel()} values, first in number {at}: {values}"
    return ""


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(-1).view(torch.uint8)
