"""The short form of `exactly_once.py`, and that it would see a fault."""

import json
import subprocess
import sys

import exactly_once
import pytest


def test_a_run_that_is_killed_again_and_again_reads_every_item_once(tmp_path):
    """As a command: with a fork server of its own, each launch is cheap."""
    found = tmp_path / "found.json"
    command = [sys.executable, exactly_once.__file__, "--kills", 6, "--steps", 20, "--seed", 1, "--json", found]
    subprocess.run(list(map(str, command)), check=True, timeout=250)
    counts = json.loads(found.read_text())
    assert counts["kills"] == 6 and counts["text items"] and counts["images items"] == 480, counts
    assert counts["launches that began at a checkpoint"] >= 1, counts


def ledger(folder, launch: int, rank: int, steps: dict[int, list]) -> None:
    (folder / "ledger").mkdir(exist_ok=True)
    lines = [json.dumps([step, entries]) for step, entries in steps.items()]
    (folder / "ledger" / f"{launch:04d}-{rank}.jsonl").write_text("\n".join(lines) + "\n[3, [[0, 0, [")


def entries(step: int, lanes: range) -> list:
    return [[lane, part, [step * 24 + lane * 2 + part], "digest"] for lane in lanes for part in range(2)]


def test_a_ledger_with_a_fault_is_refused(tmp_path):
    ledger(tmp_path, 0, 0, {0: entries(0, range(12)), 1: entries(1, range(6))})  # killed within step 1
    ledger(tmp_path, 1, 0, {1: entries(1, range(6)), 2: entries(2, range(6))})
    ledger(tmp_path, 1, 1, {1: entries(1, range(6, 12)), 2: entries(2, range(6, 12))})
    rows, again = exactly_once.taken(tmp_path)
    assert len(rows) == 72 and again == 1
    for wrong, words in (
        ({1: entries(2, range(6, 12)), 2: entries(2, range(6, 12))}, "step 1 of launch 0002 is another"),
        ({1: entries(1, range(6, 12))}, "parts of step 1"),  # half of the step is nowhere
        ({1: entries(1, range(12)) + entries(1, range(1))}, "parts of step 1"),
    ):
        ledger(tmp_path, 2, 0, wrong)
        with pytest.raises(AssertionError, match=words):
            exactly_once.taken(tmp_path)
