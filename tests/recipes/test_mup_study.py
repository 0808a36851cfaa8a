"""The sweep and the coordinate check of muP: what they draw, and what the claim demands."""

import contextlib
from dataclasses import replace

import pytest
import torch
import toy
import worlds

from dltrain import rundir
from dltrain.recipes.studies import mup_study as study

DEBUG = replace(study.PRESETS["debug"], lr=2.0**-6)


@pytest.fixture(autouse=True)
def settings():
    """A run sets these for its process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_bits_of_one(tmp_path, strategy):
    for world, kind in ((1, "single"), (2, strategy)):
        worlds.launch(world, study.train, replace(DEBUG, out=str(tmp_path / kind), strategy=kind), 16)
    assert toy.outcome(tmp_path / strategy) == toy.outcome(tmp_path / "single")


def test_the_sweep_is_kept_and_drawn(tmp_path, capsys):
    cfg = replace(study.PRESETS["debug"], out=str(tmp_path))
    found = study.main(cfg)
    assert all(best in cfg.exponents for by in found["best"].values() for best in by.values())
    assert list(found["best"]["standard"]) == [8, 16]
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in study.PLOTS)
    kept = {path: path.stat().st_mtime_ns for path in tmp_path.glob("cells/*.json")}
    assert len(kept) == 8 + 6
    assert study.main(cfg) == found
    assert all(path.stat().st_mtime_ns == before for path, before in kept.items())
    assert "muP: best rate at width 8" in capsys.readouterr().out


def test_under_mup_a_step_moves_wide_networks_as_much_as_narrow_ones():
    cfg = replace(study.PRESETS["debug"], base_width=64, lr=2.0**-9, batch=4, text=2000)
    moved = {
        name: [study.coordinates(replace(cfg, parametrisation=name), width)["logits"] for width in (64, 256)]
        for name in ("muP", "standard")
    }
    assert moved["muP"][0] == pytest.approx(moved["standard"][0], rel=1e-4)  # the same network at the base width
    assert 0.6 < moved["muP"][1] / moved["muP"][0] < 1.4
    assert moved["standard"][1] / moved["standard"][0] > 2


@pytest.mark.parametrize(
    ("best", "growth", "shown"),
    [
        ({"muP": (-6, -6), "standard": (-6, -9)}, (0.1, 1.5), [True] * 4),
        ({"muP": (-6, -8), "standard": (-6, -7)}, (0.6, 0.6), [False] * 4),
        ({"muP": (-6, -5), "standard": (-6, -4)}, (0.1, 1.5), [True] * 4),
    ],
)
def test_what_the_claim_demands(tmp_path, monkeypatch, best, growth, shown):
    found = {
        "best": {name: dict(zip((64, 512), exponents, strict=True)) for name, exponents in best.items()},
        "growth": {name: {"logits": -g} for name, g in zip(best, growth, strict=True)},
    }
    monkeypatch.setattr(study, "main", lambda cfg: found)
    monkeypatch.setattr(rundir, "environment", lambda: ({}, b""))
    with contextlib.nullcontext() if all(shown) else pytest.raises(SystemExit):
        study.claim(replace(study.PRESETS["claim"], out=str(tmp_path)))
    figures = rundir.read_json(tmp_path / "claim.json")["figures"]
    assert [figure["shown"] for figure in figures] == shown
