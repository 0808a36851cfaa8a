"""`dltrain prove`: identical runs are called so, and the first difference of others is named."""

import dataclasses
import json
import shutil
import subprocess
import sys

import pytest
import toy
import worlds

from dltrain import checkpoint
from dltrain.errors import UserError
from dltrain.prove import prove


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The same run twice: alone, and by two processes."""
    folder = tmp_path_factory.mktemp("runs")
    for name, world in (("one", 1), ("two", 2)):
        cfg = dataclasses.replace(toy.Config(out=str(folder / name)), steps=4, save_every=2)
        worlds.launch(world, toy.train, cfg)
    return folder


def test_identical_runs(runs):
    same, words = prove(runs / "one", runs / "two")
    assert same
    assert words.startswith("identical: 5 rows, 96 samples, 60 tensors of step-00000004, SHA-256 ")


def test_a_row_that_differs_is_named(runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "other")
    path = tmp_path / "other" / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    lines[2] = lines[2].replace('"samples": 72', '"samples": 73')
    path.write_text("".join(lines))
    same, words = prove(runs / "one", tmp_path / "other")
    assert (same, words) == (
        False,
        "metrics.jsonl: at step 3 samples is 72 in the first run and 73 in the second",
    )
    path.write_text("".join(lines[:2]))
    assert prove(runs / "one", tmp_path / "other")[1] == "metrics.jsonl: the second run ends before step 3"


def test_a_bit_of_the_optimizer_is_named(runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "other")
    folder = tmp_path / "other" / "checkpoints"
    tensors = checkpoint.read(folder / "step-00000004", "")
    state = json.loads((folder / "step-00000004" / "state.json").read_text())
    tensors["optim/norm.bias/exp_avg_sq"][5] += 1e-9
    checkpoint.save(folder, 4, tensors, state, keep=9)
    same, words = prove(runs / "one", tmp_path / "other")
    assert not same
    assert words.startswith("step-00000004: optim/norm.bias/exp_avg_sq differs in 1 of 24 values, first in number 5: ")


def test_the_ledger_is_compared(runs, tmp_path):
    shutil.copytree(runs / "two", tmp_path / "other")
    folder = tmp_path / "other" / "checkpoints"
    tensors = checkpoint.read(folder / "step-00000004", "")
    state = json.loads((folder / "step-00000004" / "state.json").read_text())
    for part, words in {"data": "the data stands at", "left_out": "left out is"}.items():
        changed = {**state, part: {**state["data"], "position": 72} if part == "data" else [[["x", 1], 2]]}
        checkpoint.save(folder, 4, tensors, changed, keep=9)
        same, said = prove(runs / "one", tmp_path / "other")
        assert not same
        assert said.startswith(f"step-00000004: {words} ")


def test_the_command(runs, tmp_path):
    def dltrain(*arguments):
        command = [sys.executable, "-m", "dltrain", *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)

    done = dltrain("prove", runs / "one", runs / "two")
    assert (done.returncode, done.stdout[:9]) == (0, "identical")
    done = dltrain("prove", runs / "one", tmp_path)
    assert (done.returncode, done.stderr) == (
        2,
        f"dltrain: {tmp_path}: not a run directory (it has no config.json)\n",
    )
    with pytest.raises(UserError, match="not a run"):
        prove(tmp_path, runs / "one")
