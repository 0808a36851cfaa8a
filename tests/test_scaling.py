"""Fits find the numbers that made the points; what cannot be fitted is named."""

import numpy as np
import pytest

from dltrain.errors import UserError
from dltrain.scaling import (
    Points,
    critical_batch,
    frontier,
    isoflop,
    parametric,
    power_law,
    read_points,
    shared_budgets,
)

# Hoffmann et al. 2022, equation 10
E, A, B, ALPHA, BETA = 1.69, 406.4, 410.7, 0.34, 0.28


def points(noise: float, seed: int = 0) -> Points:
    """Sizes and tokens as in a study of 8 x 8 runs."""
    n, d = (a.ravel() for a in np.meshgrid(np.geomspace(4e7, 1.6e10, 8), np.geomspace(1e9, 5e11, 8)))
    random = np.random.Generator(np.random.Philox(key=seed))
    loss = (E + A / n**ALPHA + B / d**BETA) * np.exp(noise * random.standard_normal(len(n)))
    return Points(n, d, loss)


@pytest.mark.parametrize("seed", range(3))
def test_the_parametric_fit_finds_known_exponents_through_noise(seed):
    fit = parametric(points(1e-3, seed), bootstrap=20)
    assert fit.alpha == pytest.approx(ALPHA, rel=0.02)
    assert fit.beta == pytest.approx(BETA, rel=0.02)
    assert pytest.approx(E, rel=0.02) == fit.E
    low, high = fit.intervals["alpha"]
    assert low < fit.alpha < high and high - low < 0.04


def test_without_noise_all_five_are_exact():
    fit = parametric(points(0.0), bootstrap=0)
    assert [fit.E, fit.A, fit.B, fit.alpha, fit.beta] == pytest.approx([E, A, B, ALPHA, BETA], rel=1e-3)
    assert fit.exponent == pytest.approx(BETA / (ALPHA + BETA), rel=1e-3)
    n = fit.best_params(1e21)
    around = [fit.loss(n * f, 1e21 / 6 / (n * f)) for f in (0.9, 1.0, 1.1)]
    assert around[1] == min(around)


def test_an_outlier_moves_the_fit_little():
    runs = points(1e-3)
    runs.loss[7] *= 1.5
    assert parametric(runs, bootstrap=0).alpha == pytest.approx(ALPHA, rel=0.05)


def test_a_power_law_is_a_line_in_logarithms():
    x = np.geomspace(1e3, 1e9, 7)
    law = power_law(x, (8.8e13 / x) ** 0.076)
    assert (law.exponent, law.r2) == (pytest.approx(-0.076), pytest.approx(1.0))
    assert law.at(1e10) == pytest.approx((8.8e13 / 1e10) ** 0.076)
    assert power_law(x, [3, 1, 4, 1, 5, 9, 2]).r2 < 0.5


def test_the_minima_of_parabolas_follow_the_law_that_made_them():
    budgets = np.geomspace(1e18, 1e21, 4)
    rows = []
    for c in budgets:
        best = 0.09 * c**0.5
        rows += [(n, c / 6 / n, 2 + 0.1 * np.log(n / best) ** 2) for n in best * np.geomspace(0.3, 5, 5)]
    found = isoflop(Points(*np.array(rows).T), list(budgets))
    assert found.law and found.law.exponent == pytest.approx(0.5)
    assert found.params == pytest.approx(0.09 * budgets**0.5)
    assert found.loss == pytest.approx(2.0)


def test_what_isoflop_cannot_fit_is_named():
    n = np.array([1e6, 2e6, 4e6])
    with pytest.raises(UserError, match="no minimum"):
        isoflop(Points(n, 1e18 / 6 / n, np.array([2.0, 3.0, 2.0])), [1e18])
    with pytest.raises(UserError, match="2 sizes are too few"):
        isoflop(Points(n[:2], 1e18 / 6 / n[:2], np.ones(2)), [1e18])


def test_budgets_and_frontier():
    n = np.array([1.0, 2.0, 4.0, 1.0, 2.0, 4.0, 3.0])
    flops = np.array([6.0, 6.0, 6.1, 24.0, 24.0, 24.0, 60.0])
    runs = Points(n, flops / 6 / n, np.array([3.0, 2.5, 2.7, 2.4, 2.0, 2.1, 2.2]))
    assert shared_budgets(runs) == [6.0, 24.0]
    best = frontier(runs)
    assert (best.params.tolist(), best.loss.tolist()) == ([2.0, 2.0], [2.5, 2.0])


def test_the_noise_scale_is_that_of_the_gradients():
    random = np.random.Generator(np.random.Philox(key=5))
    true, sigma, d = np.full(100, 0.3), 2.0, 100  # tr(Sigma) / |G|^2 = 4 * 100 / 9
    per_batch = {
        b: float(np.mean([((true + sigma / b**0.5 * random.standard_normal(d)) ** 2).sum() for _ in range(4000)]))
        for b in (4, 64)
    }
    assert critical_batch(4, 64, per_batch[4], per_batch[64]) == pytest.approx(400 / 9, rel=0.05)
    assert np.isnan(critical_batch(4, 64, 1.0, 0.01))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no column params, tokens, loss"),
        ("params,tokens\n1,2\n", "no column loss"),
        ("params,tokens,loss\n1e6,1e9,3\n1e6,oops,3\n", "line 3: tokens is 'oops'"),
        ("params,tokens,loss\n1e6,1e9\n", "line 2: loss is None"),
        ("params,tokens,loss\n1e6,-1,3\n", "line 2: tokens is '-1'"),
        ("params,tokens,loss\n1e6,1e9,nan\n", "line 2: loss is 'nan'"),
        ("params,tokens,loss\n1e6,1e9,inf\n", "line 2: loss is 'inf'"),
    ],
)
def test_malformed_points_are_named_with_their_line(tmp_path, text, message):
    path = tmp_path / "points.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=message):
        read_points(path)
    with pytest.raises(UserError, match="cannot be read"):
        read_points(tmp_path / "absent.csv")


def test_columns_may_stand_in_any_order_among_others(tmp_path):
    path = tmp_path / "points.csv"
    path.write_text("run, Loss, tokens, params\na, 3.5, 1e9, 1e6\nb, 3.0, 2e9, 1e6\n")
    assert read_points(path).loss.tolist() == [3.5, 3.0]
    assert read_points(path).flops.tolist() == [6e15, 1.2e16]


@pytest.mark.parametrize("keep", [slice(0, 5), slice(0, 8), slice(0, None, 8)])
def test_too_few_points_are_refused(keep):
    runs = points(0.0).where(keep)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=f"{len(runs)} points with .* too few"):
        parametric(runs)
