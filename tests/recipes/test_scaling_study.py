"""A run gives the same bits however it is run; the grid is kept, fitted and drawn; what the claim demands."""

import contextlib
import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import toy
import worlds

from dltrain import rundir
from dltrain.errors import UserError
from dltrain.recipes import scaling_study as study
from dltrain.scaling_report import PLOTS

DEBUG = replace(study.PRESETS["debug"], widths=(8, 12, 16), left_out=(24, 8e7))


@pytest.fixture(autouse=True)
def settings():
    """A run sets these for its process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    yield
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(scope="module")
def books(tmp_path_factory) -> str:
    """A folder as gutenberg-en is one."""
    folder = tmp_path_factory.mktemp("books")
    for part, n in (("train", 200), ("valid", 20)):
        lines = [json.dumps({"text": f"{part} {i}: " + "so it goes, and on it goes. " * (i % 7)}) for i in range(n)]
        (folder / f"{part}.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return str(folder)


def run(books: str, out: Path, world: int, strategy: str, **changes) -> tuple[str, bytes]:
    cfg = replace(DEBUG, **{"data": books, "out": str(out), "strategy": strategy, "steps": 4} | changes)
    worlds.launch(world, study.train, cfg, 16)
    return toy.outcome(out)


@pytest.fixture(scope="module")
def whole(books, tmp_path_factory) -> tuple[str, bytes]:
    return run(books, tmp_path_factory.mktemp("whole") / "run", 1, "single")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_bits_of_one(tmp_path, books, whole, strategy):
    """Under muP too, whose rates are of parameters that fsdp has replaced."""
    assert run(books, tmp_path / "run", 2, strategy) == whole


def test_a_signal_in_the_midst_of_a_grid_costs_nothing(tmp_path, books, monkeypatch, capsys):
    whole, killed = (replace(DEBUG, data=books, out=str(tmp_path / name)) for name in ("w", "k"))
    found = study.main(whole)
    train, left = study.train, 5

    def some(cfg, width):
        nonlocal left
        left -= 1
        train(replace(cfg, steps=2) if left == 0 else cfg, width)  # as a run that is killed after two steps
        if left == 0:
            raise SystemExit(75)

    with monkeypatch.context() as patch:
        patch.setattr(study, "train", some)
        with pytest.raises(SystemExit):
            study.main(killed)
    assert len(list((tmp_path / "k/cells").iterdir())) == 4
    assert study.main(killed) == found
    for name in ("points.csv", "fits.json", *PLOTS):
        assert (tmp_path / "k" / name).read_bytes() == (tmp_path / "w" / name).read_bytes(), name
    assert "critical_batch" in capsys.readouterr().out


def test_the_grid(tmp_path):
    claim = study.PRESETS["claim"]
    cells = study.cells_of(claim)
    grid = [c for c in cells if c["architecture"] == "gpt" and c["width"] != claim.left_out[0]]
    assert len(grid) >= 12 and len({c["flops"] for c in grid}) == len(claim.budgets)
    assert all(sum(c["flops"] == budget for c in grid) >= 3 for budget in claim.budgets)
    assert claim.left_out[0] > max(c["width"] for c in grid)
    others = [(c["architecture"], c["width"], c["flops"]) for c in cells if c["architecture"] != "gpt"]
    assert len(others) == 6 and all({"architecture": "gpt", "width": w, "flops": f} in cells for _, w, f in others)


def test_one_budget_is_trained_and_nothing_fitted(books, tmp_path, capsys):
    """As several processes do, of one run."""
    out = tmp_path / "one"
    cfg = replace(DEBUG, data=books, out=str(out), widths=(8,), budgets=(2e7,), left_out=(0, 0))
    assert study.main(cfg) == {}
    assert len((out / "points.csv").read_text().splitlines()) == 2 and not (out / "fits.json").exists()


def test_nothing_left_out(tmp_path, monkeypatch, capsys):
    def made(cfg, cells, measure):
        return [
            c | {"params": n, "tokens": c["flops"] / n, "loss": 2 + 9 / n**0.5 + 1e7 / c["flops"]}
            for c in cells
            for n in [c["width"] ** 2]
        ]

    monkeypatch.setattr(study, "grid", made)
    found = study.main(replace(DEBUG, out=str(tmp_path), left_out=(0, 0)))
    assert found["runs"] == len(DEBUG.widths) * len(DEBUG.budgets) and "predicted" not in found
    said = capsys.readouterr().out
    assert "What more compute buys" in said and "on width" in said


def test_what_an_architecture_is_not_told(books):
    torch.manual_seed(0)
    batch = study.rows_of(replace(DEBUG, data=books))[0].batch(*2 * [torch.zeros(1, dtype=torch.int).numpy()])
    seen = {}
    for architecture in ("gpt", "no attention", "no positions"):
        torch.manual_seed(0)
        task = study.Predict(replace(DEBUG, architecture=architecture, layers=1), 16)  # of more, the first sees order
        for p in task.parameters():
            p.data += 0.3 * torch.randn_like(p)
        swapped = batch | {"ids_BL": batch["ids_BL"][:, [1, 0, *range(2, DEBUG.row)]]}
        last = torch.full_like(batch["targets_BL"], -100)
        last[:, -1] = batch["targets_BL"][:, -1]
        losses = [float(task(b | {"targets_BL": last})["loss"].detach()) for b in (batch, swapped)]
        seen[architecture] = abs(losses[0] - losses[1])
    assert seen["no attention"] == 0 and seen["no positions"] < 1e-5 < 1e-3 < seen["gpt"]


def test_anybodys_points(tmp_path, capsys):
    path = tmp_path / "runs.csv"
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(("tokens", "params", "loss", "note"))
        rows.writerows(
            (d, n, 1.7 + 400 / n**0.34 + 410 / d**0.28, "x") for n in (1e7, 4e7, 2e8) for d in (1e9, 4e9, 2e10)
        )
    found = study.main(replace(study.PRESETS["fit"], points=str(path), out=str(tmp_path / "fit")))
    assert found["alpha"] == pytest.approx(0.34, rel=0.02) and found["beta"] == pytest.approx(0.28, rel=0.02)
    assert (tmp_path / "fit" / PLOTS[0]).exists() and "alpha" in capsys.readouterr().out
    path.write_text("params,tokens,loss\n1e7,1e9,3\n1e7,many,3\n")
    with pytest.raises(UserError, match=r"runs\.csv, line 3: tokens is 'many'"):
        study.main(replace(study.PRESETS["fit"], points=str(path), out=str(tmp_path / "fit")))


@pytest.mark.parametrize(
    ("r2", "largest", "without", "shown"),
    [
        (0.99, 2.02, 2.5, [True, True, True]),
        (0.97, 2.02, 2.5, [False, True, True]),
        (0.99, 2.05, 2.5, [True, False, True]),
        (0.99, 1.95, 2.4, [True, False, False]),
    ],
)
def test_what_the_claim_demands(tmp_path, monkeypatch, r2, largest, without, shown):
    """From 1e7 to 2e7 FLOPs the loss falls by 0.2 with attention; to `without` from 2.6 without it."""
    losses = {1e7: (2.5, 2.6), 2e7: (2.3, without)}
    lesson = [{"flops": c, "gpt": losses[c][0], "no attention": losses[c][1]} for c in (1e7, 2e7, 2e7)]
    found = {"by_compute": {"r2": r2}, "predicted": 2.0, "largest": largest, "runs": 9, "lesson": lesson}
    monkeypatch.setattr(study, "main", lambda cfg: found)
    monkeypatch.setattr(rundir, "environment", lambda: ({}, b""))
    with contextlib.nullcontext() if all(shown) else pytest.raises(SystemExit):
        study.claim(replace(DEBUG, out=str(tmp_path)))
    figures = rundir.read_json(tmp_path / "claim.json")["figures"]
    assert [figure["shown"] for figure in figures] == shown
