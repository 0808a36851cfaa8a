"""Scaling laws: how loss falls with parameters and tokens, fitted to runs. The only fitter with scipy.

- `parametric`: L(N, D) = E + A / N^alpha + B / D^beta. Hoffmann et al. 2022, https://arxiv.org/abs/2203.15556, section
  3.3 and appendix D.3: Huber loss on log L, L-BFGS from a grid of starts; intervals by bootstrap.
- `isoflop`: a parabola in log N at each compute budget, and the power law of its minima (section 3.2).
- `power_law`: L = (x_c / x)^alpha. Kaplan et al. 2020, https://arxiv.org/abs/2001.08361, equations 1.1 to 1.3.
- `critical_batch`: the gradient noise scale. McCandlish et al. 2018, https://arxiv.org/abs/1812.06162, appendix A.1.

N are parameters, D tokens, L nats per token, C = 6 N D FLOPs.
"""

import csv
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.errors import UserError

DELTA = 1e-3  # Huber's, in log L (Hoffmann et al., appendix D.3)


@dataclass(frozen=True)
class Points:
    """Runs as columns: parameters N, tokens D, final losses L; all > 0."""

    params: np.ndarray
    tokens: np.ndarray
    loss: np.ndarray

    def __len__(self) -> int:
        return len(self.loss)

    def where(self, keep: np.ndarray) -> "Points":
        """Rows by mask or by index."""
        return Points(self.params[keep], self.tokens[keep], self.loss[keep])

    @property
    def flops(self) -> np.ndarray:
        return 6.0 * self.params * self.tokens


def read_points(path: Path) -> Points:
    """Points of a .csv with the columns params, tokens, loss; others are left out.

    Raises:
        UserError: for an absent file or column, and for a value that is no positive number, with its line.
    """
    try:
        with path.open(newline="") as file:
            rows = list(csv.DictReader(file, skipinitialspace=True))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as CSV ({error})") from None
    names = ("params", "tokens", "loss")
    columns = {n.strip().lower(): n for n in (rows[0] if rows else {}) if n}
    if missing := [n for n in names if n not in columns]:
        raise UserError(f"{path}: no column {', '.join(missing)}; the first line must name params, tokens and loss")
    values = np.array([[_positive(row[columns[n]], n, path, i + 2) for n in names] for i, row in enumerate(rows)])
    return Points(*values.T)


def _positive(text: str | None, name: str, path: Path, line: int) -> float:
    try:
        value = float(text or "")
    except ValueError:
        value = math.nan
    if not (value > 0 and math.isfinite(value)):
        raise UserError(f"{path}, line {line}: {name} is {text!r}, which is no positive number")
    return value


def shared_budgets(points: Points) -> list[float]:
    """FLOPs, within 5 %, that three sizes or more were trained for, in rising order."""
    found: list[float] = []
    for c in np.sort(points.flops):
        if (not found or c > 1.05 * found[-1]) and len(set(points.params[np.abs(points.flops / c - 1) < 0.05])) >= 3:
            found.append(float(c))
    return found


def frontier(points: Points) -> Points:
    """The runs to which none of fewer FLOPs, or of as many within 5 %, is equal: the least loss by compute."""
    best: list[int] = []
    for i in np.lexsort((points.loss, points.flops)):
        if best and points.loss[i] >= points.loss[best[-1]]:
            continue
        if best and points.flops[i] < 1.05 * points.flops[best[-1]]:
            best.pop()
        best.append(int(i))
    return points.where(np.array(best, int))


