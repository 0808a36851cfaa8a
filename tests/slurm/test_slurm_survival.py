"""Preempted, requeued, a node killed, a node cut off: the bytes of a run that nothing happened to, on a real SLURM."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from clusters import ROOT, Cluster, up

from dltrain import rundir
from dltrain.prove import prove

TRAIN = ROOT / "slurm/train.sbatch"
PACED = Path(__file__).with_name("paced.py")
STEPS = 200
FLAGS = ("debug", "--steps", STEPS, "--save-every", 20, "--eval-every", 0, "--log-every", 1, "--lanes", 2)


@pytest.fixture(scope="module")
def three() -> Iterator[Cluster]:
    with up(3) as cluster:
        yield cluster


def wait(what: str, until: Callable[[], bool], seconds: float = 90) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < seconds, f"{what}: not within {seconds} s"
        time.sleep(0.2)


def steps_taken(out: Path) -> int:
    return max((row["step"] for row in rundir.read_rows(out / "metrics.jsonl")), default=0)


def resumes(out: Path) -> list[int]:
    """SLURM's restart counts of the launches that resumed."""
    return [e["restarts"] for e in rundir.read_rows(out / "events.jsonl") if e["kind"] == "resume"]


def undisturbed(cluster: Cluster, recipe: Path, out: Path) -> None:
    command = [sys.executable, recipe, *map(str, FLAGS), "--out", out]
    subprocess.run(command, check=True, timeout=200, env=cluster.env, capture_output=True)


@pytest.mark.parametrize("recipe", ["bert_pretrain", "imagenet_train"])
def test_preempted_requeued_and_a_node_killed_on_two_nodes(three, tmp_path, recipe):
    path, out = ROOT / f"recipes/{recipe}.py", tmp_path / "out"
    job = three.submit(tmp_path, "--nodes=2", TRAIN, PACED, 0.1, path, *FLAGS, "--out", out)

    def preempt() -> None:
        urgent = three.submit(tmp_path, "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 1")
        three.local("await", urgent, 60, check=False)

    def kill_a_node() -> None:
        nodes = three.do("squeue", "-h", "-j", job, "-o", "%N")
        node = three.do("scontrol", "show", "hostnames", nodes).split()[1]
        three.local("crash", node)
        three.local("wait", node, "down", 60)
        three.local("start", node)

    disturbances = [
        preempt,
        lambda: three.do("scancel", "--signal=USR1", job),
        lambda: three.do("scontrol", "requeue", job),
        kill_a_node,
    ]
    for times, disturb in enumerate(disturbances):
        wait(f"resume {times}", lambda times=times: len(resumes(out)) >= times)
        before = steps_taken(out)
        wait(f"steps after resume {times}", lambda before=before: steps_taken(out) >= before + 3)
        assert steps_taken(out) < STEPS, "too fast to be disturbed"
        disturb()
    state, output = three.finish(job, tmp_path, 150)
    assert state == "COMPLETED", output
    assert resumes(out) == [1, 2, 3, 4]
    assert output.count("stopped by USR1") + output.count("stopped by SIGUSR1") >= 1
    undisturbed(three, path, tmp_path / "alone")
    same, words = prove(out, tmp_path / "alone")
    assert same, words
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "alone/metrics.jsonl").read_bytes()


def fenced(cluster: Cluster, tmp_path: Path, cut_off: Callable[[str], object], mend: Callable[[str], object]) -> None:
    """A node is lost to SLURM, its ranks live on: the requeued job takes the directory, and they end by themselves."""
    recipe, out = ROOT / "recipes/bert_pretrain.py", tmp_path / "out"
    options = ("--nodes=1", "--ntasks=2", TRAIN, PACED, 0.15, recipe, *FLAGS, "--out", out)
    job = cluster.submit(tmp_path, *options)
    wait("the first checkpoint", lambda: steps_taken(out) >= 25)
    node = cluster.do("squeue", "-h", "-j", job, "-o", "%N")
    cut_off(node)
    wait("the requeued job's resume", lambda: resumes(out) == [1], 120)
    leases = rundir.read_json(out / "lease.json")
    assert (leases["token"], leases["restarts"], leases["host"] != node) == (2, 1, True)
    log = tmp_path / f"slurm-{job}/rank-0.log"
    wait("the old ranks' end", lambda: "was taken over by process" in log.read_text(), 30)
    wait("no rank on the old node", lambda: "bert_pretrain" not in cluster.local("on", node, "ps", "-ef"), 30)
    mend(node)
    state, output = cluster.finish(job, tmp_path, 150)
    assert state == "COMPLETED", output
    undisturbed(cluster, recipe, tmp_path / "alone")
    same, words = prove(out, tmp_path / "alone")
    assert same, words
    assert (out / "metrics.jsonl").read_bytes() == (tmp_path / "alone/metrics.jsonl").read_bytes()


def test_ranks_that_outlive_their_slurmd_publish_nothing_more_and_end(three, tmp_path):
    fenced(three, tmp_path, lambda node: three.local("kill-slurmd", node), lambda node: three.local("start", node))


def test_ranks_cut_off_by_a_pulled_cable_publish_nothing_more_and_end(tmp_path):
    with up(2, net="netns") as cluster:
        inside = _InNetwork(cluster)
        fenced(
            inside,
            tmp_path,
            lambda node: cluster.local("link", node, "down"),
            lambda node: cluster.local("link", node, "up"),
        )


class _InNetwork(Cluster):
    """The same cluster, whose clients must be called within its network."""

    def __init__(self, cluster: Cluster):
        self.env = cluster.env

    def do(self, *args: object, check: bool = True, cwd: Path | None = None, **env: str) -> str:
        inside = () if str(args[0]).endswith("local_slurm.sh") else (ROOT / "tests/slurm/local_slurm.sh", "exec")
        return super().do(*inside, *args, check=check, cwd=cwd, **env)
