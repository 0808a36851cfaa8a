"""The short form of `dltrain chaos`, and that it would see a fault. With a process that forks the rest, each launch is
cheap: about two minutes in all."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import prey
import pytest

HERE = Path(__file__).resolve().parent


def chaos(tmp_path: Path, *arguments: object, **env: str) -> tuple[subprocess.CompletedProcess[str], dict]:
    """The command on the toy recipe; its summary."""
    found = tmp_path / "summary.json"
    command = [sys.executable, "-m", "dltrain", "chaos", *arguments, "--json", found, prey.__file__, "debug"]
    path = os.pathsep.join([str(HERE.parent), str(HERE), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TMPDIR": str(tmp_path), **env}
    done = subprocess.run(list(map(str, command)), env=env, capture_output=True, text=True, timeout=280, check=False)
    assert found.exists(), done.stderr
    return done, json.loads(found.read_text())


FAULTS = [
    "SIGKILL:one:backward:11", "SIGKILL:all:shard:2", "SIGKILL:launcher:update:9", "SIGKILL:one:before rename:2",
    "SIGKILL:all:after rename:2", "SIGKILL:one:prune:1", "SIGKILL:all:evaluation:3", "SIGKILL:one:flush:2",
    "SIGKILL:worker:update:9",
    "SIGTERM:launcher:forward:9", "SIGUSR1:one:evaluation:1", "SIGUSR2:one:stall:9", "SIGTERM:all:start:1",
    "SIGTERM:one:shard:1", "ENOSPC:one:shard:2", "EIO:one:flush:2", "EROFS:one:before rename:1", "quota:one:flush:1",
]  # fmt: skip


def test_faults_at_every_place_leave_no_trace(tmp_path):
    """Two processes under ddp; each run is harmed once and started again."""
    done, found = chaos(tmp_path, "--faults", ",".join(FAULTS))
    assert (done.returncode, found["failures"]) == (0, []), done.stderr
    counts = found["counts"]
    assert (counts["kills"], counts["preemptions"], counts["errors"]) == (9, 5, 4)  # all of them happened
    assert counts["preemptions that saved the current step"] == 5
    assert counts["runs identical after kills"] == 9


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed's CPU operator needs a C++ compiler")
@pytest.mark.compiler
def test_kills_drawn_from_a_seed(tmp_path):
    """ddp, fsdp and zero2, on numbers of processes that change from launch to launch."""
    done, found = chaos(tmp_path, "--kills", 6, "--seed", 3)
    assert (done.returncode, found["failures"]) == (0, []), done.stderr
    assert found["counts"]["runs identical after kills"] == 6
    assert any("zero2" in name for name in found["counts"])


def test_corruptions_are_seen_and_the_file_is_named(tmp_path):
    done, found = chaos(tmp_path, "--corruptions", 60)
    assert (done.returncode, found["found"]["corruptions"]["missed"]) == (0, []), done.stderr
    assert found["counts"]["corruptions detected"] == 60
    assert len(found["found"]["corruptions"]["tried"]) == 8


def test_a_run_whose_numbers_depend_on_the_process_is_seen(tmp_path):
    done, found = chaos(tmp_path, "--faults", "SIGKILL:all:backward:9", UNSTEADY="1")
    assert done.returncode == 1
    assert len(found["failures"]) == 1
    assert "metrics.jsonl: at step 1 lr is" in found["failures"][0]
