"""A run that is killed between its last checkpoint and its results has them after the next launch, to the byte."""

import dataclasses
import importlib

import pytest
import worlds

RECIPES = ["gpt_pretrain", "gan_train", "simclr_pretrain"]  # one of those with `fit`, and the loops of their own
LONG = ["bert_pretrain", "imagenet_train", "dqn_train"]


def train(name: str, out: str, steps: int) -> None:
    recipe = importlib.import_module(f"dltrain.recipes.{name}")
    recipe.main(dataclasses.replace(recipe.PRESETS["debug"], out=out, steps=steps, eval_every=0, save_every=0))


@pytest.mark.parametrize("name", [*RECIPES, *(pytest.param(name, marks=pytest.mark.long) for name in LONG)])
def test_killed_before_its_results(tmp_path, name):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    steps = 4
    worlds.launch(1, train, name, str(whole), steps)
    for launches in range(2):
        worlds.launch(1, train, name, str(cut), steps)
        if launches == 0:
            pictures = [path.name for path in cut.glob("*.*") if path.suffix in (".png", ".gif")]
            for lost in ("results.json", "report.html", *pictures):
                (cut / lost).unlink()
    for kept in ("results.json", "metrics.jsonl", *pictures):
        assert (cut / kept).read_bytes() == (whole / kept).read_bytes(), kept
    assert (cut / "report.html").exists()
    before = (cut / "results.json").stat().st_mtime_ns
    worlds.launch(1, train, name, str(cut), steps)
    assert name == "dqn_train" or (cut / "results.json").stat().st_mtime_ns == before  # it plays its episodes again
