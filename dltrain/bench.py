"""What exactness and comfort cost, measured: `python -m dltrain.bench [overhead|tree|guard] [--json FILE]`.

overhead   steps per second of `fit` over a hand-written PyTorch loop that does the same work, BERT tiny, one process
tree       seconds per step with the lanes' tree over the backend's own reduction, two processes, ddp and fsdp
guard      seconds per step of `fit` with `--on-bad skip --spike 6` over those without a guard, BERT tiny, one process

Both sides of a comparison run in one process, interleaved in short turns; a ratio is the median over turns, with the
quartiles.
"""

import contextlib
import dataclasses
import datetime
import io
import multiprocessing as mp
import os
import platform
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from dltrain import rundir
from dltrain.data.loader import Loader, Rows
from dltrain.data.order import Order
from dltrain.guard import WINDOW, Guard
from dltrain.launch import Launch
from dltrain.loop import fit
from dltrain.optim import adamw
from dltrain.recipes import bert_pretrain as bert
from dltrain.run import Run
from dltrain.schedules import linear
from dltrain.seeds import seed_step
from dltrain.strategy import Lanes


def overhead(turns: int = 60, steps: int = 10) -> dict[str, Any]:
    """`fit` and the bare loop take turns of `steps` steps: the schedule, which fit asks at each step, hands over."""
    cfg = dataclasses.replace(bert.PRESETS["tiny"], steps=(turns + 1) * steps, log_every=10, save_every=0, eval_every=0)
    rows, _ = bert.data(cfg)
    spent: dict[str, list[float]] = {"fit": [], "bare": []}
    began = 0.0
    bare = _bare_loop(cfg, rows)

    def schedule(step: int) -> float:
        nonlocal began
        if step % steps == 0:
            if step > 0:
                spent["fit"].append(time.perf_counter() - began)
            start = time.perf_counter()
            for _ in range(steps):
                next(bare)
            spent["bare"].append(time.perf_counter() - start)
            began = time.perf_counter()
        return linear(cfg.warmup, cfg.steps)(step)

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        Run(dataclasses.replace(cfg, out=f"{folder}/run")) as run,
    ):
        task, optimizer = run.prepare(lambda: bert.PretrainBert(bert.model_config(cfg)), adamw(cfg.lr))
        fit(run, task, optimizer, schedule, run.batches(rows))
    pairs = list(zip(spent["bare"][1:], spent["fit"][1:], strict=False))  # the first turn warms up
    return {
        "what": "steps/s of fit over a bare PyTorch loop, BERT tiny, 1 process, 1 thread",
        "fit_steps_per_second": steps / statistics.median(f for _, f in pairs),
        "bare_steps_per_second": steps / statistics.median(b for b, _ in pairs),
        **_ratio([b / f for b, f in pairs]),
        "goal": ">= 0.97",
    }


def _bare_loop(cfg: bert.Config, rows: Rows) -> Iterator[None]:
    """What one writes by hand: the same rows in the same order, model, loss, clipping and optimizer."""
    torch.manual_seed(cfg.seed)
    model = bert.PretrainBert(bert.model_config(cfg))
    optimizer = adamw(cfg.lr)(model)
    schedule, order = linear(cfg.warmup, cfg.steps), Order(len(rows), cfg.seed)
    for step in range(1 << 30):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * schedule(step)
        batch = rows.batch(*order.at(np.arange(step * cfg.batch, (step + 1) * cfg.batch)))
        loss = model(batch)["loss"] / batch["count"]
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), cfg.clip)
        optimizer.step()
        optimizer.zero_grad()
        if step % cfg.log_every == 0:
            print(f"step {step} loss {loss.item()} norm {norm.item()}")
        yield


class _Unguarded:
    """Finds every step good, and asks nothing."""

    at_once, good = True, torch.tensor(True)

    def skips(self, step: int) -> bool:
        return False

    def judge(self, *ignored: Any) -> torch.Tensor:
        return self.good

    def look(self) -> None: ...


def guard(turns: int = 60, steps: int = 5) -> dict[str, Any]:
    """Steps with the guard and without take turns of `steps` in one run; its own time is taken beside."""
    total = (2 * (turns + 1) + 1) * steps + WINDOW  # the guard is back at the end
    cfg = dataclasses.replace(bert.PRESETS["tiny"], steps=total, log_every=total, save_every=0, eval_every=0)
    rows, _ = bert.data(cfg)
    spent: dict[str, list[float]] = {"guarded": [], "unguarded": []}
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        Run(dataclasses.replace(cfg, out=f"{folder}/run", on_bad="skip", spike=6.0)) as run,
    ):
        task, optimizer = run.prepare(lambda: bert.PretrainBert(bert.model_config(cfg)), adamw(cfg.lr))
        sides: dict[str, Any] = {"guarded": run.guard, "unguarded": _Unguarded()}
        began = 0.0

        def schedule(step: int) -> float:
            nonlocal began
            turn, place = divmod(step - WINDOW, steps)
            if turn >= 0 and place == 0:  # the window of losses is full
                now = time.perf_counter()
                if turn > 0:
                    spent[list(sides)[(turn - 1) % 2]].append((now - began) / steps)
                run.guard = sides[list(sides)[turn % 2]]
                began = time.perf_counter()
            return linear(cfg.warmup, cfg.steps)(step)

        fit(run, task, optimizer, schedule, run.batches(rows))
        own = _seconds_of(sides["guarded"])
    pairs = list(zip(spent["guarded"][1:], spent["unguarded"][1:], strict=False))
    step_seconds = statistics.median(u for _, u in pairs)
    return {
        "what": "seconds per step of fit with on_bad skip and spike 6 over no guard, BERT tiny, 1 process, 1 thread",
        "unguarded_step_seconds": step_seconds,
        "guard_seconds": own,
        "guard_share": own / step_seconds,
        **_ratio([g / u for g, u in pairs]),
        "goal": "<= 1.01",
    }


