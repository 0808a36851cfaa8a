"""A grid's failing cell does not stop the others, and is tried again."""

from dataclasses import dataclass

import pytest

from dltrain.config import Settings
from dltrain.errors import UserError
from dltrain.grid import grid, table

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


def test_a_table_has_numbers_and_words_in_columns():
    cells = [{"width": 8, "loss": 1 / 3, "curve": [1, 2]}, {"width": 128, "loss": 2e-7, "note": "best"}]
    assert table(cells) == "width     loss  note\n    8  0.33333      \n  128    2e-07  best"
