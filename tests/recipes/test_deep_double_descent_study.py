"""The study's runs give the same bits however they are run; its grid, its wrong labels, and what its claim demands."""

import contextlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import worlds

from dltrain import rundir
from dltrain.errors import UserError
from dltrain.recipes.studies import deep_double_descent_study as study
from dltrain.recipes.studies.deep_double_descent_study import PRESETS, rows_of

DEBUG = PRESETS["debug"]
MODELS = {"mlp": {"widths": (16,)}, "resnet-18": {"widths": (2,), "steps": 4, "augment": True}}


@pytest.fixture(autouse=True)
def settings():
    """A run sets these for its process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


def run(out: Path, world: int, strategy: str, model: str, **changes) -> tuple[str, bytes]:
    cfg = replace(DEBUG, **{"model": model, "out": str(out), "strategy": strategy} | MODELS[model] | changes)
    worlds.launch(world, study.main, cfg)
    return toy.outcome(out / f"runs/seed-0-width-{cfg.widths[0]}")


@pytest.fixture(scope="module", params=MODELS)
def whole(request, tmp_path_factory) -> tuple[str, tuple[str, bytes]]:
    return request.param, run(tmp_path_factory.mktemp("whole") / "run", 1, "single", request.param)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_bits_of_one(tmp_path, whole, strategy):
    assert run(tmp_path / "run", 2, strategy, whole[0]) == whole[1]


def test_stopped_and_resumed_on_two_processes(tmp_path, whole):
    run(tmp_path / "run", 1, "single", whole[0], steps=2)
    assert run(tmp_path / "run", 2, "fsdp", whole[0])[0] == whole[1][0]


def test_several_processes_train_one_network(tmp_path, monkeypatch):
    for name, value in {"RANK": 0, "WORLD_SIZE": 2, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match="several processes train one network, not 2"):
        study.main(replace(DEBUG, out=str(tmp_path)))


def test_the_grid_is_kept_and_drawn(tmp_path, capsys):
    cfg = replace(DEBUG, out=str(tmp_path))
    by_seed = study.main(cfg)
    assert [(cell["seed"], cell["width"]) for cell in by_seed[0]] == [(0, 2), (0, 16)]
    assert all(0 < cell["test_error"] <= 100 and 0 < cell["train_error"] <= 100 for cell in by_seed[0])
    assert (tmp_path / study.PLOT).read_bytes().startswith(b"\x89PNG")
    metrics = {path: path.stat().st_mtime_ns for path in tmp_path.glob("runs/*/metrics.jsonl")}
    assert len(metrics) == 2
    assert study.main(cfg) == by_seed
    assert all(path.stat().st_mtime_ns == before for path, before in metrics.items())
    assert f"see {tmp_path / study.PLOT}" in capsys.readouterr().out


def test_labels_are_wrong_in_their_part_alone_and_stay_so():
    cfg = replace(DEBUG, rows=0, noise=0.3)
    index_N = np.arange(1000)
    (clean, test), (noisy, _) = rows_of(replace(cfg, noise=0.0)), rows_of(cfg)
    first, later = (noisy.batch(np.full_like(index_N, epoch), index_N) for epoch in (0, 7))
    true = clean.batch(np.zeros_like(index_N), index_N)
    assert torch.equal(first["images_BCHW"], true["images_BCHW"])
    assert torch.equal(first["labels_B"], later["labels_B"]) and int(first["labels_B"].min()) >= 0
    assert float((first["labels_B"] != true["labels_B"]).double().mean()) == pytest.approx(0.3, abs=0.05)
    assert noisy.fingerprint != clean.fingerprint and len(test) == 200
    other = rows_of(replace(cfg, seed=1))[0].batch(np.zeros_like(index_N), index_N)
    assert not torch.equal(other["labels_B"], first["labels_B"])


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ([40, 25, 33, 20], [True, True, True, True, True]),
        ([40, 25, 33, 24.5], [True, True, False, True, True]),  # never below the valley again
        ([40, 30, 26, 22], [False, False, True, True, True]),  # no peak
        ([40, 30, 20, 33], [True, False, False, False, True]),  # no second descent
    ],
)
def test_what_the_claim_demands(errors, shown, tmp_path, monkeypatch):
    cells = [
        {"width": width, "test_error": error, "train_error": fitted}
        for width, error, fitted in zip((3, 8, 24, 512), errors, (30, 20, 5, 0), strict=True)
    ]
    monkeypatch.setattr(study, "main", lambda cfg: {7: cells})
    monkeypatch.setattr(rundir, "environment", lambda: ({}, b""))
    with contextlib.nullcontext() if all(shown) else pytest.raises(SystemExit):
        study.claim(replace(DEBUG, out=str(tmp_path)))
    figures = rundir.read_json(tmp_path / "claim.json")["figures"]
    assert [figure["shown"] for figure in figures] == shown
