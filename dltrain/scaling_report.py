"""Runs of a scaling study, fitted, told and drawn: fits.json and two pictures."""

import math
from pathlib import Path
from typing import Any

import numpy as np

from dltrain import rundir
from dltrain.errors import UserError
from dltrain.plot import curves
from dltrain.scaling import Parametric, Points, PowerLaw, frontier, isoflop, parametric, power_law, shared_budgets

PLOTS = ("isoflop.png", "compute.png")


def fitted(points: Points, out: Path, beyond: tuple[float, float] | None = None) -> dict[str, Any]:
    """Every law that the points allow, printed, drawn in `out` and written to `out`/fits.json; that file's content.

    `beyond`: parameters and tokens of a run whose loss is to be predicted (nats): "predicted" by L(N, D), and
    "predicted_least" by the power law, for a run that is the best of its compute.

    Raises:
        UserError: for too few points for the parametric fit or the power law.
    """
    law, best = parametric(points), frontier(points)
    by_compute, off = power_law(best.flops, best.loss), np.abs(law.loss(points.params, points.tokens) / points.loss - 1)
    found: dict[str, Any] = vars(law) | {"exponent": law.exponent, "furthest": off.max(), "runs": len(points)}
    found["by_compute"] = vars(by_compute)
    print(f"\nL(N, D) = E + A / N^alpha + B / D^beta of {len(points)} runs, at most {off.max():.2%} off, and 90 %:")
    for name, (low, high) in law.intervals.items():
        print(f"  {name:>5} {found[name]:10.4g}   {low:.4g} to {high:.4g}")
    print(
        f"least loss ~ C^{by_compute.exponent:.4f} (R^2 {by_compute.r2:.4f}); best N ~ C^{law.exponent:.3f} by L(N, D)"
    )
    budgets = shared_budgets(points)
    try:
        minima = isoflop(points, budgets)
        found["isoflop"] = {k: v.tolist() for k, v in vars(minima).items() if k != "law"}
        found["isoflop"]["law"] = vars(minima.law) if minima.law else None
        print(f"best N ~ C^{minima.law.exponent:.3f} by parabolas" if minima.law else "too few budgets for parabolas")
    except UserError as error:
        print(f"no parabolas: {error}")
    if beyond:
        found["predicted"], found["predicted_least"] = (
            float(law.loss(*beyond)),
            float(by_compute.at(6 * math.prod(beyond))),
        )
        said = f"{found['predicted']:.4f} nats by L(N, D), {found['predicted_least']:.4f} by the power law"
        print(f"{beyond[0]:,.0f} parameters, {beyond[1]:,.0f} tokens: predicted {said}")
    out.mkdir(parents=True, exist_ok=True)
    _draw(points, best, law, by_compute, budgets, out)
    rundir.write_json(out / "fits.json", rundir.plain(found))
    return found


def _draw(points: Points, best: Points, law: Parametric, by_compute: PowerLaw, budgets: list[float], out: Path) -> None:
    """Loss by parameters, a line for each budget, as measured and as L(N, D) has it; least loss by compute."""
    some = {f"{c:.2g} FLOPs": points.where(np.abs(points.flops / c - 1) < 0.05) for c in budgets} or {"runs": points}
    some = {label: runs.where(np.argsort(runs.params)) for label, runs in some.items()}
    panels = {
        "loss (nats)": {label: _line(runs.params, runs.loss) for label, runs in some.items()},
        "E + A / N^alpha + B / D^beta": {
            label: _line(runs.params, law.loss(runs.params, runs.tokens)) for label, runs in some.items()
        },
    }
    curves(out / PLOTS[0], panels, x="parameters")
    title, said = "least loss (nats)", f"C^{by_compute.exponent:.4f}"
    lines = {"runs": _line(best.flops, best.loss), said: _line(best.flops, by_compute.at(best.flops))}
    curves(out / PLOTS[1], {title: lines}, x="FLOPs", log=[title])


def _line(x: np.ndarray, y: np.ndarray) -> tuple[list[float], list[float]]:
    return x.tolist(), y.tolist()
