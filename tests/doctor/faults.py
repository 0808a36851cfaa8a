"""Twelve ways to hang, each put into a small training run of two or three ranks; and slow runs that are well."""

import ctypes
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch.distributed as dist
from toy import Config, Toy, ToyRows

from dltrain.evaluation import evaluate
from dltrain.loop import fit
from dltrain.optim import adamw
from dltrain.run import Run

AT = 3  # the step that hangs
LONG = 3600.0


@dataclass(frozen=True)
class Fault:
    """`ranks` are to be named, as `kind`, with `words` in what is printed. `act` is what every rank does before step
    AT; `started` is how many of the `world` ranks there are."""

    world: int
    ranks: tuple[int, ...]
    kind: str
    words: str
    act: Callable[[Run, "Victim"], None] = lambda run, task: None
    started: int = 0
    workers: int = 0
    save_every: int = 0
    strategy: Literal["auto", "single", "ddp", "fsdp", "zero2"] = "auto"


class Victim(Toy):
    """Waits for `lock` in forward, if it is given one."""

    lock: Any = None

    def forward(self, batch):
        if self.lock:
            self.lock.acquire()
        return super().forward(batch)


class Rows(ToyRows):
    """Reads from the pipe `fifo`, which nobody writes to, where there is one; `pause` seconds a micro-batch."""

    fifo, pause = "", 0.0

    def batch(self, epoch_M, index_M):
        time.sleep(self.pause)
        if self.fifo and os.path.exists(self.fifo):
            os.read(os.open(self.fifo, os.O_RDWR), 1)
        return super().batch(epoch_M, index_M)


def on(rank: int, act: Callable[[], object]) -> Callable[[Run, Victim], None]:
    """Only one rank does it."""
    return lambda run, task: act() if run.me.rank == rank else None  # type: ignore[return-value]


def stop() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def hold_gil() -> None:
    ctypes.PyDLL(None).sleep(int(LONG))


def skip_collective(run: Run, task: Victim) -> None:
    if run.me.rank != 1:
        dist.barrier()


def other_collective(run: Run, task: Victim) -> None:
    if run.me.rank == 1:
        dist.barrier()
    else:
        run.gather(0)


def evaluate_alone(run: Run, task: Victim) -> None:
    if run.me.rank == 1:
        evaluate(run, task, Rows(31))
    run.save()


def workers_of_loader() -> list[int]:
    """Grandchildren: those that the loader's server has started."""
    from dltrain.doctor import proc

    children = {p.pid for p in proc.family(os.getpid()) if p.parent == os.getpid()}
    return [p.pid for p in proc.family(os.getpid()) if p.parent in children]


def signal_workers(number: int) -> None:
    for pid in workers_of_loader():
        os.kill(pid, number)


def block_reads(run: Run, task: Victim) -> None:
    if run.me.rank == 1:
        os.mkfifo(Path(run.cfg.out) / "fifo-1")


def block_fsync(run: Run, task: Victim) -> None:
    def never(handle: int) -> None:
        time.sleep(LONG)

    if run.me.rank == 1:
        os.fsync = never


def take_lock(run: Run, task: Victim) -> None:
    if run.me.rank == run.me.world - 1:
        Victim.lock = threading.Lock()
        Victim.lock.acquire()


FAULTS = {
    "rank 1 stopped": Fault(2, (1,), "stopped", "is stopped by a signal", on(1, stop)),
    "rank 0 stopped": Fault(2, (0,), "stopped", "is stopped by a signal", on(0, stop)),
    "GIL held": Fault(2, (1,), "gil", "in hold_gil", on(1, hold_gil)),
    "collective skipped": Fault(3, (1,), "mismatch", "are in barrier", skip_collective),
    "another collective": Fault(3, (1,), "mismatch", "is in barrier", other_collective),
    "evaluation on one rank": Fault(3, (1,), "mismatch", "evaluation.py", evaluate_alone),
    "loader worker killed": Fault(  # torch itself finds out within 5 s, and the rank ends: no hang
        2, (1,), "", "of the data loader is dead", on(1, lambda: signal_workers(signal.SIGKILL)), workers=1
    ),
    "loader worker stopped": Fault(
        2, (1,), "loader", "is stopped by a signal", on(1, lambda: signal_workers(signal.SIGSTOP)), workers=1
    ),
    "read blocked": Fault(2, (1,), "loader", "is blocked in read of /", block_reads, strategy="zero2"),
    "fsync blocked": Fault(2, (1,), "disk", "checkpoint", block_fsync, save_every=AT + 1),
    "lock": Fault(2, (1,), "lock", "self.lock.acquire()", take_lock, strategy="fsdp"),
    "alone": Fault(1, (0,), "lock", "self.lock.acquire()", take_lock),
    "rank 2 missing": Fault(3, (2,), "missing", "never arrived", started=2),
}


def config(out: Path, fault: Fault, grace: int, steps: int) -> Config:
    return Config(
        out=str(out), steps=steps, workers=fault.workers, save_every=fault.save_every, hang_exit=grace, lanes=6,
        eval_every=0, log_every=1000, strategy=fault.strategy,
    )  # fmt: skip


def train(out: Path, name: str, grace: int = 3, steps: int = 100_000) -> None:
    """One rank of a run that hangs. It writes the time of the fault into `out`."""
    fault = FAULTS[name]
    cfg = config(out, fault, grace, steps)
    log = os.open(out / "stderr", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    if fault.started:
        (out / f"hangs-{os.environ['RANK']}").write_text(str(time.time()))
    rows = Rows()
    rows.fifo = f"{out}/fifo-{os.environ['RANK']}"

    with Run(dataclasses.replace(cfg)) as run:
        task, optimizer = run.prepare(lambda: Victim(cfg.dropout), adamw(1e-2))
        data = run.batches(rows)

        def schedule(step: int) -> float:
            time.sleep(0.05)
            if step == AT:
                (out / f"hangs-{run.me.rank}").write_text(str(time.time()))
                fault.act(run, task)  # type: ignore[arg-type]
            return 1.0

        fit(run, task, optimizer, schedule, data)
