"""A study's grid: many small measurements, each kept as soon as it is made, so that a killed study goes on.

`sbatch --array=0-7` shares it out: each task makes every eighth cell and leaves; the same command without an array
then finds all of them made, makes again those that failed, and goes on to the study's plot. DLTRAIN_JOBS=2 does the
same on one machine, with two processes, and does not change a bit of any cell.
"""

import dataclasses
import os
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dltrain import rundir
from dltrain.config import Settings, digest
from dltrain.errors import UserError
from dltrain.progress import track
from dltrain.signals import STOPPED, Signals, Stop, end_with_launcher

Cell = dict[str, Any]


def grid(
    cfg: Settings,
    cells: Sequence[Cell],
    measure: Callable[..., Mapping[str, Any]],
    env: Mapping[str, str] = os.environ,
) -> list[Cell]:
    """Every cell with what `measure(**cell)` says of it, in order. A task of an array exits once it has made its share.

    A cell lies in `cfg.out`/cells, named after all settings but `out` and after itself: other settings, other cells.

    A cell that fails leaves its traceback beside the others, which are made all the same.

    Raises:
        UserError: for a cell's file that is torn; for cells that failed, after the others' table.
    """
    folder = Path(cfg.out) / "cells"
    folder.mkdir(parents=True, exist_ok=True)
    settings = rundir.plain(dataclasses.asdict(cfg) | {"out": ""})
    paths = [folder / f"{digest(settings | {'cell': rundir.plain(cell)})}.json" for cell in cells]
    task, first, tasks = (int(env.get(f"SLURM_ARRAY_TASK_{k}", n)) for k, n in (("ID", 0), ("MIN", 0), ("COUNT", 1)))
    jobs = min(_jobs(env), sum(not path.exists() for path in paths))
    if jobs > 1 and tasks == 1:
        _share_out(jobs, paths)
    mine = list(zip(cells, paths, strict=True))[task - first :: tasks]
    missing, failed = [(cell, path) for cell, path in mine if not path.exists()], []
    for cell, path in track(missing, "cells of the grid"):
        failure = path.with_suffix(".failed")
        try:
            rundir.write_json(path, cell | dict(measure(**cell)))
            failure.unlink(missing_ok=True)
        except Exception as error:  # one cell is not the study; a signal's SystemExit is no cell's failure
            failure.write_text(traceback.format_exc())
            failed.append(f"{_words(cell)}: {type(error).__name__}: {error} (see {failure})")
            print(f"failed: {failed[-1]}", file=sys.stderr, flush=True)
    if tasks > 1:
        made = f"{len(missing) - len(failed)} cells made in {folder}" + f", {len(failed)} failed" * bool(failed)
        print(f"task {task - first + 1} of {tasks}: {made}", flush=True)
        raise SystemExit(1 if failed else 0)
    if failed:
        print(table([rundir.read_json(path) for path in paths if path.exists()]), flush=True)
        said = "; ".join(failed)
        raise UserError(f"{len(failed)} of {len(cells)} cells failed; the others are kept and not made again: {said}")
    return [rundir.read_json(path) for path in paths]


def _jobs(env: Mapping[str, str]) -> int:
    asked = env.get("DLTRAIN_JOBS", "1")
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"DLTRAIN_JOBS is {asked!r}: give the number of processes that share the grid out, 1 or more")
    return int(asked)


def _share_out(jobs: int, paths: Sequence[Path]) -> None:
    """Start this very command as the tasks of an array, and wait. What they print is in task-N.log beside the cells."""
    tasks: list[subprocess.Popen[bytes]] = []
    asked = Signals(say=False)
    try:
        for i in range(jobs):
            share = {"SLURM_ARRAY_TASK_ID": str(i), "SLURM_ARRAY_TASK_MIN": "0", "SLURM_ARRAY_TASK_COUNT": str(jobs)}
            with (paths[0].parent / f"task-{i}.log").open("ab") as log:
                tasks.append(
                    subprocess.Popen(
                        sys.orig_argv, env=os.environ | share, stdout=log, stderr=log, preexec_fn=end_with_launcher
                    )
                )
        with asked.waiting():
            for _ in track(_as_made(paths, tasks), f"cells of the grid, {jobs} at a time", total=len(paths)):
                pass
    except Stop:
        print(f"stopped by {asked.name}; the same command goes on", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED) from None
    finally:
        for task in tasks:
            task.terminate()
        for task in tasks:
            task.wait()
        asked.restore()


def _as_made(paths: Sequence[Path], tasks: Sequence[subprocess.Popen[bytes]]) -> Iterator[Path]:
    """Each path once it exists, until no task is at work."""
    waiting, working = list(paths), True
    while working:
        working = any(task.poll() is None for task in tasks)
        for path in [path for path in waiting if path.exists()]:
            waiting.remove(path)
            yield path
        time.sleep(0.2 if working else 0.0)


def table(cells: Sequence[Cell]) -> str:
    """The cells' numbers and words in columns, one line a cell; lists and the like are left out."""
    names = dict.fromkeys(k for cell in cells for k, v in cell.items() if isinstance(v, bool | int | float | str))
    text = [[*names], *([_short(cell.get(k, "")) for k in names] for cell in cells)]
    widths = [max(len(row[i]) for row in text) for i in range(len(names))]
    return "\n".join("  ".join(f"{word:>{w}}" for word, w in zip(row, widths, strict=True)) for row in text)


def _short(value: Any) -> str:
    return f"{value:.5g}" if isinstance(value, float) else str(value)


def _words(cell: Cell) -> str:
    return " ".join(f"{k}={_short(v)}" for k, v in cell.items())
