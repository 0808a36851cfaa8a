"""A job for train.sbatch: one all-reduce over the processes of a SLURM step, then one JSON line per process.

all_reduce.py OUT [--fail RANK]: rank r adds r + 1 and writes OUT/r.json; rank RANK exits with 3 instead.
"""

import json
import os
import socket
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist


def main() -> None:
    out, rank, size = Path(sys.argv[1]), int(os.environ["SLURM_PROCID"]), int(os.environ["SLURM_NTASKS"])
    if sys.argv[2:] == ["--fail", str(rank)]:
        sys.exit(3)
    if sys.argv[2:3] == ["--fail"]:
        time.sleep(30)  # SLURM is to end it
    dist.init_process_group("gloo", rank=rank, world_size=size)
    total = torch.tensor([rank + 1.0])
    dist.all_reduce(total)
    facts = {
        "total": total.item(),
        "size": size,
        "node": socket.gethostname(),
        "local": int(os.environ["SLURM_LOCALID"]),
        "python": sys.executable,
        "cpus_per_task": os.environ.get("SRUN_CPUS_PER_TASK"),
        "cluster": os.environ.get("EXAMPLE_CLUSTER"),
        "restart": os.environ.get("SLURM_RESTART_COUNT"),
    }
    (out / f"{rank}.json").write_text(json.dumps(facts))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
