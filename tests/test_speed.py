"""The clock of a run: phases that add up to the step, and what looking costs (5 s)."""

import dataclasses
import json
import time

import pytest
import torch
import toy

from dltrain import flops
from dltrain.optim import adamw
from dltrain.speed import PHASES, Phases, Speed


def test_phases_add_up_to_the_step(tmp_path):
    cfg = toy.Config(out=str(tmp_path / "run"), strategy="single", steps=10, save_every=3, log_every=2, eval_every=100)
    toy.train(cfg)
    rows = [json.loads(line) for line in (tmp_path / "run" / "speed.jsonl").read_text().splitlines()]
    assert len(rows) == 5
    for row in rows:
        assert sum(row[f"{phase}_seconds"] for phase in PHASES) == pytest.approx(row["step_seconds"], rel=0.01)
        assert all(row[f"{phase}_seconds"] > 0 for phase in ("data", "forward", "backward", "optimizer", "rest"))
    assert sum(row["checkpoint_seconds"] > 0 for row in rows) == 3  # of steps 3, 6 and 9, each in another window


def test_what_takes_long_is_in_its_phase():
    phases = Phases(cuda=False)
    time.sleep(0.05)
    phases.mark("data")
    phases.mark("forward")
    time.sleep(0.03)
    phases.mark("backward")
    found = phases.close()
    assert found["data"] >= 0.05 and 0.03 <= found["backward"] < found["data"]
    assert found["forward"] + found["communication"] + found["optimizer"] + found["checkpoint"] < 0.01


def test_a_mark_costs_little():
    """A step has six marks and four for each micro-batch; a step of 10 ms may pay 0.5 %, that is 50 us."""
    phases, n = Phases(cuda=False), 10_000
    began = time.perf_counter()
    for _ in range(n):
        phases.mark("rest")
    assert (time.perf_counter() - began) / n * 10 < 50e-6


def test_utilisation_by_three_conventions():
    work = flops.Work(lambda: toy.Toy(0.0), adamw(1e-2), row(), tokens=toy.L)
    speed = Speed(torch.device("cpu"), world=2, precision="bf16")
    speed.measure(work, 4, "none")
    assert speed.flops is None  # no peak is known, so there is nothing to be a share of
    assert not {"mfu", "mfu_6n", "hfu"} & speed.read(1, 10, 8).keys()
    speed.peak = 1e12
    speed.measure(work, 4, "full")
    assert speed.flops
    time.sleep(0.02)
    read = speed.read(2, 10, 8)
    found = dataclasses.asdict(speed.flops)
    assert found["run"] > found["full"] == found["needed"]
    assert read["hfu"] / read["mfu"] == pytest.approx(found["run"] / found["needed"])
    assert read["mfu_6n"] / read["mfu"] == pytest.approx(found["by_parameters"] / found["needed"])
    assert 0 < read["mfu"] < 8 * found["needed"] / 0.02 / 2 / 1e12


def row() -> dict[str, torch.Tensor]:
    return {name: torch.zeros(1, toy.L, dtype=torch.int64) for name in ("ids_ML", "targets_ML")}
