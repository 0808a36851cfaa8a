"""Processes come and go in recipes, under one strategy or another, in mid-epoch: the bits of one process throughout."""

import contextlib
import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import toy
import worlds

from dltrain import Run, rundir

# step until which, processes, strategy
LIVES = [(2, 4, "ddp"), (4, 2, "fsdp"), (6, 1, "single"), (8, 3, "fsdp"), (10, 8, "ddp")]


def train_until(recipe: str, fields: dict[str, Any], step: int) -> None:
    """The recipe's debug preset until it has saved `step`, where the launch ends as if it were killed."""
    module = importlib.import_module(f"dltrain.recipes.{recipe}")
    save = Run.save

    def save_and_leave(run: Run) -> None:
        save(run)
        run.settle()
        if run.step_done == step:
            raise SystemExit

    if step < fields["steps"]:
        Run.save = save_and_leave  # type: ignore[method-assign]  # the process is this test's own
    with contextlib.suppress(SystemExit):
        module.main(replace(module.PRESETS["debug"], **fields))


def life(recipe: str, out: Path, lives: list[tuple[int, int, str]], **fields: Any) -> tuple[str, bytes]:
    """Every launch of `lives` after the other in one run directory; what toy.outcome says of it."""
    for step, world, strategy in lives:
        asked = {"out": str(out), "steps": 10, "batch": 24, "lanes": 8, "save_every": 2, "eval_every": 5, "keep": 9}
        worlds.launch(
            world, train_until, recipe, asked | {"strategy": strategy} | fields, step, env={"DLTRAIN_DEVICE": "cpu"}
        )
    return toy.outcome(out)


@pytest.mark.parametrize(
    ("recipe", "precision"),
    [
        ("bert_pretrain", "fp32"),  # dropout
        ("gpt_pretrain", "bf16"),  # packed
        ("imagenet_train", "fp32"),  # batch norm's running statistics
        pytest.param("bert_pretrain", "bf16", marks=pytest.mark.long),
        pytest.param("gpt_pretrain", "fp32", marks=pytest.mark.long),
        pytest.param("imagenet_train", "bf16", marks=pytest.mark.long),
    ],
)
def test_4_2_1_3_8_processes_are_one(tmp_path, recipe, precision):
    one = life(recipe, tmp_path / "one", [(10, 1, "single")], precision=precision)
    assert life(recipe, tmp_path / "many", LIVES, precision=precision) == one
    saved = {p.name for p in (tmp_path / "many/checkpoints").iterdir()}
    assert saved >= {f"step-{step:08d}" for step in (2, 4, 6, 8, 10)}
    events = rundir.read_rows(tmp_path / "many/events.jsonl")
    worlds_seen = [e["world"] for e in events if e["kind"] == "resume"]
    assert worlds_seen == [2, 1, 3, 8]
