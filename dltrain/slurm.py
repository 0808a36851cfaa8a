"""What Slurm tells a process: node lists, tasks and the meeting place.

Sources: https://slurm.schedmd.com/srun.html ("Output environment variables"), https://slurm.schedmd.com/hostlist.html.
"""

import re
from collections.abc import Iterator, Mapping
from itertools import product

from dltrain.errors import UserError


def hosts(nodes: str) -> Iterator[str]:
    """The hosts of a node list, in order: `n[1-3,07-09],gpu-a` -> n1 n2 n3 n07 n08 n09 gpu-a; `r[1-2]n[1-2]` has four.

    Raises:
        UserError: for what is no node list, with the part that cannot be read.
    """
    for part in _split(nodes, nodes):
        if not re.fullmatch(r"[\w.-]+([\w.-]|\[[\d,-]+\])*", part):
            raise UserError(f"the node list {nodes!r} cannot be read at {part!r}: set MASTER_ADDR to the first host")
        pieces = re.split(r"\[([\d,-]+)\]", part)  # text, range, text, range, ..., text
        choices = [list(_range(piece, nodes)) if i % 2 else [piece] for i, piece in enumerate(pieces)]
        yield from map("".join, product(*choices))


def _split(nodes: str, whole: str) -> Iterator[str]:
    """At the commas outside brackets."""
    depth, start = 0, 0
    for i, c in enumerate(f"{nodes},"):
        depth += (c == "[") - (c == "]")
        if depth not in (0, 1):
            break
        if c == "," and depth == 0:
            yield nodes[start:i].strip()
            start = i + 1
    if depth:
        raise UserError(f"the node list {whole!r} has a bracket too many: set MASTER_ADDR to the first host")


def _range(text: str, whole: str) -> Iterator[str]:
    """`1-3,07-09` -> 1 2 3 07 08 09: as many digits as the first number is written with."""
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part)
        if not match or int(match[2] or match[1]) < int(match[1]):
            raise UserError(f"the node list {whole!r} cannot be read at {part!r}: set MASTER_ADDR to the first host")
        for number in range(int(match[1]), int(match[2] or match[1]) + 1):
            yield f"{number:0{len(match[1])}}"


def number(env: Mapping[str, str], name: str, default: int | None = None) -> int:
    """A whole number from the environment.

    Raises:
        UserError: where it is absent and there is no default, or is no number.
    """
    if name not in env:
        if default is None:
            raise UserError(f"the launcher set RANK or SLURM_PROCID but not {name}: start with torchrun or srun")
        return default
    if not re.fullmatch(r"-?\d+", env[name].strip()):  # int() would take 1_0
        raise UserError(f"{name}={env[name]!r} in the environment is not a number")
    return int(env[name])


def place(env: Mapping[str, str]) -> tuple[int, int, int, int, str]:
    """(rank, world, local rank, local world, master as host:port; empty for one process) of a task of srun.

    Raises:
        UserError: for variables that are missing, odd or contradict each other, and for heterogeneous jobs.
    """
    if number(env, "SLURM_HET_SIZE", 1) > 1:
        raise UserError(
            f"a heterogeneous job of {env['SLURM_HET_SIZE']} components: each would train alone; "
            "ask for nodes of one kind, or start with torchrun"
        )
    world = number(env, "SLURM_STEP_NUM_TASKS", number(env, "SLURM_NTASKS", 1))
    here = _tasks_here(env, world)
    return number(env, "SLURM_PROCID"), world, number(env, "SLURM_LOCALID"), here, _master(env) if world > 1 else ""


def _tasks_here(env: Mapping[str, str], world: int) -> int:
    """Tasks on this node, from SLURM_STEP_TASKS_PER_NODE such as `2(x3),1` and SLURM_NODEID."""
    name = next((k for k in ("SLURM_STEP_TASKS_PER_NODE", "SLURM_TASKS_PER_NODE") if env.get(k)), "")
    counts = tasks_per_node(env[name], name) if name else [world]
    node = number(env, "SLURM_NODEID", 0)
    if not 0 <= node < len(counts):
        raise UserError(f"SLURM_NODEID={node}, but {name}={env.get(name)!r} lists {len(counts)} nodes")
    if name and sum(counts) != world:
        raise UserError(
            f"{name}={env[name]!r} has {sum(counts)} tasks, but SLURM_STEP_NUM_TASKS is {world}: start with srun"
        )
    return counts[node]


def tasks_per_node(text: str, name: str = "tasks per node") -> list[int]:
    """`2(x3),1` -> [2, 2, 2, 1]. UserError, with the variable's name, for another form."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part.strip())
        if not match:
            raise UserError(f"{name}={text!r} is not of the form 2(x3),1")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts


def _master(env: Mapping[str, str]) -> str:
    """MASTER_ADDR and MASTER_PORT, else the first host of the step and a port by job and step."""
    nodes = env.get("SLURM_STEP_NODELIST") or env.get("SLURM_JOB_NODELIST") or env.get("SLURM_NODELIST") or ""
    host = env.get("MASTER_ADDR") or next(hosts(nodes) if nodes else iter(()), "")
    if not host:
        raise UserError(
            "srun set SLURM_PROCID but no SLURM_STEP_NODELIST (a container that hides it?): "
            "set MASTER_ADDR and MASTER_PORT"
        )
    job, step = number(env, "SLURM_JOB_ID", 0), number(env, "SLURM_STEP_ID")
    port = number(env, "MASTER_PORT", 20000 + (job * 7 + step) % 12000)  # below those that Linux hands out by itself
    if not 0 < port < 65536:
        raise UserError(f"MASTER_PORT={port} is no port: choose one from 1024 to 65535")
    return f"{host}:{port}"


def facts(env: Mapping[str, str]) -> dict[str, str | int]:
    """What tells one incarnation of a job from another: {} outside of Slurm."""
    if "SLURM_JOB_ID" not in env:
        return {}
    found: dict[str, str | int] = {"job": env["SLURM_JOB_ID"], "restarts": number(env, "SLURM_RESTART_COUNT", 0)}
    return found | ({"nodes": env["SLURM_JOB_NODELIST"]} if "SLURM_JOB_NODELIST" in env else {})
