"""Start recipes as their users do: real processes, of which a test reads exit code, standard error and files."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from worlds import free_port

ROOT = Path(__file__).resolve().parents[1]
BERT = ROOT / "recipes/bert_pretrain.py"
PYTHON = (sys.executable,)
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
ACCELERATE = (sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch")
# No launcher's variables, nor a number of threads: a recipe must give the same bits whatever these are.
OTHERS = ("RANK", "WORLD_SIZE", "LOCAL_", "MASTER_", "SLURM_", "ACCELERATE_", "FSDP_", "OMP_", "PMI_", "DS_")


def environment(**more: object) -> dict[str, str]:
    """This process's environment without a launcher in it, on the CPU, and `more`."""
    plain = {k: v for k, v in os.environ.items() if not k.startswith(OTHERS)}
    return plain | {"DLTRAIN_DEVICE": "cpu"} | {k: str(v) for k, v in more.items()}


def start(
    *args: object,
    by: tuple[object, ...] = PYTHON,
    recipe: tuple[object, ...] = (BERT,),
    cwd: Path = ROOT,
    **env: object,
) -> subprocess.Popen[str]:
    """The recipe with `args` under a launcher, not waited for."""
    command = [str(part) for part in (*by, *recipe, *args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        command, cwd=cwd, env=environment(**env), stdout=pipe, stderr=pipe, text=True, start_new_session=True
    )


def finish(process: subprocess.Popen[str], timeout: float = 100) -> tuple[int, str, str]:
    """Exit code, standard output and standard error."""
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # a launcher's children too
        raise
    return process.returncode, out, err


def run(*args: object, code: int = 0, **how: Any) -> tuple[str, str]:
    """The recipe to its end, which must be `code`: standard output and standard error."""
    got, out, err = finish(start(*args, **how))
    assert got == code, f"exit code {got}\n{out[-2000:]}\n{err[-4000:]}"
    return out, err


def refused(*args: object, **how: Any) -> str:
    """A user's mistake: exit code 2 and one line on standard error, which is returned."""
    _, err = run(*args, code=2, **how)
    assert err.count("\n") == 1 and err.startswith("bert_pretrain: "), err
    return err


def slurm(world: int, rank: int, port: int) -> dict[str, Any]:
    """What srun sets for one task of a step on one node; no MASTER_ADDR."""
    return {
        "SLURM_JOB_ID": 7, "SLURM_STEP_ID": 0, "SLURM_PROCID": rank, "SLURM_LOCALID": rank, "SLURM_NODEID": 0,
        "SLURM_STEP_NUM_TASKS": world, "SLURM_STEP_TASKS_PER_NODE": world, "SLURM_STEP_NODELIST": "localhost",
        "MASTER_PORT": port,
    }  # fmt: skip


def srun(world: int, *args: object, cwd: Path = ROOT) -> list[subprocess.Popen[str]]:
    """`world` processes as srun starts them."""
    port = free_port()
    return [start(*args, cwd=cwd, **slurm(world, rank, port)) for rank in range(world)]
