"""slurm/train.sbatch on a real SLURM: two nodes on this machine, brought up by local_slurm.sh."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from clusters import ROOT

TRAIN = ROOT / "slurm/train.sbatch"
ALL_REDUCE = Path(__file__).with_name("all_reduce.py")
BERT = ROOT / "recipes/bert_pretrain.py"


def test_one_process_per_task_on_two_nodes(cluster, tmp_path):
    options = ("--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=2")
    job = cluster.submit(tmp_path, *options, TRAIN, ALL_REDUCE, tmp_path)
    state, output = cluster.finish(job, tmp_path)
    assert state == "COMPLETED", output
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(4)]
    assert [f["total"] for f in facts] == [10.0] * 4
    assert [(f["node"], f["local"]) for f in facts] == [("n1", 0), ("n1", 1), ("n2", 0), ("n2", 1)]
    assert {f["python"] for f in facts} == {sys.executable}
    assert {f["cpus_per_task"] for f in facts} == {"2"}
    assert not (tmp_path / "4.json").exists()


def test_one_failing_process_ends_the_job(cluster, tmp_path):
    job = cluster.submit(tmp_path, "--nodes=2", TRAIN, ALL_REDUCE, tmp_path, "--fail", 1, SLURM_WAIT="8")
    state, output = cluster.finish(job, tmp_path)
    assert state == "FAILED", output
    assert "n2: task 1: Exited with exit code 3" in output
    assert "CANCELLED" in output or "Terminated" in output  # the other one, long before it ends by itself
    assert list(tmp_path.glob("*.json")) == []


def test_cluster_names_the_file_to_source(cluster, tmp_path):
    """From a copy of slurm/ elsewhere: the script finds its own folder, though SLURM runs a copy of it."""
    home = tmp_path / "check out"
    shutil.copytree(ROOT / "slurm", home / "slurm")
    (home / "slurm/env/mine.sh").write_text("export EXAMPLE_CLUSTER=mine\n")
    job = cluster.submit(tmp_path, home / "slurm/train.sbatch", ALL_REDUCE, tmp_path, CLUSTER="mine")
    state, output = cluster.finish(job, tmp_path)
    assert state == "COMPLETED", output
    assert json.loads((tmp_path / "0.json").read_text())["cluster"] == "mine"


def test_requeued_job_appends_to_its_output(cluster, tmp_path):
    (tmp_path / "recipe.py").write_text(
        "import os, subprocess, time\n"
        "print('restarts', os.environ.get('SLURM_RESTART_COUNT', 0), flush=True)\n"
        "if 'SLURM_RESTART_COUNT' not in os.environ:\n"
        "    subprocess.run(['scontrol', 'requeue', os.environ['SLURM_JOB_ID']])\n"
        "    time.sleep(60)\n"
    )
    job = cluster.submit(tmp_path, TRAIN, "recipe.py")
    state, output = cluster.finish(job, tmp_path)
    assert state == "COMPLETED", output
    assert "restarts 0\n" in output
    assert "restarts 1\n" in output


def test_without_a_recipe_it_tells_its_usage(cluster, tmp_path):
    state, output = cluster.finish(cluster.submit(tmp_path, TRAIN), tmp_path)
    assert state == "FAILED"
    assert "usage: sbatch" in output


def test_bert_on_two_nodes_writes_the_bytes_of_one_process(cluster, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    job = cluster.submit(tmp_path, "--nodes=2", TRAIN, BERT, "debug", "--out", two)
    command = [sys.executable, BERT, "debug", "--out", one]
    subprocess.run(command, check=True, timeout=120, env=cluster.env, capture_output=True)
    state, output = cluster.finish(job, tmp_path)
    assert state == "COMPLETED", output
    events = map(json.loads, (two / "events.jsonl").read_text().splitlines())
    assert [event["step"] for event in events if event["kind"] == "save"] == [5, 10]
    assert json.loads((two / "config.json").read_text())["config"]["strategy"] == "ddp"
    assert (two / "metrics.jsonl").read_bytes() == (one / "metrics.jsonl").read_bytes() != b""
