"""The study's grid of small trainings, on digits that need no download."""

import contextlib
import dataclasses
import json

from dltrain.recipes.studies.alexnet_study import EVERY, PRESETS, claim, main

SMALL = dataclasses.replace(PRESETS["debug"], steps=20, error=0.0)


def test_every_training_is_measured_once_and_dropout_is_judged(tmp_path):
    cfg = dataclasses.replace(SMALL, out=str(tmp_path))
    with contextlib.suppress(SystemExit):  # whether or not so little training shows it
        claim(cfg)
    made = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.jsonl")}
    found = main(cfg)
    assert len(made) == 3 and made == {path: path.stat().st_mtime_ns for path in made}
    assert [(c["activation"], c["dropout"]) for c in found] == [("relu", 0.0), ("tanh", 0.0), ("relu", 0.5)]
    assert {c["reached"] for c in found} == {cfg.steps + EVERY}  # none learns all digits in as many steps
    assert len({c["test_loss"] for c in found}) == 3
    judged = json.loads((tmp_path / "claim.json").read_text())
    gap, loss = (figure["values"]["0"] for figure in judged["figures"])
    assert gap == found[0]["gap"] - found[2]["gap"] and loss == found[0]["test_loss"] - found[2]["test_loss"]
    assert "tanh over ReLU: 1.00" in judged["notes"][0]
    assert (tmp_path / judged["pictures"][0]).stat().st_size > 1000
