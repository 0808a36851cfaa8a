"""BERT's debug preset trained through the interpreted kernels, beside the same steps through the references."""

import dataclasses
import json

import pytest

pytest.importorskip("triton")

from dltrain.kernels import dispatch
from dltrain.loop import fit
from dltrain.optim import adamw
from dltrain.recipes import bert_pretrain as bert
from dltrain.run import Run
from dltrain.schedules import linear


def test_ten_steps_have_the_losses_of_the_reference(tmp_path, monkeypatch):
    """To 1e-5: float32 sums in another order, through ten steps of AdamW. Without dropout, whose masks are others'."""
    losses = {}
    for mode in ("reference", "triton"):
        monkeypatch.setattr(dispatch, "MODE", mode)
        small = {"lanes": 1, "batch": 2, "row": 16, "dropout": 0.0, "save_every": 0, "eval_every": 0}
        cfg = dataclasses.replace(bert.PRESETS["debug"], **small, out=str(tmp_path / mode))
        rows, _ = bert.data(cfg)
        with Run(cfg) as run:
            task, optimizer = run.prepare(lambda cfg=cfg: bert.PretrainBert(bert.model_config(cfg)), adamw(cfg.lr))
            fit(run, task, optimizer, linear(cfg.warmup, cfg.steps), run.batches(rows))
        lines = (tmp_path / mode / "metrics.jsonl").read_text().splitlines()
        losses[mode] = [row["loss"] for row in map(json.loads, lines) if "loss" in row]
    assert len(losses["triton"]) == 10
    assert losses["triton"] == pytest.approx(losses["reference"], rel=1e-5)
    assert losses["triton"] != losses["reference"]  # or no kernel ran