@dataclass(frozen=True)
class Parametric:
    """L(N, D) = E + A / N^alpha + B / D^beta. `intervals`: by name, what 90 % of the bootstrap's fits lie between."""

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    intervals: Mapping[str, tuple[float, float]]

    def loss(self, params: Any, tokens: Any) -> Any:
        """Nats per token of `params` parameters trained on `tokens`."""
        n, d = np.log(np.asarray(params, float)), np.log(np.asarray(tokens, float))  # powers of them overflow
        return self.E + np.exp(math.log(self.A) - self.alpha * n) + np.exp(math.log(self.B) - self.beta * d)

    def best_params(self, flops: float) -> float:
        """Parameters of the least loss at C = 6 N D (Hoffmann et al., equation 4)."""
        a, b = self.alpha, self.beta
        scale = (a * self.A / (b * self.B)) ** (1 / (a + b))
        return scale * (flops / 6) ** (b / (a + b))

    @property
    def exponent(self) -> float:
        """a of N_opt ~ C^a."""
        return self.beta / (self.alpha + self.beta)


def parametric(points: Points, bootstrap: int = 100, seed: int = 0) -> Parametric:
    """Fit the five numbers, and intervals from `bootstrap` resamplings of the points (0: none).

    Raises:
        UserError: for fewer than 6 points, or ones that do not vary in both N and D.
    """
    x, y = _logs(points)
    starts = np.array(
        list(product((0.0, 4.0, 8.0, 12.0), (0.0, 4.0, 8.0, 12.0), (-1.0, 0.0, 1.0), (0.2, 0.5), (0.2, 0.5)))
    )
    best = _best(x, y, starts)
    random = np.random.Generator(np.random.Philox(key=seed))
    fits = []
    for _ in range(bootstrap):
        rows = random.integers(0, len(y), len(y))
        if all(len(set(column[rows])) >= 3 for column in x.T):
            fits.append(_named(_best(x[rows], y[rows], np.array([best]))))
    names = ("E", "A", "B", "alpha", "beta")
    low_high = np.percentile([[f[n] for n in names] for f in fits], (5, 95), axis=0).T if fits else []
    intervals = {n: (float(a), float(b)) for n, (a, b) in zip(names, low_high, strict=False)}
    return Parametric(**_named(best), intervals=intervals)


def _logs(points: Points) -> tuple[np.ndarray, np.ndarray]:
    sizes, spans = len(set(points.params)), len(set(points.tokens))
    if len(points) < 6 or sizes < 3 or spans < 3:
        raise UserError(
            f"{len(points)} points with {sizes} sizes and {spans} numbers of tokens are too few for five numbers: "
            "give 6 or more, with 3 or more of each"
        )
    return np.log(np.stack([points.params, points.tokens], 1)), np.log(points.loss)


def _best(x: np.ndarray, y: np.ndarray, starts: np.ndarray) -> np.ndarray:
    try:
        from scipy.optimize import minimize
    except ImportError:
        raise UserError("fitting scaling laws needs scipy: pip install 'dltrain[studies]'") from None

    # Centred, the scales and the exponents are nearly independent, and L-BFGS converges in tens of steps.
    middle = x.mean(0)
    moved = starts.copy()
    moved[:, 0] -= starts[:, 3] * middle[0]
    moved[:, 1] -= starts[:, 4] * middle[1]
    costs = np.array([_cost(s, x - middle, y)[0] for s in moved])
    options = {"maxiter": 2000, "ftol": 1e-15, "gtol": 1e-12}
    found = [
        minimize(_cost, moved[i], (x - middle, y), method="L-BFGS-B", jac=True, options=options)
        for i in np.argsort(costs, kind="stable")[:24]
    ]
    best = min(found, key=lambda f: f.fun).x.copy()
    best[:2] += best[3:] * middle
    return best