def _seconds_of(guard: Guard, calls: int = 2000) -> float:
    """What judging a step takes by itself."""
    sums, loss, norm = torch.ones(8, dtype=torch.float64), *torch.ones(2, dtype=torch.float64)
    began = time.perf_counter()
    for step in range(calls):
        torch.where(guard.judge(step, loss, norm, sums[:0]), sums, 0.0)
        guard.look()
    return (time.perf_counter() - began) / calls


def tree(turns: int = 30, steps: int = 3) -> dict[str, Any]:
    """Two gloo processes with one thread each; tree and backend take turns in the same processes."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    context = mp.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    ranks = [context.Process(target=_tree_rank, args=(r, port, turns, steps, theirs)) for r in range(2)]
    for process in ranks:
        process.start()
    theirs.close()  # so that a rank that dies ends the wait
    found = ours.recv()
    for process in ranks:
        process.join()
    return found


def _tree_rank(rank: int, port: int, turns: int, steps: int, pipe: Any) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    cfg = dataclasses.replace(bert.PRESETS["tiny"], batch=32, lanes=2, precision="fp32")
    rows, _ = bert.data(cfg)
    found: dict[str, Any] = {"what": "seconds per step, tree over backend's own, BERT tiny, 2 gloo processes, batch 32"}
    for strategy in ("ddp", "fsdp"):
        sides = {n: _stepper(dataclasses.replace(cfg, strategy=strategy, lanes=n), rows, rank) for n in (2, 0)}
        spent: dict[int, list[float]] = {2: [], 0: []}
        for turn in range(turns + 2):
            for lanes, side in sides.items():
                dist.barrier()
                start = time.perf_counter()
                for _ in range(steps):
                    next(side)
                if turn >= 2:
                    spent[lanes].append((time.perf_counter() - start) / steps)
        found[strategy] = {
            "tree_step_seconds": statistics.median(spent[2]),
            "backend_step_seconds": statistics.median(spent[0]),
            **_ratio([a / b for a, b in zip(spent[2], spent[0], strict=True)]),
        }
    found["goal"] = "<= 1.05"
    if rank == 0:
        pipe.send(found)
    dist.barrier()
    dist.destroy_process_group()


def _stepper(cfg: bert.Config, rows: Rows, rank: int) -> Iterator[None]:
    """Whole training steps of one strategy, data and all."""
    strategy = Lanes(cfg, Launch("torchrun", rank, 2, rank, 2, "127.0.0.1:0"), torch.device("cpu"))
    task, _ = strategy.prepare(lambda: bert.PretrainBert(bert.model_config(cfg)), adamw(cfg.lr))
    loader = Loader(rows, Order(len(rows), 0), batch=cfg.batch, lanes=2, micro_batch=cfg.batch // 2, workers=0)
    for step, micros in enumerate(loader.steps(0, 1 << 30, [rank])):
        count = torch.tensor(0.0, dtype=torch.float64)
        for micro in micros:
            seed_step(0, step, micro.lane, micro.part)
            strategy.forward_of(True)
            strategy.backward(task(micro.batch)["loss"], micro.lane, True)
            count += micro.batch["count"]
        dist.all_reduce(count)
        strategy.reduce(count, cfg.clip)
        strategy.step()
        yield


def _ratio(values: list[float]) -> dict[str, float]:
    low, middle, high = statistics.quantiles(values, n=4)
    return {"ratio": middle, "ratio_lower_quartile": low, "ratio_upper_quartile": high, "turns": len(values)}


def main() -> None:
    """Run what is asked for (all by default) and print it; with date, hardware and versions also to --json FILE."""
    arguments = sys.argv[1:]
    target = None
    if "--json" in arguments:
        at = arguments.index("--json")
        target = Path(arguments[at + 1])
        del arguments[at : at + 2]
    benches = {"overhead": overhead, "tree": tree, "guard": guard}
    if unknown := set(arguments) - set(benches):
        raise SystemExit(f"no benchmark {', '.join(unknown)}: there are {', '.join(benches)}")
    found = {name: benches[name]() for name in arguments or benches}
    found["measured"] = {
        "date": datetime.date.today().isoformat(),
        "cpu": rundir.cpu(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "command": f"python -m dltrain.bench {' '.join(sys.argv[1:])}".strip(),
    }
    print(rundir.encode(found, indent=2))
    if target:
        rundir.write_json(target, found)


if __name__ == "__main__":
    main()
