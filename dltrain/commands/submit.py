"""dltrain submit: check a job on the login node, then hand it to SLURM.

What would fail after hours in the queue (an impossible configuration, absent shards, a partition without such nodes) is
refused here, everything at once. The job is slurm/train.sbatch with its options filled in, kept in the run directory.
"""

import argparse
import dataclasses
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType

from dltrain import config, rundir
from dltrain.commands.trained import recipe_of, recipes
from dltrain.data.urls import expand, scheme
from dltrain.errors import UserError

ABOUT = """Checks the recipe's configuration, its shards, its run directory and what is asked of SLURM, then submits it;
all other arguments are the recipe's own: dltrain submit --nodes 8 --gpus 8 recipes/bert_pretrain.py base --out DIR"""
DATA = ("shards", "data", "train", "test", "held_out")  # fields of a recipe that name shards or files


def main(argv: list[str]) -> None:
    """`dltrain submit ARGV`. UserError with every reason for a job that cannot run; nothing is written then."""
    parser = argparse.ArgumentParser("dltrain submit", description=ABOUT, allow_abbrev=False)
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--gpus", type=int, default=0, help="of each node; one process for each")
    parser.add_argument(
        "--tasks", type=int, default=0, help="processes of each node; by default one for each GPU, else 1"
    )
    parser.add_argument("--cpus", type=int, default=0, help="of each process")
    parser.add_argument("--time", default="", help="limit, as SLURM has it: minutes, H:MM:SS or D-HH:MM")
    parser.add_argument("--partition", default="")
    parser.add_argument("--account", default="")
    parser.add_argument("--array", default="", help="of a study: 0-7; its grid's cells are shared out")
    parser.add_argument("--cluster", default="", help="slurm/env/NAME.sh is sourced first")
    parser.add_argument("--launcher", default="srun", choices=("srun", "accelerate"))
    parser.add_argument(
        "--sbatch", action="append", default=[], metavar="OPTION", help="any other option: --sbatch=--mem=0"
    )
    parser.add_argument("--gpu", default="", help="its kind, of dltrain plan's: what does not fit into one is refused")
    parser.add_argument("--dry-run", action="store_true", help="print the script, submit nothing")
    asked, command = parser.parse_known_args(argv)
    asked.tasks = asked.tasks or asked.gpus or 1
    if not command or command[0].startswith("-"):
        raise UserError("which recipe? dltrain submit --nodes 2 --gpus 8 recipes/bert_pretrain.py base --out DIR")
    recipe = recipe_of(command[0])
    cfg = config.parse(
        recipe.Config, recipe.PRESETS, Path(command[0]).stem, command[1:], (recipe.__doc__ or "").split("\n")[0]
    )
    cfg = dataclasses.replace(cfg, out=str(Path(cfg.out).absolute()))
    text = script(asked, command, Path(cfg.out))
    found = [*(_unfit(cfg, asked) or _too_large(recipe, cfg, asked)), *_data(cfg), *_unwritable(Path(cfg.out))]
    if shutil.which("sbatch"):
        found += _partition(asked) or _refused(text)
    elif not asked.dry_run:
        found.append("there is no sbatch on this machine: run it on a login node, or look with --dry-run")
    if found:
        raise UserError("; ".join(found))
    if asked.dry_run:
        print(text, end="")
        return
    path = Path(cfg.out) / "job.sbatch"
    path.parent.mkdir(parents=True, exist_ok=True)
    rundir.write_atomic(path, text.encode())
    done = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"sbatch {path}: {done.stderr.strip()}")
    job = done.stdout.strip().split(";")[0]
    print(f"job {job}: {asked.nodes} x {asked.tasks} processes; tail -F {path.parent}/slurm-{job}.out")


def script(asked: argparse.Namespace, command: list[str], out: Path) -> str:
    """The batch script: options, then slurm/train.sbatch (or array.sbatch) with the recipe's command line."""
    slurm = recipes().parent / "slurm"
    if not (slurm / "train.sbatch").exists():
        raise UserError(f"{slurm} has no train.sbatch: submit from a checkout (pip install -e)")
    name = "%A_%a" if asked.array else "%j"
    options = {
        "job-name": Path(command[0]).stem, "nodes": asked.nodes, "ntasks-per-node": asked.tasks,
        "gpus-per-node": asked.gpus, "cpus-per-task": asked.cpus, "time": asked.time, "partition": asked.partition,
        "account": asked.account, "array": asked.array, "output": f"{out}/slurm-{name}.out", "open-mode": "append",
        "signal": "USR1@120",
    }  # fmt: skip
    lines = [f"--{k}={v}" for k, v in options.items() if v] + ["--requeue", *asked.sbatch]
    exports = {"DLTRAIN_SLURM": slurm, "DLTRAIN_LOGS": out, "PYTHON": os.environ.get("PYTHON", sys.executable)}
    exports |= {"LAUNCHER": asked.launcher} | ({"CLUSTER": asked.cluster} if asked.cluster else {})
    quoted = " ".join(f"{k}={shlex.quote(str(v))}" for k, v in exports.items())
    arguments = shlex.join([str(Path(command[0]).absolute()), *command[1:]])
    kind = "array" if asked.array else "train"
    head = "".join(f"#SBATCH {line}\n" for line in lines)
    return f'#!/usr/bin/env bash\n{head}export {quoted}\nset -- {arguments}\n. "$DLTRAIN_SLURM/{kind}.sbatch"\n'


