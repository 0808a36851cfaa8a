"""A study's grid: many small measurements, each kept as soon as it is made, so that a killed study goes on.

`sbatch --array=0-7` shares it out: each task makes every eighth cell and leaves; the same command without an array
then finds all of them made.
"""

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from dltrain import rundir
from dltrain.config import Settings, digest
from dltrain.progress import track

Cell = dict[str, Any]


def grid(
    cfg: Settings,
    cells: Sequence[Cell],
    measure: Callable[..., Mapping[str, Any]],
    env: Mapping[str, str] = os.environ,
) -> list[Cell]:
    """Every cell with what `measure(**cell)` says of it, in order. A task of an array exits once it has made its share.

    A cell lies in `cfg.out`/cells, named after all settings but `out` and after itself: other settings, other cells.

    Raises:
        UserError: for a cell's file that is torn.
    """
    folder = Path(cfg.out) / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    settings = rundir.plain(dataclasses.asdict(cfg) | {"out": ""})
    paths = [folder / f"{digest(settings | {'cell': rundir.plain(cell)})}.json" for cell in cells]
    task, first, tasks = (int(env.get(f"SLURM_ARRAY_TASK_{k}", n)) for k, n in (("ID", 0), ("MIN", 0), ("COUNT", 1)))
    missing = [
        (cell, path) for cell, path in list(zip(cells, paths, strict=True))[task - first :: tasks] if not path.exists()
    ]
    for cell, path in track(missing, "cells of the grid"):
        rundir.write_json(path, cell | dict(measure(**cell)))
    if tasks > 1:
        print(f"task {task - first + 1} of {tasks}: {len(missing)} cells made in {folder}", flush=True)
        raise SystemExit(0)
    return [rundir.read_json(path) for path in paths]
