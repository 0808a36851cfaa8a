"""Node lists and variables as Slurm writes them, and odd ones: named, never guessed."""

import pytest

from dltrain.errors import UserError
from dltrain.launch import Launch, detect
from dltrain.slurm import facts, hosts, place, tasks_per_node

SRUN = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "n[1-3,07-09],gpu-a",
}  # fmt: skip


def without(*names: str) -> dict[str, str]:
    return {k: v for k, v in SRUN.items() if k not in names}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ("localhost", "localhost"),
        ("n1", "n1"),
        ("n[1-3]", "n1 n2 n3"),
        ("n[07-09]", "n07 n08 n09"),
        ("n[08-11]", "n08 n09 n10 n11"),
        ("n[98-101]", "n98 n99 n100 n101"),
        ("n[3,5]", "n3 n5"),
        ("n[1-3,07-09],gpu-a", "n1 n2 n3 n07 n08 n09 gpu-a"),
        ("gpu-a,n[1-2]", "gpu-a n1 n2"),
        ("a,b,c", "a b c"),
        ("rack1-[10-12].cluster.org", "rack1-10.cluster.org rack1-11.cluster.org rack1-12.cluster.org"),
        ("r[1-2]n[1-2]", "r1n1 r1n2 r2n1 r2n2"),
        ("r[1-2]n[01-02]-ib0", "r1n01-ib0 r1n02-ib0 r2n01-ib0 r2n02-ib0"),
        ("n[1-1]", "n1"),
        ("n[000-001]", "n000 n001"),
        ("node_a[1],node_b[1]", "node_a1 node_b1"),
        ("ip-10-0-0-1,ip-10-0-0-2", "ip-10-0-0-1 ip-10-0-0-2"),
        ("queue1-dy-p4d-[1-2]", "queue1-dy-p4d-1 queue1-dy-p4d-2"),
    ],
)
def test_hosts(nodes, expected):
    assert list(hosts(nodes)) == expected.split()


def test_ten_thousand_hosts_are_made_one_by_one():
    found = hosts("n[00001-99999]")
    assert [next(found), next(found)] == ["n00001", "n00002"]


@pytest.mark.parametrize(
    "nodes", ["", "[1-3]", "n[1-3", "n1-3]", "n[3-1]", "n[1--3]", "n[a-b]", "n[]", "n1,,n2", "(null)", "None assigned",
              "n[[1]]", "n[1,]", ",n1"],
)  # fmt: skip
def test_what_is_no_node_list_is_named(nodes):
    with pytest.raises(UserError, match="node list"):
        list(hosts(nodes))


@pytest.mark.parametrize(
    ("text", "counts"),
    [("1", [1]), ("2(x3),1", [2, 2, 2, 1]), ("8(x2)", [8, 8]), ("1,2,1", [1, 2, 1]), ("4, 4", [4, 4])],
)
def test_tasks_per_node(text, counts):
    assert tasks_per_node(text) == counts


@pytest.mark.parametrize("text", ["", "2(y3)", "x", "2(x3", "2x3", "-1", "1.5"])
def test_odd_tasks_per_node_are_named(text):
    with pytest.raises(UserError, match="form 2"):
        tasks_per_node(text, "SLURM_TASKS_PER_NODE")


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (without("SLURM_LOCALID"), "not SLURM_LOCALID"),
        (without("SLURM_STEP_NODELIST"), "no SLURM_STEP_NODELIST .a container"),
        (SRUN | {"SLURM_STEP_NODELIST": "[1-3]"}, r"\[1-3\]"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x2),1"}, "lists 3 nodes"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(x4)"}, "has 8 tasks, but SLURM_STEP_NUM_TASKS is 7"),
        (SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4"),
        (SRUN | {"SLURM_NODEID": "-1"}, "SLURM_NODEID=-1"),
        (SRUN | {"SLURM_PROCID": "7"}, "rank 7 of 7"),
        (SRUN | {"SLURM_PROCID": ""}, "SLURM_PROCID=''"),
        (SRUN | {"SLURM_LOCALID": "1"}, "local rank 1 of 1"),
        (SRUN | {"SLURM_STEP_NUM_TASKS": "seven"}, "SLURM_STEP_NUM_TASKS='seven'"),
        (SRUN | {"SLURM_JOB_ID": "12_3"}, "SLURM_JOB_ID='12_3'"),
        (SRUN | {"MASTER_PORT": "http"}, "MASTER_PORT='http'"),
        (SRUN | {"MASTER_PORT": "70000"}, "MASTER_PORT=70000 is no port"),
        (SRUN | {"SLURM_HET_SIZE": "2"}, "heterogeneous job of 2 components"),
    ],
)
def test_odd_variables_are_named(env, message):
    with pytest.raises(UserError, match=message):
        detect(env)


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        (SRUN | {"MASTER_PORT": "77"}, (6, 7, 0, 1, "n1:77")),
        (SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "77"}, (6, 7, 0, 1, "10.0.0.1:77")),
        (SRUN | {"SLURM_HET_SIZE": "1", "MASTER_PORT": "77"}, (6, 7, 0, 1, "n1:77")),
        (without("SLURM_STEP_NODELIST") | {"SLURM_JOB_NODELIST": "b[2-3]", "MASTER_PORT": "1"}, (6, 7, 0, 1, "b2:1")),
        (without("SLURM_STEP_NODELIST") | {"SLURM_NODELIST": "old7", "MASTER_PORT": "1"}, (6, 7, 0, 1, "old7:1")),
        (SRUN | {"SLURM_NODEID": "1", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "MASTER_PORT": "1"},
         (3, 7, 1, 2, "n1:1")),
    ],
)  # fmt: skip
def test_a_task_finds_its_place(env, expected):
    assert place(env) == expected
    assert detect(env) == Launch("slurm", *expected)


def test_without_tasks_per_node_all_tasks_are_here():
    env = without("SLURM_STEP_TASKS_PER_NODE", "SLURM_NODEID") | {"SLURM_LOCALID": "6", "MASTER_PORT": "1"}
    assert place(env) == (6, 7, 6, 7, "n1:1")


def test_an_incarnation_is_told_by_job_and_restarts():
    assert facts({}) == {}
    assert facts({"SLURM_JOB_ID": "12"}) == {"job": "12", "restarts": 0}
    env = {"SLURM_JOB_ID": "12", "SLURM_RESTART_COUNT": "3", "SLURM_JOB_NODELIST": "n[1-2]"}
    assert facts(env) == {"job": "12", "restarts": 3, "nodes": "n[1-2]"}