def _unfit(cfg: config.Settings, asked: argparse.Namespace) -> list[str]:
    """What the recipe itself refuses for so many processes."""
    sizes = {k: getattr(asked, k) for k in ("nodes", "tasks", "gpus", "cpus")}
    if wrong := [
        f"--{k} {v} must be at least {k in ('nodes', 'tasks'):d}"
        for k, v in sizes.items()
        if v < (k in ("nodes", "tasks"))
    ]:
        return wrong
    if not isinstance(cfg, config.Config):
        return []
    before = Path(cfg.out) / "config.json"
    try:
        known = rundir.read_json(before)["config"] if before.exists() else {}
        config.settle(cfg, asked.nodes * asked.tasks, asked.tasks, known)
    except UserError as error:
        return [str(error)]
    return []


def _too_large(recipe: ModuleType, cfg: config.Settings, asked: argparse.Namespace) -> list[str]:
    """What the planner says of memory, where it knows the GPU."""
    if not asked.gpu or not isinstance(cfg, config.Config):
        return []
    from dltrain.plan.machines import machine
    from dltrain.plan.plan import plan, refuse

    try:
        refuse(plan(recipe, cfg, asked.nodes * asked.tasks, dataclasses.replace(machine(asked.gpu), node=asked.tasks)))
    except UserError as error:
        return [str(error)]
    return []


def _data(cfg: config.Settings) -> list[str]:
    found = []
    for name in DATA:
        value = getattr(cfg, name, "")
        if isinstance(value, str) and re.search(r"[/.{*]", value) and not scheme(value):
            try:
                expand(value)
            except UserError as error:
                found.append(str(error))
    return found


def _unwritable(out: Path) -> list[str]:
    there = next(folder for folder in (out, *out.parents) if folder.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return []
    except OSError as error:
        return [f"{out} cannot be written ({error.strerror}): choose another --out"]


def _partition(asked: argparse.Namespace) -> list[str]:
    """Whether some partition (the one asked for) has such nodes: sinfo's word."""
    form = "%R|%D|%c|%G|%l|%a"
    listed = subprocess.run(["sinfo", "-h", "-o", form], capture_output=True, text=True, check=False)
    if listed.returncode:
        return [f"SLURM does not answer (sinfo: {listed.stderr.strip()}): try later"]
    rows = [line.split("|") for line in listed.stdout.splitlines()]
    names = list(dict.fromkeys(row[0] for row in rows))
    if asked.partition and (unknown := set(asked.partition.split(",")) - set(names)):
        return [f"no partition {', '.join(sorted(unknown))}: there are {', '.join(names)}"]
    mine = [row for row in rows if not asked.partition or row[0] in asked.partition.split(",")]
    found, where = [], f"partition {asked.partition}" if asked.partition else "any partition"
    nodes = max((sum(int(r[1]) for r in mine if r[0] == name) for name in names), default=0)
    gpus = max((_gpus(row[3]) for row in mine), default=0)
    cpus = max((int(row[2].rstrip("+")) for row in mine), default=0)
    if asked.nodes > nodes:
        found.append(f"--nodes {asked.nodes}: {where} has {nodes} at most")
    if asked.gpus > gpus:
        found.append(f"--gpus {asked.gpus}: a node of {where} has {gpus} at most")
    if asked.tasks * max(1, asked.cpus) > cpus:
        found.append(f"{asked.tasks} processes of {max(1, asked.cpus)} CPUs: a node of {where} has {cpus} CPUs at most")
    if mine and all(row[5] != "up" for row in mine):
        found.append(f"{where} takes no jobs ({mine[0][5]})")
    return found


def _gpus(gres: str) -> int:
    """`gpu:h100:8(S:0-1),nvme:1` -> 8; `(null)` -> 0."""
    return sum(int(n) for n in re.findall(r"\bgpu(?::[^:,()]+)?:(\d+)", gres))


def _refused(text: str) -> list[str]:
    """What sbatch itself says: times, accounts, limits."""
    command = ["sbatch", "--test-only"]
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    words = [
        line.removeprefix("sbatch: error: ").removeprefix("allocation failure: ") for line in done.stderr.splitlines()
    ]
    return [f"SLURM refuses it: {'; '.join(words)}"] if done.returncode else []
