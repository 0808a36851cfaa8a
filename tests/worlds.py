"""Start worlds of processes cheaply: from a fork server that has imported torch and dltrain, a rank starts at once."""

import functools
import multiprocessing as mp
import os
import socket
import traceback
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

_context = mp.get_context("forkserver")
os.environ["DS_ACCELERATOR"] = "cpu"
_context.set_forkserver_preload(
    [
        "toy", "torch._dynamo", "torch.utils.tensorboard", "deepspeed", "webdataset.compat", "dltrain.data.loader",
        "matplotlib.figure", "matplotlib.backends.backend_agg", "matplotlib.backends.backend_svg",
    ]
)  # fmt: skip


@functools.cache
def serve() -> None:
    """Start the fork server. It looks for modules in the folders of PYTHONPATH, not in ours: without `tests` there it
    imports nothing, says nothing, and every rank imports everything."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(Path(__file__).parent), before]))
    try:
        forkserver.ensure_running()
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


class Died(Exception):
    """A rank ended without a result."""


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def start(
    world: int,
    work: Callable[..., Any],
    *args: Any,
    local_world: int = 0,
    env: dict | None = None,
    ranks: Sequence[int] | None = None,
) -> tuple[list[Any], list[Any]]:
    """Start work(*args) in `world` processes (of which only `ranks`) with torchrun's environment; the pipes that will
    have the results, and the processes."""
    serve()
    port, results, processes = free_port(), [], []
    for rank in range(world) if ranks is None else ranks:
        local = local_world or world
        variables = {
            "RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % local, "LOCAL_WORLD_SIZE": local,
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": 1,
        }  # fmt: skip
        ours, theirs = _context.Pipe(duplex=False)
        strings = {k: str(v) for k, v in {**variables, **(env or {})}.items()}
        process = _context.Process(target=_rank, args=(theirs, strings, work, args))
        process.start()
        theirs.close()
        processes.append(process)
        results.append(ours)
    return results, processes


def launch(
    world: int, work: Callable[..., Any], *args: Any, local_world: int = 0, env: dict | None = None
) -> list[Any]:
    """Call work(*args) in `world` processes with torchrun's environment; the results in rank order.

    Raises Died with the exit codes or the first traceback if one of them does not return.
    """
    results, processes = start(world, work, *args, local_world=local_world, env=env)
    answers: list[Any] = []
    for ours in results:
        try:
            answers.append(ours.recv() if ours.poll(120) else ("hung", None))
        except EOFError:
            answers.append(("died", None))
    for process in processes:
        process.join(20)
        if process.is_alive():
            process.kill()
    for kind, value in answers:
        if kind == "error":
            raise Died(value)
    if any(kind != "ok" for kind, _ in answers):
        raise Died(f"{[kind for kind, _ in answers]}, exit codes {[p.exitcode for p in processes]}")
    return [value for _, value in answers]


def _rank(pipe: Any, variables: dict[str, str], work: Callable[..., Any], args: tuple) -> None:
    os.environ.update(variables)
    try:
        pipe.send(("ok", work(*args)))
    except BaseException:
        pipe.send(("error", traceback.format_exc()))
