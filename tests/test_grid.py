"""A grid's failing cell does not stop the others, and is tried again."""

import os
import subprocess
import sys
import time
from dataclasses import dataclass

import pytest

from dltrain.config import Settings
from dltrain.errors import UserError
from dltrain.grid import grid, table
from dltrain.signals import STOPPED

CELLS = [{"x": x} for x in range(4)]


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    n: int = 4


class Square:
    """Fails at x = 2 until it is mended."""

    def __init__(self) -> None:
        self.calls: list[int] = []
        self.broken = True

    def __call__(self, x: int) -> dict:
        self.calls.append(x)
        if x == 2 and self.broken:
            raise ValueError("no square")
        return {"square": x * x}


def test_the_others_are_made_and_shown_and_the_failed_one_is_tried_again(tmp_path, capsys):
    cfg, square = Config(out=str(tmp_path)), Square()
    with pytest.raises(UserError, match=r"1 of 4 cells failed; .*: x=2: ValueError: no square \(see .*\.failed\)"):
        grid(cfg, CELLS, square, env={})
    assert capsys.readouterr().out.split() == ["x", "square", "0", "0", "1", "1", "3", "9"]
    (left,) = (tmp_path / "cells").glob("*.failed")
    assert "raise ValueError" in left.read_text()
    square.broken = False
    assert [cell["square"] for cell in grid(cfg, CELLS, square, env={})] == [0, 1, 4, 9]
    assert square.calls == [0, 1, 2, 3, 2]
    assert not left.exists()


def test_a_task_of_an_array_that_failed_says_so_by_its_exit_code(tmp_path):
    cfg, square = Config(out=str(tmp_path)), Square()
    env = {"SLURM_ARRAY_TASK_COUNT": "2", "SLURM_ARRAY_TASK_MIN": "0"}
    for task, code in (("0", 1), ("1", 0)):
        with pytest.raises(SystemExit) as left:
            grid(cfg, CELLS, square, env=env | {"SLURM_ARRAY_TASK_ID": task})
        assert left.value.code == code
    assert square.calls == [0, 2, 1, 3]


def test_a_signal_is_no_failure_of_the_cell(tmp_path):
    def preempted(x: int) -> dict:
        raise SystemExit(75)

    with pytest.raises(SystemExit, match="75"):
        grid(Config(out=str(tmp_path)), CELLS, preempted, env={})
    assert list((tmp_path / "cells").iterdir()) == []


STUDY = """
import sys, time
from pathlib import Path
from dltrain.config import Settings
from dltrain.grid import grid

def measure(x):
    time.sleep(0.05)
    if x == 2 and not Path("mended").exists():
        raise ValueError("no square")
    if x == 3 and Path("slow").exists():
        time.sleep(60)
    return {"square": x * x}

print([cell["square"] for cell in grid(Settings(out="out"), [{"x": x} for x in range(6)], measure)])
"""


def study(folder, jobs, **more):
    (folder / "study.py").write_text(STUDY)
    command = [sys.executable, "study.py"]
    return subprocess.Popen(
        command, cwd=folder, env=os.environ | {"DLTRAIN_JOBS": jobs}, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, **more,
    )  # fmt: skip


def test_two_processes_share_a_grid_out_on_one_machine(tmp_path):
    failed = study(tmp_path, "2")
    out, err = failed.communicate(timeout=60)
    assert failed.returncode == 1 and "1 of 6 cells failed; " in err and "no square" in err, (out, err)
    cells = tmp_path / "out" / "cells"
    logs = [(cells / f"task-{i}.log").read_text() for i in range(2)]
    assert "2 cells made" in logs[0] and "1 failed" in logs[0] and "3 cells made" in logs[1]
    (tmp_path / "mended").touch()
    whole = study(tmp_path, "2")
    assert whole.communicate(timeout=60)[0] == "[0, 1, 4, 9, 16, 25]\n" and whole.returncode == 0
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "mended").touch()
    study(alone, "1").communicate(timeout=60)
    bytes_of = [{p.name: p.read_bytes() for p in folder.glob("*.json")} for folder in (cells, alone / "out/cells")]
    assert bytes_of[0] == bytes_of[1] and len(bytes_of[0]) == 6


def test_a_signal_ends_those_that_share_a_grid_out(tmp_path):
    for name in ("slow", "mended"):
        (tmp_path / name).touch()
    running = study(tmp_path, "2")
    cells = tmp_path / "out" / "cells"
    until = time.monotonic() + 60
    while len(list(cells.glob("*.json"))) < 4 and time.monotonic() < until:  # 0, 2, 4 and 1: task 1 is at 3
        time.sleep(0.05)
    running.terminate()
    _, err = running.communicate(timeout=30)  # nobody holds the pipe
    assert running.returncode == STOPPED and "stopped by SIGTERM; the same command goes on" in err
    (tmp_path / "slow").unlink()
    again = study(tmp_path, "2")
    assert again.communicate(timeout=60)[0] == "[0, 1, 4, 9, 16, 25]\n"


def test_a_number_of_processes_that_is_none(tmp_path):
    for jobs in ("0", "two", "-1", ""):
        with pytest.raises(UserError, match=f"DLTRAIN_JOBS is {jobs!r}"):
            grid(Config(out=str(tmp_path)), CELLS, Square(), env={"DLTRAIN_JOBS": jobs})


def test_a_table_has_numbers_and_words_in_columns():
    cells = [{"width": 8, "loss": 1 / 3, "curve": [1, 2]}, {"width": 128, "loss": 2e-7, "note": "best"}]
    assert table(cells) == "width     loss  note\n    8  0.33333      \n  128    2e-07  best"
