"""Runs that are slow and well are left alone, and one that was stopped may go on. All at once: 40 s."""

import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import slow_run
import worlds
from faults import FAULTS, train

from dltrain.rundir import read_rows


def left_alone(name: str, out: Path) -> list[str]:
    """The events of a run in which rank 0 is slow in one way, for 10 to 20 s a step."""
    worlds.launch(2, slow_run.train, out, 5, 0, 20, (name,), 1)
    return [event["kind"] for event in read_rows(out / "events.jsonl")]


def stopped_and_woken(out: Path) -> tuple[str, list[str], list[str]]:
    """Rank 1 stops itself, and is woken once the hang is named."""
    out.mkdir()
    _, processes = worlds.start(2, train, out, "rank 1 stopped", 60, 40)
    until = time.time() + 30
    while time.time() < until and not (out / "stderr").exists():
        time.sleep(0.1)
    while time.time() < until and "hangs:" not in (out / "stderr").read_text():
        time.sleep(0.1)
    there = sorted(os.listdir(out / "hang"))
    os.kill(processes[1].pid, signal.SIGCONT)  # type: ignore[arg-type]
    for process in processes:
        process.join(30)
    codes = [str(process.exitcode) for process in processes]
    return (out / "stderr").read_text(), [event["kind"] for event in read_rows(out / "events.jsonl")], codes + there


SLOW = ["compute", "hold the GIL", "compile", "doze"]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("slow")
    with ThreadPoolExecutor(len(SLOW) + 1) as pool:
        woken = pool.submit(stopped_and_woken, folder / "woken")
        alone = list(pool.map(lambda name: left_alone(name, folder / name.replace(" ", "-")), SLOW))
        return {"woken": woken.result()} | dict(zip(SLOW, alone, strict=True))


@pytest.mark.parametrize("name", SLOW)
def test_a_slow_rank_is_left_alone(name, outcomes):
    assert outcomes[name] == ["start"]


def test_a_rank_that_wakes_up(outcomes):
    text, events, rest = outcomes["woken"]
    assert re.search("rank 1 hangs: is stopped by a signal", text)
    assert re.search("the run moves again, [0-9]+ s after the hang was named", text)
    assert events[:3] == ["start", "hang", "hang_over"]
    assert rest[:2] == ["0", "0"] and "verdict.json" in rest


def test_the_faults_are_twelve():
    assert len([fault for fault in FAULTS.values() if fault.world > 1]) == 12
