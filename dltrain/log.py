"""What a run says: rows in files, one line on the terminal, TensorBoard, W&B on request. The only importer of both.

metrics.jsonl has no clock in it, so a run killed and resumed writes the same bytes as one never killed; what depends
on the clock is in speed.jsonl. Keys: "loss", "lr", "grad_norm", ...; evaluation rows, on their own, "eval/loss", ...
"""

import os
import sys
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, TextIO

from dltrain import rundir
from dltrain.errors import UserError
from dltrain.meter import duration, human

Unit = Literal["rows", "tokens"]
Values = dict[str, float]


class NullLog:
    """The log of every process but the first: says nothing."""

    def metrics(self, step: int, values: Values) -> None: ...
    def speed(self, step: int, values: Values) -> None: ...
    def line(self, step: int, values: Values, speed: Values | None = None) -> None: ...
    def tick(self, step: int) -> None: ...
    def event(self, kind: str, **fields: Any) -> None: ...
    def flush(self) -> None: ...
    def close(self) -> None: ...

    rows = 0  # in metrics.jsonl


class Log(NullLog):
    """The log of the run in `out`, which exists. `resumed` is the restored step; None begins the run anew.

    Later rows, of steps that will run again, are dropped, and all after the first `rows`;
    so log a step's rows before the checkpoint of that step.
    `unit` is what the run counts: speed rows have `tokens_per_second` or `rows_per_second`. `wandb` names a project.

    Raises:
        UserError: where `wandb` is asked for and not installed, and from every method when the disk is full.
    """

    def __init__(
        self,
        out: Path,
        *,
        total_steps: int,
        unit: Unit = "tokens",
        tensorboard: bool = True,
        wandb: str = "",
        resumed: int | None = None,
        rows: int | None = None,
    ) -> None:
        self.out, self.total = out, total_steps
        self.unit: Unit = unit
        self._wandb = _wandb(out, wandb) if wandb else None
        first = 0 if resumed is None else resumed + 1
        for name in ("metrics.jsonl", "speed.jsonl"):
            rundir.rewind(out / name, first - 1, rows if name == "metrics.jsonl" else None)
        self.rows = len(rundir.read_rows(out / "metrics.jsonl"))
        self._metrics = (out / "metrics.jsonl").open("a", buffering=1, encoding="ascii")
        self._speed = (out / "speed.jsonl").open("a", buffering=1, encoding="ascii")
        self._tensorboard = _tensorboard(out, first) if tensorboard else None
        self._bar = _Bar(total_steps) if sys.stdout.isatty() else None

    def metrics(self, step: int, values: Values) -> None:
        """Append {"step": step, **values} to metrics.jsonl, and plot it. Values are numbers and read back bit-equal."""
        self._append(self._metrics, {"step": step, **values})
        self.rows += 1
        self._plot(step, values)

    def speed(self, step: int, values: Values) -> None:
        """The same for speed.jsonl, with the time (seconds since 1970): tokens_per_second, step_seconds, data_wait
        (fraction of the step), PHASE_seconds (`speed.PHASES`; they add up to the step), memory_gib, mfu, mfu_6n and hfu
        (fractions; `flops.Flops`; absent on unknown hardware), checkpoint_age_seconds, eta_seconds."""
        self._append(self._speed, {"step": step, **values, "time": round(time.time(), 3)})
        self._plot(step, {f"speed/{key}": value for key, value in values.items()})

    def line(self, step: int, values: Values, speed: Values | None = None) -> None:
        """Print one line: training values with their speed, or evaluation values alone."""
        parts = format_line(step, self.total, values, speed, self.unit)
        if self._bar:
            self._bar.print(parts)
            self._bar.move(step)
        else:
            print("".join(text for text, _ in parts).rstrip(), flush=True)

    def tick(self, step: int) -> None:
        """Move the progress bar, where there is one. Cheap: call it each step."""
        if self._bar:
            self._bar.move(step)

    def event(self, kind: str, **fields: Any) -> None:
        """Append what happened, and when, to events.jsonl; it is on disk on return."""
        rundir.append_event(self.out, kind, **fields)

    def flush(self) -> None:
        """Put all rows on disk; called before a checkpoint is published."""
        for file in (self._metrics, self._speed):
            with rundir.saving(Path(file.name)):
                file.flush()
                os.fsync(file.fileno())
        if self._tensorboard:
            self._tensorboard.flush()

    def close(self) -> None:
        if self._bar:
            self._bar.stop()
        self.flush()
        self._metrics.close()
        self._speed.close()
        if self._tensorboard:
            self._tensorboard.close()
        if self._wandb:
            self._wandb.finish()

    def _append(self, file: TextIO, row: dict[str, Any]) -> None:
        with rundir.saving(Path(file.name)):
            file.write(rundir.encode(row) + "\n")  # line-buffered: whole lines, but for a crash of the machine

    def _plot(self, step: int, values: Values) -> None:
        if self._tensorboard:
            for key, value in values.items():
                self._tensorboard.add_scalar(key, value, step)
        if self._wandb:
            self._wandb.log(values, step=step)


