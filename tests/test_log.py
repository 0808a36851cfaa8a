"""The log: the same bytes after a resume, a line that lines up, a full disk that is told in one line."""

import io
import math
import os
import sys
from types import SimpleNamespace

import pytest
import rich
from rich.console import Console

from dltrain import rundir
from dltrain.errors import UserError
from dltrain.log import Log, NullLog, format_line

TRAIN = {"loss": 10.432123, "lr": 1e-4, "grad_norm": 1.2345}
SPEED = {
    "tokens_per_second": 123456.0,
    "step_seconds": 0.5,
    "data_wait": 0.02,
    "memory_gib": 79.31,
    "mfu": 0.412,
    "checkpoint_age_seconds": 754.0,
    "eta_seconds": 45240.0,
}


def steps(log: Log, first: int, last: int) -> None:
    for step in range(first, last + 1):
        log.metrics(step, {"loss": math.exp(-step / 7), "lr": 1e-4 / step, "tokens": step * 4096})
        log.speed(step, SPEED)
        if step % 2 == 0:
            log.metrics(step, {"eval/loss": math.sqrt(step)})


def test_a_killed_and_resumed_log_has_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    log = Log(whole, total_steps=8, tensorboard=False)
    steps(log, 1, 8)
    log.close()

    log = Log(killed, total_steps=8, tensorboard=False)
    steps(log, 1, 5)
    log.flush()
    log._metrics.write('{"step": 6, "lo')
    log.close()
    log = Log(killed, total_steps=8, tensorboard=False, resumed=4)
    assert [row["step"] for row in rundir.read_rows(killed / "speed.jsonl")] == [1, 2, 3, 4]
    steps(log, 5, 8)
    log.close()

    assert (killed / "metrics.jsonl").read_bytes() == (whole / "metrics.jsonl").read_bytes()
    rows = rundir.read_rows(whole / "metrics.jsonl")
    assert [row["loss"] for row in rows if "loss" in row] == [math.exp(-step / 7) for step in range(1, 9)]
    assert all("time" in row for row in rundir.read_rows(whole / "speed.jsonl"))


def test_a_run_begun_anew_forgets_rows_without_a_checkpoint(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/loss": 1.0}\n{"step": 1, "loss": 1.0}\n')
    Log(tmp_path, total_steps=8, tensorboard=False).close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_rows_are_readable_while_the_run_goes_on(tmp_path):
    log = Log(tmp_path, total_steps=8, tensorboard=False)
    log.metrics(1, {"loss": math.nan})
    assert rundir.read_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "loss": "NaN"}]
    log.event("skip", step=1, why="loss is NaN")
    assert rundir.read_rows(tmp_path / "events.jsonl")[0]["why"] == "loss is NaN"
    log.close()


def test_a_full_disk_is_one_line(tmp_path):
    log = Log(tmp_path, total_steps=8, tensorboard=False)
    full = os.open("/dev/full", os.O_WRONLY)
    os.dup2(full, log._metrics.fileno())
    with pytest.raises(UserError, match=r"metrics\.jsonl: no space left"):
        log.metrics(1, {"loss": 1.0})
    os.dup2(log._speed.fileno(), log._metrics.fileno())  # space again: what was buffered goes there
    log.close()
    os.close(full)


def test_tensorboard_hides_what_a_dead_launch_wrote_after_the_checkpoint(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last, resumed, loss in ((1, 6, None, 1.0), (5, 8, 4, 2.0)):
        log = Log(tmp_path, total_steps=8, resumed=resumed)
        for step in range(first, last + 1):
            log.metrics(step, {"loss": loss})
        log.close()
    files = sorted((tmp_path / "tensorboard").iterdir(), key=lambda path: path.stat().st_mtime_ns)
    assert len(files) == 2
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(s, 1.0 if s < 5 else 2.0) for s in range(1, 9)]


def test_wandb_goes_on_in_the_same_run_and_is_told_how_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Log(tmp_path, total_steps=8, tensorboard=False, wandb="bert")
    asked, logged = [], []
    run = SimpleNamespace(log=lambda values, step: logged.append((step, values)), finish=lambda: None)
    fake = SimpleNamespace(init=lambda **kwargs: asked.append(kwargs) or run)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for resumed in (None, 1):
        log = Log(tmp_path, total_steps=8, tensorboard=False, wandb="bert", resumed=resumed)
        log.metrics(2, {"loss": 1.5})
        log.close()
    assert asked[0]["project"] == "bert"
    assert asked[0]["id"] == asked[1]["id"]
    assert logged == [(2, {"loss": 1.5})] * 2


def text(*arguments, **kwargs) -> str:
    return "".join(part for part, _ in format_line(*arguments, **kwargs))


def test_the_line_fits_and_stays_in_its_columns():
    full = text(123456, 1000000, TRAIN, SPEED)
    assert len(full) <= 120
    for shown in (
        " 123456/1000000",
        "loss  10.432",
        "lr 1.00e-4",
        "grad  1.23",
        "tok/s  123K",
        "mfu 41%",
        "GiB 79.3",
        "wait  2%",
    ):
        assert shown in full
    early = text(1, 1000000, TRAIN | {"loss": 0.5}, {"rows_per_second": 12.0}, unit="rows")
    assert len(early) == len(full)
    assert [i for i, c in enumerate(early) if early[i:].startswith("  lr ")] == [full.index("  lr ")]
    assert "mfu n/a" in early
    assert "row/s" in early


def test_evaluation_has_a_line_of_its_own():
    line = text(500, 1000, {"eval/loss": 5.91234, "eval/accuracy": 0.1834})
    assert line == " 500/1000  eval  loss 5.9123  accuracy 0.18340"


def test_lines_are_plain_where_there_is_no_terminal(tmp_path, capsys):
    log = Log(tmp_path, total_steps=8, tensorboard=False)
    log.tick(1)
    log.line(1, TRAIN, SPEED)
    log.close()
    out = capsys.readouterr().out
    assert out.startswith("1/8  loss  10.432")
    assert out.count("\n") == 1
    assert "\x1b" not in out


def test_a_terminal_has_a_bar_below_coloured_lines(tmp_path, monkeypatch):
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=120, color_system="standard")
    monkeypatch.setattr(rich, "get_console", lambda: console)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    log = Log(tmp_path, total_steps=8, tensorboard=False)
    log.tick(1)
    log.line(2, TRAIN, SPEED)
    log.close()
    shown = screen.getvalue()
    assert "1/8" in shown
    assert "\x1b[1;32m 10.432" in shown


def test_other_processes_say_nothing(capsys):
    log = NullLog()
    log.metrics(1, TRAIN)
    log.line(1, TRAIN, SPEED)
    log.event("save", step=1)
    log.close()
    assert capsys.readouterr().out == ""
