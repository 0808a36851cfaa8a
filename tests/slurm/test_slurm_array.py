"""slurm/array.sbatch and dltrain submit on the real local SLURM."""

import subprocess
import sys

from clusters import ROOT

ARRAY = ROOT / "slurm/array.sbatch"
BERT = ROOT / "recipes/bert_pretrain.py"
STUDY = """
import dataclasses
import dltrain
from dltrain.config import Settings
from dltrain.grid import grid, table

@dataclasses.dataclass(frozen=True, kw_only=True)
class Config(Settings):
    fails: int = 3

def main(cfg):
    def measure(x: int) -> dict:
        if x == cfg.fails:
            raise ValueError("the loss is not finite")
        return {"square": x * x}
    print(table(grid(cfg, [{"x": x} for x in range(6)], measure)))

if __name__ == "__main__":
    dltrain.cli(main, Config)
"""


def gathered(cluster, folder, *args: str) -> tuple[str, str, list[str]]:
    """Submit the study as an array; the gathering job's state and output, and what the tasks printed."""
    (folder / "some_study.py").write_text(STUDY)
    array = cluster.submit(folder, "--array=0-5", ARRAY, "some_study.py", "--out", "out", *args)
    cluster.local("await", f"{array}_0", 120, check=False)
    first = (folder / f"slurm-{array}_0.out").read_text()
    job = first.split("job ")[1].split()[0]
    state, output = cluster.finish(job, folder)
    return state, output, [(folder / f"slurm-{array}_{i}.out").read_text() for i in range(6)]


def test_a_study_with_a_failing_member_ends_with_a_table_and_one_failure(cluster, tmp_path):
    state, output, tasks = gathered(cluster, tmp_path)
    assert state == "FAILED", output
    lines = output.splitlines()
    assert [line.split() for line in lines if line.split()[:1] in (["0"], ["1"], ["2"], ["4"], ["5"])] == [
        ["0", "0"], ["1", "1"], ["2", "4"], ["4", "16"], ["5", "25"]
    ]  # fmt: skip
    (failure,) = [line for line in lines if line.startswith("some_study: ")]
    assert failure.startswith(
        "some_study: 1 of 6 cells failed; the others are kept and not made again: x=3: ValueError"
    )
    assert ["1 failed" in task for task in tasks] == [False] * 3 + [True] + [False] * 2
    assert all("1 cells made" in task for i, task in enumerate(tasks) if i != 3)


def test_a_whole_study_is_gathered_from_its_tasks_cells(cluster, tmp_path):
    state, output, _ = gathered(cluster, tmp_path, "--fails", "7")
    assert state == "COMPLETED", output
    assert output.splitlines()[-6:] == [f"{x}  {x * x:>6}" for x in range(6)]


def test_submit_asks_the_real_slurm(cluster, tmp_path):
    def submit(*args: str) -> tuple[int, str]:
        command = [sys.executable, "-m", "dltrain", "submit", *args, str(BERT), "debug", "--out", str(tmp_path / "out")]
        run = subprocess.run(command, cwd=tmp_path, env=cluster.env, capture_output=True, text=True, timeout=120)
        return run.returncode, run.stderr + run.stdout

    for args, why in (
        (("--partition", "nope"), "no partition nope: there are test, urgent"),
        (("--gpus", "3"), "a node of any partition has 2 at most"),
        (("--nodes", "3"), "--nodes 3: any partition has 2 at most"),
        (("--time", "soon"), "SLURM refuses it: Invalid --time specification"),
    ):
        code, said = submit(*args)
        assert (code, why in said) == (2, True), said
    assert not (tmp_path / "out").exists()
    code, said = submit("--nodes", "2")
    assert code == 0, said
    job = said.split()[1].rstrip(":")
    assert cluster.local("await", job, 120, check=False) == "COMPLETED"
    assert "10/10" in (tmp_path / f"out/slurm-{job}.out").read_text()
    assert (tmp_path / f"out/slurm-{job}/rank-1.log").read_text() == ""
