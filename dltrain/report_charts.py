"""Metrics as the report's charts, and a logged value as its words. The only importer of matplotlib but plot.py."""

import io
import math
import re
from html import escape
from typing import Any

from dltrain.meter import human

_COUNTERS = {"step", "time", "epoch", "tokens", "rows", "samples"}  # straight lines: not worth a chart
_FIRST = ["loss", "lr", "grad_norm"]  # the charts that everyone looks for, in this order
_NAMES = {"lr": "learning rate", "grad_norm": "gradient norm", "mfu": "MFU", "memory_gib": "memory (GiB)"}
Row = dict[str, Any]
Curve = tuple[list[float], list[float]]  # steps, values


def charts(metrics: list[Row], speed: list[Row]) -> str:
    """One chart per metric, training and evaluations together: `loss`, `eval/loss` and `eval/wiki/loss` share one."""
    charts: dict[str, dict[str, Curve]] = {}
    for row in metrics:
        for key in row.keys() - _COUNTERS:
            where, _, name = key.rpartition("/")
            steps, values = charts.setdefault(name, {}).setdefault(where or "train", ([], []))
            steps.append(row["step"])
            values.append(number(row[key]))
    for row in speed:
        for key in row:
            if is_rate(key):
                steps, values = charts.setdefault(key, {}).setdefault("train", ([], []))
                steps.append(row["step"])
                values.append(number(row[key]))
    order = sorted(charts, key=lambda name: (_FIRST.index(name) if name in _FIRST else len(_FIRST), name))
    return f"<div class=charts>{''.join(_chart(name, charts[name]) for name in order)}</div>" if charts else ""


def _chart(name: str, curves: dict[str, Curve]) -> str:
    legend = []
    ordered = sorted(curves, key=lambda where: (where != "train", where))
    for i, where in enumerate(ordered):
        values = curves[where][1]
        bad = sum(not math.isfinite(value) for value in values)
        text = (f"{where} " if len(curves) > 1 else "") + value_of(name, values[-1])
        text += f" ({bad} not finite)" if bad else ""
        legend.append(f"<span><i style='background:var(--c{i % 4})'></i>{escape(text)}</span>")
    caption = f"<figcaption><b>{escape(label(name))}</b>{''.join(legend)}</figcaption>"
    return f"<figure>{caption}{_svg(name, [curves[where] for where in ordered])}</figure>"


def _svg(name: str, curves: list[Curve]) -> str:
    """Lines and ticks alone, in the page's own colours and font, so that one drawing serves both themes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, MaxNLocator

    ink, grid, *colours = [f"#01010{i}" for i in range(6)]  # stand for the page's variables
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 8.5, "axes.formatter.useoffset": False}
    ):
        figure = Figure(figsize=(4.8, 2.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for i, curve in enumerate(curves):
            steps, low, mean, high = _thin(curve)
            axes.fill_between(steps, low, high, color=colours[i % 4], alpha=0.25, linewidth=0)
            marker = "o" if len(steps) < 30 else None
            axes.plot(steps, mean, color=colours[i % 4], linewidth=1.4, marker=marker, markersize=2.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(grid)
        finite = [y for _, values in curves for y in values if math.isfinite(y)] or [0.0]
        if max(finite) > 50 * min(finite) > 0 and name != "lr":
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        if is_rate(name):
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(FuncFormatter(lambda y, _: _tick(y)))
        axes.set_xlabel("steps", color=ink, loc="right")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: _tick(x)))
        axes.tick_params(which="both", colors=ink, length=0)
        axes.grid(axis="y", color=grid, linewidth=0.6)
        text = io.StringIO()
        figure.savefig(text, format="svg", transparent=True)
    svg = re.sub(r"(?s)^.*?(?=<svg)|<metadata>.*?</metadata>|<!--.*?-->", "", text.getvalue())
    svg = re.sub(r'<g id="[^"]*"', "<g", svg)  # figure_1, axes_1, ...: the same in every chart
    svg = re.sub(r' width="[\d.]+pt" height="[\d.]+pt"| xmlns(:xlink)?="[^"]*"', "", svg)
    svg = re.sub(r' d="[^"]*"', lambda path: re.sub(r"(\.\d\d)\d+", r"\1", path[0]), svg)  # hundredths of a point do
    for stand_in, variable in zip([ink, grid, *colours], ("dim", "rule", "c0", "c1", "c2", "c3")):
        svg = svg.replace(stand_in, f"var(--{variable})")
    return re.sub(r"\s*\n\s*", "\n", svg).replace("<svg", f'<svg role="img" aria-label="{escape(label(name))}"', 1)


def _tick(x: float) -> str:
    """1200 -> 1.2K, 50000 -> 50K."""
    return re.sub(r"\.?0+(?=[A-Z]$)", "", human(x)) if "." in human(x) else human(x)


def _thin(curve: Curve, most: int = 400) -> tuple[list[float], list[float], list[float], list[float]]:
    """Steps, minimum, mean and maximum of at most `most` groups of neighbours: no spike is lost."""
    steps, values = curve
    size = -(-len(steps) // most)
    starts = range(0, len(steps), size)
    groups = [[y for y in values[i : i + size] if math.isfinite(y)] or [math.nan] for i in starts]
    means = [sum(group) / len(group) for group in groups]
    return [steps[min(i + size, len(steps)) - 1] for i in starts], [*map(min, groups)], means, [*map(max, groups)]


def number(value: Any) -> float:
    """A logged number, or NaN for what is none."""
    try:
        return float(value)
    except (TypeError, ValueError):
        return math.nan


def show(value: Any) -> str:
    """Any JSON value as escaped text."""
    if isinstance(value, dict):
        return "; ".join(f"{escape(str(key))} {show(item)}" for key, item in value.items())
    if isinstance(value, list):
        return ", ".join(map(show, value)) or "n/a"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "n/a" if value is None else escape(str(value)) or "none"
    return f"{value:,}" if isinstance(value, int) else f"{value:.5g}"


def value_of(key: str, value: Any) -> str:
    """A logged value in the form that its kind is read in."""
    known = number(value)
    if not math.isfinite(known):
        return show(value)
    if key == "lr":
        return f"{known:.2e}".replace("e-0", "e-") if known else "0"
    if key == "mfu":
        return f"{known:.1%}"
    return human(known) if is_rate(key) or abs(known) >= 1e6 else show(value)


def label(key: str) -> str:
    *where, name = key.split("/")
    return " ".join([*where, _NAMES.get(name, name.replace("_per_second", "/s").replace("_", " "))])


def is_rate(key: str) -> bool:
    return key.endswith("_per_second")
