"""The run directory: whole files or none, numbers that read back bit-equal, a patch that restores the source."""

import errno
import json
import math
import os
import subprocess
from pathlib import Path

import pytest

from dltrain import rundir
from dltrain.errors import UserError


def test_numbers_read_back_bit_equal():
    values = [0.1 + 0.2, 1e-310, -0.0, 6.02e23, math.pi, math.nan, math.inf, -math.inf]
    text = rundir.encode({"values": values})
    back = [float(x) for x in json.loads(text, parse_constant=pytest.fail)["values"]]
    assert [x.hex() for x in back] == [x.hex() for x in values]


def test_write_atomic_on_a_full_disk_keeps_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "state.json"
    rundir.write_json(path, {"step": 1})

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"state\.json: no space left .* nothing already saved was lost"):
        rundir.write_json(path, {"step": 2})
    assert rundir.read_json(path) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.json"]


def test_other_failures_of_a_write_are_not_renamed(tmp_path):
    with pytest.raises(FileNotFoundError):
        rundir.write_atomic(tmp_path / "absent" / "x", b"")


def test_read_json_names_a_torn_file(tmp_path):
    (tmp_path / "config.json").write_text('{"recipe": "be')
    with pytest.raises(UserError, match=r"config\.json: not whole JSON"):
        rundir.read_json(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"results\.json: no such file"):
        rundir.read_json(tmp_path / "results.json")


def test_rewind_drops_later_and_torn_rows(tmp_path):
    path = tmp_path / "metrics.jsonl"
    kept = b'{"step": 1, "loss": 0.30000000000000004}\n{"step": 2, "eval/loss": 1e-310}\n'
    path.write_bytes(kept + b'{"step": 3, "loss": 1.0}\n{"step": 2, "lo')
    assert rundir.rewind(path, 2) == 2
    assert path.read_bytes() == kept
    with path.open("ab") as held:  # by a launch that was superseded
        assert rundir.rewind(path, 2) == 0
        held.write(b"late")
    assert path.read_bytes() == kept
    assert rundir.rewind(path, 2, 1) == 1
    assert path.read_bytes() == kept.splitlines(keepends=True)[0]
    assert rundir.rewind(tmp_path / "absent.jsonl", 2) == 0


def test_read_rows_leaves_out_what_a_crash_tore(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'{"a": 1}\n\0\0\0\n[1]\n{"a": 2}\n{"a": 3}')
    assert rundir.read_rows(path) == [{"a": 1}, {"a": 2}]


def test_an_event_after_a_torn_one_is_whole(tmp_path):
    rundir.append_event(tmp_path, "save", step=10)
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"time": "20')
    rundir.append_event(tmp_path, "resume", step=10)
    assert [(e["kind"], e["step"]) for e in rundir.read_rows(tmp_path / "events.jsonl")] == [
        ("save", 10),
        ("resume", 10),
    ]


def test_describe_keeps_the_first_command_and_tells_what_changed(tmp_path):
    out = tmp_path / "runs" / "a"
    config = {"lr": 1e-4, "clip": math.inf, "shards": Path("x.tar"), "betas": (0.9, 0.999)}
    rundir.describe(out, recipe="bert_pretrain", config=config, command=["bert_pretrain.py", "--out", "a b"])
    rundir.describe(out, recipe="bert_pretrain", config=config | {"workers": 3}, command=["bert_pretrain.py"])
    assert (out / "command.txt").read_text() == "bert_pretrain.py --out 'a b'\n"
    written = rundir.read_json(out / "config.json")
    assert written["recipe"] == "bert_pretrain"
    assert written["config"] == {"lr": 1e-4, "clip": "Infinity", "shards": "x.tar", "betas": [0.9, 0.999], "workers": 3}
    first, second = rundir.read_rows(out / "events.jsonl")
    assert (first["kind"], second["kind"]) == ("start", "start")
    assert second["config"] == {"workers": [None, 3]}
    assert second["environment"] == {}
    assert second["command"] == "bert_pretrain.py"
    assert first["hash"] != second["hash"] == written["hash"]
    environment = rundir.read_json(out / "environment.json")
    assert environment["packages"]["torch"]
    assert environment["cores"] >= 1
    assert os.uname().nodename not in (out / "environment.json").read_text()


def test_the_patch_restores_the_source(tmp_path):
    tree, copy = tmp_path / "tree", tmp_path / "copy"
    tree.mkdir()
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]

    def git(*arguments: str, at: Path = tree) -> str:
        return subprocess.run(
            ["git", *identity, *arguments], cwd=at, check=True, capture_output=True, text=True
        ).stdout.strip()

    module = tree / "module.py"
    module.write_text("lr = 1\n")
    assert rundir._source(module) == (None, b"")  # not a work tree
    git("init", "-q")
    assert rundir._source(module) == (None, b"")  # a tree that does not track us, as a virtual environment's
    git("add", "module.py")
    git("commit", "-qm", "first")
    commit = git("rev-parse", "HEAD")
    assert rundir._source(module) == (commit, b"")
    git("clone", "-q", str(tree), str(copy), at=tmp_path)
    module.write_text("lr = 2\n")
    (tree / "recipe.py").write_text("new = True\n")
    found, patch = rundir._source(module)
    assert found == commit
    (tmp_path / "diff.patch").write_bytes(patch)
    git("apply", "../diff.patch", at=copy)
    assert (copy / "module.py").read_text() == "lr = 2\n"
    assert (copy / "recipe.py").read_text() == "new = True\n"


def test_require_space_gives_the_numbers(tmp_path):
    rundir.require_space(tmp_path / "not" / "yet", 1)
    with pytest.raises(UserError, match=r"not/yet: 1,048,576,000,000\.0 MiB are needed and [\d,.]+ MiB are free"):
        rundir.require_space(tmp_path / "not" / "yet", 10**6 * 2**40)
