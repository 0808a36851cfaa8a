"""A SLURM cluster on this machine, brought up by local_slurm.sh."""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
LOCAL_SLURM = Path(__file__).with_name("local_slurm.sh")
_STARTS = iter(range(17800 + os.getpid() % 100 * 20, 30000, 20))  # each is tried once
MISSING = [name for name in ("munged", "slurmctld", "slurmd") if not shutil.which(name, path="/usr/sbin:/usr/bin")]
if os.geteuid() != 0:
    MISSING.append("root's rights")


class Cluster:
    """A SLURM cluster under `folder`; its nodes are n1, n2, ..."""

    def __init__(self, folder: Path, **settings: str):
        port = _free_ports(5)  # of the cluster, and of its jobs' meeting place: all nodes are 127.0.0.1
        self.env = {**os.environ, "LOCAL_SLURM_DIR": str(folder), "LOCAL_SLURM_PORT": str(port)}
        self.env |= {"MASTER_PORT": str(port + 4)}
        self.env |= {"SLURM_CONF": str(folder / "slurm.conf"), "PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
        self.env |= {f"LOCAL_SLURM_{k.upper()}": v for k, v in settings.items()}

    def local(self, *args: object, check: bool = True) -> str:
        """local_slurm.sh with `args`."""
        return self.do(LOCAL_SLURM, *args, check=check)

    def do(
        self, *args: object, check: bool = True, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        """Any command with the cluster's environment; what it printed."""
        command, env = [str(arg) for arg in args], {**self.env, **(env or {})}
        run = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, timeout=300)
        assert not check or run.returncode == 0, run.stderr
        return run.stdout.strip()

    def submit(self, cwd: Path, *args: object, **env: str) -> str:
        """sbatch in `cwd`; return the job's id."""
        return self.do("sbatch", "--parsable", *args, cwd=cwd, env=env)

    def finish(self, job: str, cwd: Path, seconds: int = 120) -> tuple[str, str]:
        """Wait for the job's end; return its state and what it printed."""
        state = self.local("await", job, seconds, check=False)
        return state, (cwd / f"slurm-{job}.out").read_text()


@contextmanager
def up(nodes: int, **settings: str) -> Iterator[Cluster]:
    """A cluster of `nodes`, with local_slurm.sh's LOCAL_SLURM_... `settings`, for as long as it is needed."""
    folder = Path(tempfile.mkdtemp(prefix="dlt-slurm-", dir="/tmp"))  # not tmp_path: UNIX sockets want short names
    cluster = Cluster(folder, **settings)
    try:
        cluster.local("up", nodes)
        yield cluster
    finally:
        cluster.local("down", check=False)
        shutil.rmtree(folder)


def _free_ports(count: int) -> int:
    """The first of `count` free ports in a row, below the ephemeral ones."""

    def taken(port: int) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    return next(first for first in _STARTS if not any(taken(first + i) for i in range(count)))


class InNetwork(Cluster):
    """A cluster with a network of its own, whose clients must be called within it."""

    def __init__(self, cluster: Cluster):
        self.env = cluster.env

    def do(
        self, *args: object, check: bool = True, cwd: Path | None = None, env: Mapping[str, str] | None = None
    ) -> str:
        inside = () if args[0] == LOCAL_SLURM else (LOCAL_SLURM, "exec")
        return super().do(*inside, *args, check=check, cwd=cwd, env=env)
