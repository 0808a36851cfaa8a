"""Does anything show? A run that was harmed, beside one that was not."""

from pathlib import Path
from typing import Any

from dltrain import checkpoint
from dltrain.chaos.runner import Ended
from dltrain.prove import prove

Rows = dict[tuple[int, int, int], str]  # (step, lane, part) -> digest of the micro-batch


def rows_of(notes: list[list[Any]]) -> Rows:
    """What the steps of a launch read. A step, lane and part that was read as something else the second time is
    marked."""
    found: Rows = {}
    for note in notes:
        if note[0] == "rows":
            for lane, part, digest in note[2]:
                at = (note[1], lane, part)
                found[at] = digest if found.get(at, digest) == digest else "two things"
    return found


def done_of(notes: list[list[Any]]) -> int:
    """The last step that a launch has done, 0 for none."""
    return max((note[1] for note in notes if note[0] == "done"), default=0)


def saved(out: Path) -> int:
    """The step of the newest whole checkpoint, 0 for none."""
    found = checkpoint.newest(out / "checkpoints", lambda path, why: None)
    return found[1]["step"] if found else 0


def differs(calm: Path, calm_rows: Rows, out: Path, launches: list[Ended]) -> str:
    """The first difference in words, empty if there is none: metrics, data, weights, optimizer, ledger of samples."""
    same, words = prove(calm, out)
    if not same:
        return words
    if (calm / "metrics.jsonl").read_bytes() != (out / "metrics.jsonl").read_bytes():
        return "metrics.jsonl has the same rows and other bytes"
    seen: set[tuple[int, int, int]] = set()
    for number, launch in enumerate(launches):
        for at, digest in rows_of(launch.notes).items():
            if calm_rows.get(at) != digest:
                return f"launch {number} read something else at step {at[0]}, lane {at[1]}, part {at[2]}"
            seen.add(at)
    if missing := calm_rows.keys() - seen:
        return f"no launch has read step {min(missing)[0]}"
    return ""


def lost(launches: list[Ended]) -> int:
    """The most steps that a launch had done and another did again."""
    most = reached = 0
    for launch in launches:
        if begun := [note[1] for note in launch.notes if note[0] == "rows"]:
            most = max(most, reached - min(begun))
            reached = max(min(begun), done_of(launch.notes))
    return most
