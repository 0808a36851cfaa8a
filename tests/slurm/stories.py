"""Four runs and what happens to them on a real SLURM, each on a cluster of its own: minutes, mostly of waiting."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from clusters import ROOT, Cluster, InNetwork, up

from dltrain import rundir
from dltrain.prove import prove

TRAIN = ROOT / "slurm/train.sbatch"
PACED = Path(__file__).with_name("paced.py")
STEPS = 120
FLAGS = ("debug", "--steps", STEPS, "--save-every", 10, "--eval-every", 0, "--log-every", 1, "--lanes", 2)
PATIENCE = 240  # seconds: a machine that does other things at the same time


def wait(what: str, until: Callable[[], bool]) -> None:
    began = time.monotonic()
    while not until():
        assert time.monotonic() - began < PATIENCE, f"{what}: not within {PATIENCE} s"
        time.sleep(0.2)


def steps_taken(out: Path) -> int:
    return max((row["step"] for row in rundir.read_rows(out / "metrics.jsonl")), default=0)


def resumes(out: Path) -> list[int]:
    """SLURM's restart counts of the launches that resumed."""
    return [e["restarts"] for e in rundir.read_rows(out / "events.jsonl") if e["kind"] == "resume"]


def compared(cluster: Cluster, recipe: Path, folder: Path) -> tuple[bool, str, bool]:
    """`folder`/out beside one process that nothing happened to: prove's answer, and whether metrics.jsonl is equal."""
    command = [sys.executable, recipe, *map(str, FLAGS), "--out", folder / "alone"]
    subprocess.run(command, check=True, timeout=PATIENCE, env=cluster.env, capture_output=True)
    logs = [(folder / run / "metrics.jsonl").read_bytes() for run in ("out", "alone")]
    return *prove(folder / "out", folder / "alone"), logs[0] == logs[1]


def disturbed(recipe: str, folder: Path) -> dict[str, Any]:
    """On two of three nodes: preempted, signalled, requeued by hand, and a node killed."""
    with up(3) as cluster:
        path, out = ROOT / f"recipes/{recipe}.py", folder / "out"
        job = cluster.submit(folder, "--nodes=2", TRAIN, PACED, 0.1, path, *FLAGS, "--out", out)

        def preempt() -> None:
            urgent = cluster.submit(folder, "--partition=urgent", "--nodes=3", "--exclusive", "--wrap=sleep 1")
            cluster.local("await", urgent, 90, check=False)

        def kill_a_node() -> None:
            nodes = cluster.do("squeue", "-h", "-j", job, "-o", "%N")
            node = cluster.do("scontrol", "show", "hostnames", nodes).split()[1]
            cluster.local("crash", node)
            cluster.local("wait", node, "down", 90)
            cluster.local("start", node)

        disturbances = [
            preempt,
            lambda: cluster.do("scancel", "--signal=USR1", job),
            lambda: cluster.do("scontrol", "requeue", job),
            kill_a_node,
        ]
        for times, disturb in enumerate(disturbances):
            wait(f"resume {times}", lambda times=times: len(resumes(out)) >= times)
            before = steps_taken(out)
            wait(f"steps after resume {times}", lambda before=before: steps_taken(out) >= before + 2)
            assert steps_taken(out) < STEPS, "too fast to be disturbed"
            disturb()
        state, output = cluster.finish(job, folder, PATIENCE)
        return {"state": state, "output": output, "resumes": resumes(out), "same": compared(cluster, path, folder)}


def fenced(cluster: Cluster, folder: Path, cut_off: str, mend: str) -> dict[str, Any]:
    """A node is lost to SLURM, its ranks live on: the requeued job takes the directory, and they end by themselves."""
    recipe, out = ROOT / "recipes/bert_pretrain.py", folder / "out"
    options = ("--nodes=1", "--ntasks=2", TRAIN, PACED, 1.0, recipe, *FLAGS, "--out", out)
    job = cluster.submit(folder, *options)
    wait("the first checkpoint", lambda: steps_taken(out) >= 12)
    node = cluster.do("squeue", "-h", "-j", job, "-o", "%N")
    cluster.local(*cut_off.format(node).split())
    wait("the requeued job's resume", lambda: resumes(out) == [1])
    lease = rundir.read_json(out / "lease.json")
    log = folder / f"slurm-{job}/rank-0.log"
    wait("the old ranks' end", lambda: "was taken over by process" in log.read_text())
    wait("no rank on the old node", lambda: "bert_pretrain" not in cluster.local("on", node, "ps", "-ef"))
    cluster.local(*mend.format(node).split())
    state, output = cluster.finish(job, folder, PATIENCE)
    found = {"state": state, "output": output, "lease": lease, "node": node}
    return found | {"same": compared(cluster, recipe, folder)}


def killed_slurmd(folder: Path) -> dict[str, Any]:
    with up(2, net="netns") as cluster:  # not on one address, where the old ranks hold the meeting place's port
        return fenced(InNetwork(cluster), folder, "kill-slurmd {}", "start {}")


def pulled_cable(folder: Path) -> dict[str, Any]:
    with up(2, net="netns") as cluster:
        return fenced(InNetwork(cluster), folder, "link {} down", "link {} up")


STORIES: dict[str, Callable[[Path], dict[str, Any]]] = {
    "bert_pretrain": lambda folder: disturbed("bert_pretrain", folder),
    "imagenet_train": lambda folder: disturbed("imagenet_train", folder),
    "killed_slurmd": killed_slurmd,
    "pulled_cable": pulled_cable,
}
