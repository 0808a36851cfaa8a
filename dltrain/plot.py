"""A picture of curves, for those who would rather look."""

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from dltrain import rundir


def curves(
    path: Path,
    panels: Mapping[str, Mapping[str, tuple[Sequence[float], Sequence[float]]]],
    *,
    x: str,
    log: Sequence[str] = (),
    mark: float | None = None,
) -> Path:
    """Write `path` (.png or .svg) and return it: a panel per entry, in it {label: (x values, y values)}.

    `x` names the common axis, logarithmic; the panels in `log` have a logarithmic y axis; `mark` is a dashed line at x.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure = Figure(figsize=(6 * len(panels), 4), layout="constrained")
    for axes, (title, lines) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        for label, (xs, ys) in lines.items():
            axes.plot(xs, ys, marker="o", markersize=3, linewidth=1.2, label=label)
        axes.set(title=title, xlabel=x, xscale="log", yscale="log" if title in log else "linear")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}".replace("e+", "e")))
        axes.xaxis.set_minor_formatter(NullFormatter())
        if mark is not None:
            axes.axvline(mark, color="0.5", linestyle="--", linewidth=1)
        axes.grid(alpha=0.25)
        axes.legend(frameon=False)
    image = io.BytesIO()
    figure.savefig(image, format=path.suffix.removeprefix("."), dpi=120)
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_atomic(path, image.getvalue())
    return path
