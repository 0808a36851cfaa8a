"""A progress bar on anything that takes over two seconds; inside a run it stands above the run's own bar (log.py)."""

import sys
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def track(items: Iterable[T], what: str, total: float | None = None) -> Iterator[T]:
    """Yield `items`; after a second show a bar on a terminal, or a line every ten seconds where there is none.

    `total` counts items; by default `len(items)` where there is one.
    """
    if total is None and hasattr(items, "__len__"):
        total = len(items)  # type: ignore[arg-type]
    if sys.stdout.isatty():
        yield from _bar(items, what, total)
        return
    shown = time.monotonic() - 8.0  # the first line after two seconds
    for done, item in enumerate(items):
        yield item
        if time.monotonic() - shown > 10.0:
            shown = time.monotonic()
            print(f"{what}: {done + 1:,}" + (f" of {total:,.0f}" if total else ""), file=sys.stderr, flush=True)


def _bar(items: Iterable[T], what: str, total: float | None) -> Iterator[T]:
    import rich
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=rich.get_console(), transient=True) as bar:
        task = bar.add_task(what, total=total)
        for item in items:
            yield item
            bar.advance(task)