def _tensorboard(out: Path, first: int) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(out / "tensorboard"), purge_step=first)  # hides what a dead launch wrote from `first` on


def _wandb(out: Path, project: str) -> Any:
    try:
        import wandb  # type: ignore[import-not-found]
    except ImportError:
        raise UserError(f"--wandb {project} needs the wandb package: pip install wandb") from None
    name = out / "wandb_id.txt"  # so that the next launch goes on in the same W&B run
    if not name.exists():
        rundir.write_atomic(name, uuid.uuid4().hex.encode())
    return wandb.init(project=project, dir=str(out), name=out.name, id=name.read_text(), resume="allow")


def format_line(
    step: int, total: int, values: Values, speed: Values | None = None, unit: Unit = "tokens"
) -> list[tuple[str, str]]:
    """One line as (text, style) pairs, in columns that stay where they are: 120 wide for a run of a million steps."""
    head = (f"{step:>{len(str(total))}}/{total}", "bold")
    if any(key.startswith("eval/") for key in values):
        found = [f"{key.removeprefix('eval/')} {_digits(value, 5)}" for key, value in values.items()]
        return [head, ("  eval  " + "  ".join(found), "bold cyan")]
    known = values | (speed or {})
    late = "red" if known.get("data_wait", 0.0) > 0.1 else ""
    columns: list[tuple[str, str, int, Callable[[float], str], str]] = [
        ("loss", "loss", 7, lambda x: _digits(x, 5), "bold green"),
        ("lr", "lr", 7, lambda x: f"{x:.2e}".replace("e-0", "e-"), ""),
        ("grad", "grad_norm", 5, lambda x: _digits(x, 3), ""),
        ("tok/s" if unit == "tokens" else "row/s", f"{unit}_per_second", 5, human, "green"),
        ("mfu", "mfu", 3, lambda x: f"{x:.0%}", ""),
        ("GiB", "memory_gib", 4, lambda x: f"{x:.1f}" if x < 100 else f"{x:.0f}", ""),
        ("wait", "data_wait", 3, lambda x: f"{x:.0%}", late),
        ("eta", "eta_seconds", 6, duration, ""),
        ("ckpt", "checkpoint_age_seconds", 6, duration, ""),
    ]
    parts: list[tuple[str, str]] = [head]
    for label, key, width, form, style in columns:
        text = form(known[key]) if key in known else "n/a"
        parts += [(f"  {label} ", "dim"), (f"{text:>{width}}", style)]
    return parts


def _digits(x: float, n: int) -> str:
    """`n` significant digits, trailing zeros too, so that a column of them lines up."""
    return f"{x:#.{n}g}".rstrip(".")


class _Bar:
    """A progress bar at the bottom of the terminal, lines above it. It has no thread: it moves when told."""

    def __init__(self, total: int) -> None:
        import rich
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskProgressColumn, TimeElapsedColumn

        self.console, self.shown = rich.get_console(), 0.0
        columns = (BarColumn(), TaskProgressColumn(), MofNCompleteColumn(), TimeElapsedColumn())
        self.progress = Progress(*columns, console=self.console, transient=True, auto_refresh=False)
        self.task = self.progress.add_task("", total=total)

    def print(self, parts: list[tuple[str, str]]) -> None:
        from rich.text import Text

        self.console.print(Text.assemble(*parts), soft_wrap=True)

    def move(self, step: int) -> None:
        if time.monotonic() - self.shown > 0.1:
            self.shown = time.monotonic()
            self.progress.start()
            self.console.show_cursor()  # which a killed process would leave hidden
            self.progress.update(self.task, completed=step, refresh=True)

    def stop(self) -> None:
        self.progress.stop()
