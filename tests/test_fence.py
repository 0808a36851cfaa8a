"""One run directory, one run: a second launch is refused while the first lives, and takes over where it does not."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
import worlds

from dltrain import fence
from dltrain.errors import UserError
from dltrain.fence import SUPERSEDED, Fence


def lease(out: Path) -> dict:
    return json.loads((out / "lease.json").read_text())


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(fence, "BEAT", 0.05)
    monkeypatch.setattr(fence, "SILENT", 0.5)


HOLD = """
import sys, time
from pathlib import Path
from dltrain import fence
fence.BEAT = 0.05
held = fence.Fence(Path(sys.argv[1]), sys.argv[2])
print("held", flush=True)
sys.stdin.readline()
held.check()
print("published", flush=True)
"""


def holder(out: Path, host: str = "") -> subprocess.Popen[str]:
    """Another process that holds the directory, as seen from `host`; it publishes something when told to go on."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(out), host], text=True, **pipes)  # type: ignore[call-overload]
    assert process.stdout and process.stdout.readline() == "held\n"
    return process


def test_given_back_it_is_free_and_the_token_grows(tmp_path):
    for token in (1, 2):
        held = Fence(tmp_path)
        assert held.token == token
        held.check()
        held.release()
        assert not lease(tmp_path)["held"]


def test_a_second_launch_is_told_who_holds_it(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(UserError, match=f"is held by process {process.pid} on .* since .*--out"):
        Fence(tmp_path)
    assert process.communicate("\n", timeout=20)[0] == "published\n"


def test_after_kill_9_it_is_free_at_once(tmp_path):
    process = holder(tmp_path)
    process.kill()
    process.communicate()
    held = Fence(tmp_path)
    assert held.token == 2
    held.release()


def test_another_hosts_run_that_beats_is_left_alone(tmp_path, quick, monkeypatch):
    process = holder(tmp_path, "elsewhere")
    monkeypatch.setattr(Fence, "_try_lock", lambda self: True)  # locks do not cross hosts everywhere
    with pytest.raises(UserError, match=f"process {process.pid} on elsewhere"):
        Fence(tmp_path)
    assert process.communicate("\n", timeout=20)[0] == "published\n"


@pytest.mark.parametrize("locks", [True, False])
def test_a_run_on_a_node_that_was_cut_off_publishes_nothing(tmp_path, quick, monkeypatch, locks):
    """It is silent, so the requeued run takes over; it comes back, finds the other's token and ends by itself."""
    process = holder(tmp_path, "elsewhere")
    if locks:
        monkeypatch.setattr(Fence, "_try_lock", lambda self: True)
    process.send_signal(19)  # SIGSTOP
    began = time.monotonic()
    held = Fence(tmp_path)
    assert 0.4 < time.monotonic() - began < 10
    assert held.token == 2
    process.send_signal(18)
    said, words = process.communicate("\n", timeout=20)
    assert (process.returncode, said) == (SUPERSEDED, "")
    assert (
        words == f"{tmp_path} was taken over by process {os.getpid()} on {held.host}: this launch publishes nothing "
        "more and ends\n"
    )
    held.check()
    held.release()


def test_a_second_run_is_refused_and_the_first_goes_on(tmp_path):
    process = holder(tmp_path)
    with pytest.raises(worlds.Died, match=f"is held by process {process.pid}"):
        worlds.launch(1, toy.train, toy.Config(out=str(tmp_path), steps=1, save_every=0))
    assert not (tmp_path / "config.json").exists()
    assert process.communicate("\n", timeout=20)[0] == "published\n"


def test_a_torn_lease_is_no_lease(tmp_path):
    (tmp_path / "lease.json").write_text('{"tok')
    held = Fence(tmp_path)
    assert held.token == 1
    held.release()
