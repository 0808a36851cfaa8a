"""What a run does about a bad step (`guard.py`): stop, skip, or go back to the newest checkpoint and past its data."""

import sys
from typing import TYPE_CHECKING, Any

from dltrain.errors import UserError
from dltrain.guard import Bad
from dltrain.skipped import Window

if TYPE_CHECKING:
    from dltrain.resume import Resumable
    from dltrain.run import Run


def look(run: "Resumable") -> Bad | None:
    """Learn how the step judged last was. One that is skipped is written down; one to go back from is returned.

    Raises:
        UserError: on all processes alike, where the run cannot go on.
    """
    try:
        bad = run.guard.look()
    except UserError as error:
        raise run.alike(error) from None
    if bad is None or not run.guard.skips(bad.step):
        return bad
    run.strategy.gate.take_back()
    run.skipped.steps[bad.step] = bad.why
    _tell(run, "skip", f"step {bad.step} is skipped: {bad.why}", step=bad.step, why=bad.why)
    run.share_damage(always=True)
    return None


def go_back(run: "Run", bad: Bad) -> None:
    """To the newest checkpoint, with its metrics; on from there past the data that led to the bad step."""
    run.settle()
    run.restore()
    if not run.restored or not run.loader:
        raise run.alike(UserError(f"{bad.why} at step {bad.step}, and there is nothing to go back to"))
    run.restored["rows"], run.unevaluated = None, False  # a missed evaluation of that step is in the log by now
    rows = run.loader.end(bad.step) - run.loader.start(run.step_done)
    run.skipped.windows.append(Window(run.step_done, rows, f"{bad.why} at step {bad.step}"))
    said = f"{bad.why} at step {bad.step}: back to step {run.step_done}, and past the {rows} rows read since"
    _tell(run, "rollback", said, step=bad.step, to=run.step_done, rows=rows, why=bad.why)
    run.loader.jumps = run.skipped.jumps()
    run.read_from_here()
    run.log.close()
    run.start_log()
    run.speed.begin(run.step_done)


def _tell(run: "Resumable", kind: str, said: str, **fields: Any) -> None:
    """On disk before the run goes on."""
    run.first(run.skipped.write)
    run.log.event(kind, **fields)
    if run.me.rank == 0:
        print(said, file=sys.stderr, flush=True)