def _cost(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean Huber loss of log-sum-exp(a - alpha log N, b - beta log D, e) - log L, over DELTA^2, and its gradient."""
    a, b, e, alpha, beta = theta
    terms = np.stack([a - alpha * x[:, 0], b - beta * x[:, 1], np.full(len(y), e)], 1)
    top = terms.max(1, keepdims=True)
    weights = np.exp(terms - top)
    total = weights.sum(1, keepdims=True)
    off = (top + np.log(total))[:, 0] - y
    weights /= total
    inside = np.abs(off) <= DELTA
    cost = np.where(inside, 0.5 * off**2, DELTA * (np.abs(off) - 0.5 * DELTA)).mean() / DELTA**2
    slope = np.clip(off, -DELTA, DELTA) / len(y) / DELTA**2
    per_term = slope[:, None] * weights
    grad = [*per_term.sum(0), -(per_term[:, 0] * x[:, 0]).sum(), -(per_term[:, 1] * x[:, 1]).sum()]
    return float(cost), np.array(grad)


def _named(theta: np.ndarray) -> dict[str, float]:
    a, b, e, alpha, beta = map(float, theta)
    return {"E": math.exp(e), "A": math.exp(min(a, 700.0)), "B": math.exp(min(b, 700.0)), "alpha": alpha, "beta": beta}


@dataclass(frozen=True)
class PowerLaw:
    """y = scale * x^exponent, and R^2 in logarithms."""

    scale: float
    exponent: float
    r2: float

    def at(self, x: Any) -> Any:
        return self.scale * np.asarray(x, float) ** self.exponent


def power_law(x: Sequence[float] | np.ndarray, y: Sequence[float] | np.ndarray) -> PowerLaw:
    """Least squares in logarithms.

    Raises:
        UserError: for fewer than 3 different x.
    """
    u, v = np.log(np.asarray(x, float)), np.log(np.asarray(y, float))
    if len(set(u)) < 3:
        raise UserError(f"a power law through {len(set(u))} different points says nothing: give 3 or more")
    slope, level = np.polyfit(u, v, 1)
    rest, spread = float(((v - level - slope * u) ** 2).sum()), float(((v - v.mean()) ** 2).sum())
    return PowerLaw(math.exp(level), float(slope), 1.0 - rest / spread if spread else math.nan)


@dataclass(frozen=True)
class Isoflop:
    """Minima of the parabolas, by compute, and the power law N_opt = scale * C^exponent through them."""

    flops: np.ndarray
    params: np.ndarray
    loss: np.ndarray
    curves: np.ndarray  # [budget, 3]: L = c0 log(N)^2 + c1 log(N) + c2
    law: PowerLaw | None  # None for fewer than 3 budgets with a minimum


def isoflop(points: Points, budgets: Sequence[float]) -> Isoflop:
    """A parabola in log N through the points of each budget (those within 5 % of its FLOPs).

    Raises:
        UserError: for no budget, or one with fewer than 3 sizes, or whose loss has no minimum among them.
    """
    if not budgets:
        raise UserError("no FLOPs that 3 sizes were trained for: train several sizes for the same 6 N D")
    found = []
    for budget in budgets:
        mine = points.where(np.abs(points.flops / budget - 1) < 0.05)
        if len(set(mine.params)) < 3:
            raise UserError(
                f"{budget:.3g} FLOPs: {len(set(mine.params))} sizes are too few for a parabola: give 3 or more"
            )
        curve = np.polyfit(np.log(mine.params), mine.loss, 2)
        if curve[0] <= 0:
            raise UserError(f"{budget:.3g} FLOPs: the loss has no minimum among the sizes: try smaller or larger ones")
        best = -curve[1] / (2 * curve[0])
        found.append((budget, math.exp(best), float(np.polyval(curve, best)), curve))
    flops, params, loss, curves = (np.array(column) for column in zip(*found, strict=True))
    return Isoflop(flops, params, loss, curves, power_law(flops, params) if len(found) >= 3 else None)


def critical_batch(small: float, big: float, small_square: float, big_square: float) -> float:
    """The simple noise scale tr(Sigma) / |G|^2 in rows, from the squared norms of mean gradients over two batch sizes.

    |G_b|^2 is on average |G|^2 + tr(Sigma) / b. `small_square` and `big_square` should be means over many batches.
    NaN where noise hides the gradient (the estimate of |G|^2 is not positive).
    """
    gradient = (big * big_square - small * small_square) / (big - small)
    noise = (small_square - big_square) / (1 / small - 1 / big)
    return noise / gradient if gradient > 0 else math.nan
