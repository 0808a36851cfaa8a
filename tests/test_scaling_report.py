"""The figures of anybody's runs, in one file and two pictures."""

import numpy as np
import pytest

from dltrain import rundir
from dltrain.scaling import Points
from dltrain.scaling_report import PLOTS, fitted


def grid(sizes: int) -> Points:
    """Runs of a known law: `sizes` at each of four budgets."""
    c, n = (a.ravel() for a in np.meshgrid(np.geomspace(1e18, 6.4e19, 4), np.geomspace(0.25, 4, sizes), indexing="ij"))
    n = n * 0.15 * c**0.5
    d = c / 6 / n
    return Points(n, d, 1.7 + 400 / n**0.35 + 400 / d**0.3)


def test_it_finds_the_law_predicts_and_draws(tmp_path, capsys):
    found = fitted(grid(5), tmp_path, (1e9, 2e10))
    assert [found[k] for k in ("E", "alpha", "beta")] == pytest.approx([1.7, 0.35, 0.3], rel=1e-2)
    assert found["predicted"] == pytest.approx(1.7 + 400 / 1e9**0.35 + 400 / 2e10**0.3, rel=1e-4)
    assert found["isoflop"]["law"]["exponent"] == pytest.approx(found["exponent"], abs=0.03)
    assert found["by_compute"]["exponent"] < 0 and found["by_compute"]["r2"] > 0.98
    assert all((tmp_path / name).read_bytes().startswith(b"\x89PNG") for name in PLOTS)
    written = rundir.read_json(tmp_path / "fits.json")
    assert written["alpha"] == found["alpha"] and written["runs"] == 20
    assert "nats by L(N, D), " in capsys.readouterr().out


def test_runs_of_no_common_budget_have_no_parabolas(tmp_path, capsys):
    runs = grid(5).where(np.arange(20) % 4 != 0)
    runs.tokens[:] *= np.geomspace(1, 3, 15)
    found = fitted(runs, tmp_path)
    assert "isoflop" not in found and "predicted" not in found
    assert "no parabolas: no FLOPs that 3 sizes were trained for" in capsys.readouterr().out
