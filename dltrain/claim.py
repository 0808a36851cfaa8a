"""A paper's claim, measured: figures by seed beside the paper's, a verdict, and exit code 1 where it is not shown.

A recipe's `claim(cfg)` trains what is to be compared, each training under `cfg.out`, and ends in `judge`, which writes
claim.json: {"recipe", "about", "shown", "tuned_on", "figures": [{"name", "paper", "bound", "of", "values": {seed:
value}, "measured", "shown"}], "notes", "pictures", "environment"}.
"""

import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal

from dltrain import rundir
from dltrain.config import Settings, recipe_name
from dltrain.errors import UserError


@dataclass(frozen=True)
class Figure:
    """A number by seed beside the paper's, and the bound that shows the claim: `least` or `most`.

    Raises:
        UserError: without a value, or with a seed that has none.
    """

    name: str  # with its unit
    values: Mapping[int, float]  # by seed
    paper: str  # the paper's own figure, or its direction
    least: float | None = None
    most: float | None = None
    of: Literal["every seed", "median"] = "every seed"  # what must keep the bound

    def __post_init__(self) -> None:
        assert (self.least is None) != (self.most is None), f"{self.name}: one bound, least or most"
        if not self.values:
            raise UserError(f"{self.name}: no seed was run")

    @property
    def shown(self) -> bool:
        """Whether the bound is kept; NaN keeps none."""
        judged = [median(self.values.values())] if self.of == "median" else self.values.values()
        return all(v >= self.least if self.least is not None else v <= self.most for v in judged)  # type: ignore[operator]

    @property
    def bound(self) -> str:
        sign, value = (">=", self.least) if self.least is not None else ("<=", self.most)
        return f"{sign} {value:g}"

    @property
    def measured(self) -> str:
        """The median and, of several seeds, the least and the greatest value."""
        values = list(self.values.values())
        if any(math.isnan(v) for v in values):
            return "NaN"
        spread = f" ({min(values):.4g} to {max(values):.4g})" if len(values) > 1 else ""
        return f"{median(values):.4g}{spread}"


def judge(
    cfg: Settings,
    figures: Sequence[Figure],
    *,
    tuned_on: Sequence[int] = (),
    notes: Sequence[str] = (),
    pictures: Sequence[Path] = (),
) -> None:
    """Print the figures beside the paper's, write `cfg.out`/claim.json, exit with code 1 where the claim is not shown.

    `tuned_on`: the seeds that settings and bounds were chosen on. `pictures` lie below `cfg.out`.
    """
    out, shown = Path(cfg.out), all(figure.shown for figure in figures)
    about = (sys.modules[type(cfg).__module__].__doc__ or "").split("\n")[0]
    print(f"\n{about}")
    for f in figures:
        print(
            f"  {'shown    ' if f.shown else 'NOT shown'}  {f.name}: {f.measured}   must be {f.bound}   paper {f.paper}"
        )
    seeds = sorted({seed for figure in figures for seed in figure.values})
    print(f"seeds {', '.join(map(str, seeds))}; tuned on {', '.join(map(str, tuned_on)) or 'none'}")
    for line in [*notes, *(f"see {path}" for path in pictures)]:
        print(line)
    described = [
        {"name": f.name, "paper": f.paper, "bound": f.bound, "of": f.of, "values": f.values, "measured": f.measured}
        | {"shown": f.shown}
        for f in figures
    ]
    out.mkdir(parents=True, exist_ok=True)
    rundir.write_json(
        out / "claim.json",
        {
            "recipe": recipe_name(cfg), "about": about, "shown": shown, "tuned_on": list(tuned_on),
            "figures": described, "notes": list(notes),
            "pictures": [path.relative_to(out).as_posix() for path in pictures],
            "environment": rundir.environment()[0],
        },
    )  # fmt: skip
    print(f"{'The claim is shown' if shown else 'The claim is NOT shown'}: {out / 'claim.json'}", flush=True)
    if not shown:
        raise SystemExit(1)


def logged(out: Path | str, name: str) -> list[float]:
    """Every value that the run in `out` has logged under `name`, such as "loss" or "eval/loss", in order.

    Raises:
        UserError: where there is none.
    """
    path = Path(out) / "metrics.jsonl"
    values = [float(row[name]) for row in rundir.read_rows(path) if name in row]
    if not values:
        raise UserError(f"{path} has no {name!r}: was the run stopped, or is it logged under another name?")
    return values
