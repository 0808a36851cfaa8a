"""What a run left behind: steps whose update was not taken, windows of data that were not read again. In skipped.json.

The file is on disk before the run goes on, and holds for every later launch, so whoever resumes the run, or begins
another with this file in its directory, skips the same and has the same bits.
"""

from pathlib import Path
from typing import Any, NamedTuple

from dltrain import rundir


class Window(NamedTuple):
    """From `step` (counted from 0) on, data is read `rows` rows further on."""

    step: int
    rows: int
    why: str


class Skipped:
    """The record of the run in `out`; the first process writes it, all have it."""

    def __init__(self, out: Path, found: dict[str, Any]):
        """`found` is what `read` gave, on one process for all."""
        self.out = out
        self.steps: dict[int, str] = {int(step): why for step, why in found.get("steps", {}).items()}
        self.windows = [Window(*window) for window in found.get("windows", [])]

    def jumps(self) -> list[tuple[int, int]]:
        """As `data.loader.Loader` takes them."""
        return [(window.step, window.rows) for window in self.windows]

    def write(self) -> None:
        rundir.write_json(self.out / "skipped.json", {"steps": self.steps, "windows": self.windows})


def read(out: Path) -> dict[str, Any]:
    """The file's content, {} if there is none. UserError, naming the file, where it is torn."""
    return rundir.read_json(out / "skipped.json") if (out / "skipped.json").exists() else {}
