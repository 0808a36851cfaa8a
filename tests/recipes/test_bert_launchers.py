"""One command under every launcher, stopped or not: the same bytes of metrics.jsonl."""

import functools
import json
import os
import resource
import signal
import socket
import subprocess
import time
from pathlib import Path

import commands
import pytest
from worlds import free_port

SHORT = ("debug", "--lanes", 2, "--steps", 4, "--save-every", 2, "--eval-every", 2)
# Long enough to be stopped on the way.
LONG = ("debug", "--lanes", 2, "--steps", 60, "--save-every", 20, "--eval-every", 0, "--dropout", 0.1)


def metrics(out: Path) -> bytes:
    return (out / "metrics.jsonl").read_bytes()


def world_of(out: Path) -> int:
    """How many processes wrote the last checkpoint."""
    newest = max((out / "checkpoints").glob("step-*"))
    return json.loads((newest / "state.json").read_bytes())["written_by"]["world"]


@pytest.fixture(scope="module")
def short(tmp_path_factory):
    out = tmp_path_factory.mktemp("short") / "run"
    commands.run(*SHORT, "--out", out)
    return out


@pytest.fixture(scope="module")
def long(tmp_path_factory):
    out = tmp_path_factory.mktemp("long") / "run"
    commands.run(*LONG, "--out", out)
    return out


def test_the_reference_is_one_whole_run(short):
    rows = [json.loads(line) for line in metrics(short).splitlines()]
    assert [row["step"] for row in rows if "loss" in row] == [1, 2, 3, 4]
    assert [row["step"] for row in rows if "eval/loss" in row] == [2, 4]
    assert world_of(short) == 1


@pytest.mark.parametrize(
    ("launcher", "world"),
    [
        ((*commands.TORCHRUN, "--nproc-per-node=2"), 2),
        ((*commands.ACCELERATE, "--multi_gpu", "--num_processes=2", "--main_process_port=0"), 2),
        (
            (*commands.ACCELERATE, "--cpu", "--num_processes=2"),
            1,
        ),  # accelerate starts one: it leaves the rest to mpirun
    ],
    ids=["torchrun", "accelerate", "accelerate-cpu"],
)
def test_launchers(short, tmp_path, launcher, world):
    commands.run(*SHORT, "--out", tmp_path / "run", by=launcher)
    assert world_of(tmp_path / "run") == world
    assert metrics(tmp_path / "run") == metrics(short)


def test_srun_from_another_directory(short, tmp_path):
    """SLURM's variables and no MASTER_ADDR: the processes meet on the step's first host."""
    processes = commands.srun(2, *SHORT, "--out", "run", cwd=tmp_path)
    for code, out, err in map(commands.finish, processes):
        assert code == 0, out + err
    assert world_of(tmp_path / "run") == 2
    assert metrics(tmp_path / "run") == metrics(short)


def test_as_a_module_with_two_threads_and_no_out(short, tmp_path):
    """The run directory is then named after recipe and preset."""
    commands.run(*SHORT, recipe=("-m", "dltrain.recipes.bert_pretrain"), cwd=tmp_path, OMP_NUM_THREADS=2)
    out = tmp_path / "runs/bert_pretrain-debug"
    assert metrics(out) == metrics(short)
    assert json.loads((out / "config.json").read_text())["recipe"] == "bert_pretrain"


def test_help_in_under_two_seconds():
    """Of processor time: what else the machine does must not decide. It answers before torch is imported."""
    used = functools.partial(resource.getrusage, resource.RUSAGE_CHILDREN)
    before = used()
    command = [*commands.PYTHON, str(commands.BERT), "--help"]
    done = subprocess.run(command, env=commands.environment(OMP_NUM_THREADS=1), capture_output=True, text=True)
    assert done.returncode == 0
    assert "--shards" in done.stdout
    assert used().ru_utime + used().ru_stime - before.ru_utime - before.ru_stime < 2.0


def test_the_same_command_again_says_that_it_is_done(short):
    before = {path: path.read_bytes() for path in [short / "metrics.jsonl", *short.glob("checkpoints/*/*")]}
    out, err = commands.run(*SHORT, "--out", short)
    assert "Done. It was before this launch" in out
    assert err == ""
    assert {path: path.read_bytes() for path in before} == before


def at_step(process: subprocess.Popen[str], out: Path, step: int) -> None:
    """Wait until `step` has been logged."""
    end = time.monotonic() + 60
    while time.monotonic() < end and process.poll() is None:
        if (out / "metrics.jsonl").exists() and metrics(out).count(b"\n") >= step:
            return
        time.sleep(0.002)
    raise AssertionError(f"step {step} did not come: {commands.finish(process)}")


def steps_saved(out: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (out / "checkpoints").glob("step-*"))


def test_sigterm_to_one_of_two_saves_and_the_run_goes_on_in_one(long, tmp_path):
    """Exit code 75 of both, wherever the signal came; the same bytes as never stopped."""
    out = tmp_path / "run"
    processes = commands.srun(2, *LONG, "--out", out)
    at_step(processes[0], out, 3)
    processes[1].send_signal(signal.SIGTERM)
    (code, said, err), (other, _, _) = map(commands.finish, processes)
    assert (code, other) == (75, 75), said + err
    (step,) = steps_saved(out)
    assert 3 <= step < 60
    assert f"after step {step}, saved; the same command goes on" in said
    assert metrics(out) == b"".join(metrics(long).splitlines(keepends=True)[:step])
    commands.run(*LONG, "--out", out)
    assert metrics(out) == metrics(long)


def test_kill_9_and_the_same_command_again(long, tmp_path):
    out = tmp_path / "run"
    process = commands.start(*LONG, "--out", out)
    at_step(process, out, 23)
    os.kill(process.pid, signal.SIGKILL)
    commands.finish(process)
    assert steps_saved(out)[0] == 20
    assert len(metrics(out).splitlines()) < 61
    commands.run(*LONG, "--out", out)
    assert metrics(out) == metrics(long)
    assert steps_saved(out) == [40, 60]


@pytest.mark.long  # half a minute of waiting
def test_torchrun_that_lost_a_node_goes_on_with_the_other(long, tmp_path):
    """A range of nodes: two launchers of one process each, and one of them is killed with what it started."""
    out, port = tmp_path / "run", free_port()
    elastic = (
        *commands.PYTHON, "-m", "torch.distributed.run", "--nnodes=1:2", "--nproc-per-node=1", "--max-restarts=3",
        "--rdzv-id=1", "--rdzv-backend=c10d", f"--rdzv-endpoint=localhost:{port}",
        "--rdzv-conf=last_call_timeout=10,keep_alive_interval=1,keep_alive_max_attempt=3",
    )  # fmt: skip
    nodes = [commands.start(*LONG, "--out", out, by=elastic)]
    with socket.socket() as store:  # in the first node
        until = time.monotonic() + 60
        while store.connect_ex(("localhost", port)) and time.monotonic() < until:
            time.sleep(0.1)
    nodes.append(commands.start(*LONG, "--out", out, by=elastic))
    at_step(nodes[0], out, 23)
    assert world_of(out) == 2
    os.killpg(nodes[1].pid, signal.SIGKILL)
    code, said, err = commands.finish(nodes[0])
    commands.finish(nodes[1])
    assert code == 0, said + err
    events = map(json.loads, (out / "events.jsonl").read_text().splitlines())
    assert [e["world"] for e in events if e["kind"] == "resume"] == [1]
    assert metrics(out) == metrics(long)
