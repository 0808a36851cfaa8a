"""The study's grid, its least-norm solution, and the claim on data that needs no download."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path

import pytest
import torch

from dltrain import grid as grids
from dltrain import rundir
from dltrain.errors import UserError
from dltrain.grid import grid
from dltrain.recipes.studies import double_descent_study as study

SMALL = study.PRESETS["debug"]


@pytest.fixture(autouse=True)
def threads(monkeypatch):
    """The study sets their number for its process."""
    before = torch.get_num_threads()
    monkeypatch.setenv("DLTRAIN_THREADS", "1")
    yield
    torch.set_num_threads(before)


def cells_of(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in (out / "cells").iterdir()}


def test_the_peak_is_at_the_threshold_and_is_drawn(tmp_path, capsys):
    by_seed = study.main(dataclasses.replace(SMALL, out=str(tmp_path)))
    assert list(by_seed) == [0, 1]
    for cells in by_seed.values():
        error = {cell["features"]: cell["test_error"] for cell in cells}
        assert list(error) == list(SMALL.features)
        assert max(error, key=lambda P: error[P]) == SMALL.rows
        assert max(cells, key=lambda cell: cell["norm"])["features"] == SMALL.rows
        assert [c["train_error"] for c in cells if c["features"] >= SMALL.rows] == [0, 0, 0]
    assert (tmp_path / study.PLOT).read_bytes().startswith(b"\x89PNG")
    assert study.PLOT in capsys.readouterr().out


def test_a_killed_study_goes_on_and_an_array_makes_the_same_cells(tmp_path, monkeypatch, capsys):
    whole, killed, array = (dataclasses.replace(SMALL, out=str(tmp_path / name)) for name in ("w", "k", "a"))
    study.main(whole)
    made = 0

    def write(path, value):
        nonlocal made
        made += 1
        if made == 4:
            raise KeyboardInterrupt
        Path(path).write_text(json.dumps(value))

    with monkeypatch.context() as patch:
        patch.setattr(grids.rundir, "write_json", write)
        with pytest.raises(KeyboardInterrupt):
            study.main(killed)
    assert made == 4 and len(cells_of(tmp_path / "k")) == 3
    assert study.main(killed) == study.main(whole)
    monkeypatch.setenv("SLURM_ARRAY_TASK_COUNT", "3")
    monkeypatch.setenv("SLURM_ARRAY_TASK_MIN", "5")
    for task in (5, 6, 7):
        monkeypatch.setenv("SLURM_ARRAY_TASK_ID", str(task))
        with pytest.raises(SystemExit) as left:
            study.main(array)
        assert left.value.code == 0
    assert cells_of(tmp_path / "a") == cells_of(tmp_path / "w")
    assert "task 3 of 3: 3 cells made" in capsys.readouterr().out


def test_a_cell_belongs_to_its_settings(tmp_path):
    calls = []

    def measure(n: int) -> dict:
        calls.append(n)
        return {"twice": 2 * n}

    for cfg in (SMALL, SMALL, dataclasses.replace(SMALL, noise=0.5)):
        found = grid(dataclasses.replace(cfg, out=str(tmp_path)), [{"n": 3}, {"n": 1}], measure, env={})
        assert found == [{"n": 3, "twice": 6}, {"n": 1, "twice": 2}]
    assert calls == [3, 1, 3, 1]


@pytest.mark.parametrize(
    ("errors", "shown"),
    [
        ([30, 90, 20], [True] * 5),
        ([30, 90, 40], [True, True, True, False, True]),  # no second descent below the valley
        ([30, 45, 20], [True, False, False, True, True]),
        ([99, 90, 20], [False, False, True, True, True]),  # no peak at the threshold
    ],
)
def test_what_the_claim_demands(errors, shown, tmp_path, monkeypatch, capsys):
    cells = [
        {"features": P, "test_error": e, "train_error": 5 * (P < 40)}
        for P, e in zip((10, 40, 320), errors, strict=True)
    ]
    monkeypatch.setattr(study, "main", lambda cfg: {7: cells})
    monkeypatch.setattr(rundir, "environment", lambda: ({}, b""))
    with contextlib.nullcontext() if all(shown) else pytest.raises(SystemExit):
        study.claim(dataclasses.replace(SMALL, out=str(tmp_path)))
    figures = rundir.read_json(tmp_path / "claim.json")["figures"]
    assert [figure["shown"] for figure in figures] == shown
    assert study.PLOT in capsys.readouterr().out


def test_labels_are_wrong_in_their_part_alone():
    clean = study.images(dataclasses.replace(SMALL, rows=4000, noise=0.0), 0)
    noisy = study.images(dataclasses.replace(SMALL, rows=4000, noise=0.5), 0)
    assert torch.equal(clean[0], noisy[0]) and torch.equal(clean[3], noisy[3])
    assert float((clean[1] != noisy[1]).double().mean()) == pytest.approx(0.45, abs=0.03)  # a tenth is right by chance
    assert clean[0].dtype == torch.float64


def test_without_mnist_the_file_is_named(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte\.gz: no such file; give --data, or set DLTRAIN_DATA"):
        study.images(dataclasses.replace(SMALL, data=str(tmp_path)), 0)


@pytest.mark.data
@pytest.mark.skipif("DLTRAIN_DATA" not in os.environ, reason="DLTRAIN_DATA names no folder")
def test_mnist(tmp_path):
    x_NE, _, x_ME, y_M = study.images(dataclasses.replace(SMALL, data="", rows=3, test_rows=5, noise=0.0), 0)
    assert x_NE.shape == (3, 784) and x_ME.shape == (5, 784) and 0 <= float(x_NE.min()) < float(x_NE.max()) == 1
    assert y_M.tolist() == [7, 2, 1, 0, 4]  # as everyone knows


@pytest.mark.parametrize("features", [20, 39, 41, 80])
def test_what_a_gpu_solves_is_the_same_problem(features):
    """LAPACK's gels, the only driver on a GPU, also finds the solution of least norm: the features are of full rank."""
    generator = torch.Generator().manual_seed(0)
    z_NP, one_hot_NC = (torch.randn(40, n, generator=generator, dtype=torch.float64) for n in (features, 10))
    gels, gelsd = (torch.linalg.lstsq(z_NP, one_hot_NC, driver=driver).solution for driver in ("gels", "gelsd"))
    torch.testing.assert_close(gels, gelsd)
