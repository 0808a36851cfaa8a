"""A run's past and future: its directory held and described, its newest checkpoint restored, a new one saved, a leave.

What `Run` stands on. The steps are in run.py.
"""

import dataclasses
import os
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch import Tensor

from dltrain import checkpoint, config, heal, launch, rundir, skipped, slurm
from dltrain.config import Config
from dltrain.damage import LeftOut, tell
from dltrain.data.loader import Loader
from dltrain.errors import UserError
from dltrain.fence import Fence
from dltrain.guard import Bad, Guard
from dltrain.log import Log, NullLog
from dltrain.signals import STOPPED, Signals
from dltrain.skipped import Skipped
from dltrain.speed import Speed
from dltrain.strategy import Lanes
from dltrain.world import World


class Resumable(World):
    """A run among its processes that can end and go on. `step_done` optimizer steps are in the weights."""

    signals: Signals
    speed: Speed
    strategy: Lanes
    threads: int

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = launch.honour(cfg, os.environ)
        self.step_done = 0
        self.loader: Loader | None = None
        self.log: Log | NullLog = NullLog()
        self._saving: threading.Thread | None = None
        self._saved_step = -1
        self.window: Tensor | None = None  # sums, damaged rows and count since the last report
        self.left_out = LeftOut()
        self.bad: Bad | None = None  # a step to go back from
        self.fence: Fence | None = None  # of the first process
        self.unevaluated = False  # a signal cut the evaluation of the restored step: it is to be done again

    def resolve(self) -> None:
        """Settle what the configuration leaves open, from the run's own past where it has one."""
        self.before = self.first(lambda: _recorded(Path(self.cfg.out)))
        try:
            self.cfg, self.threads = config.settle(self.cfg, self.me.world, self.me.local_world, self.before)
        except UserError as error:
            raise self.alike(error) from None
        torch.set_num_threads(self.threads)  # launchers set it differently

    def open(self) -> None:
        """Hold the run directory, restore the newest whole checkpoint if there is one, begin to log."""
        self.token = self.first(self._open)
        out = Path(self.cfg.out)
        self.skipped = Skipped(out, self.first(lambda: skipped.read(out)))
        self.guard = Guard(self.cfg, self.device, self.skipped)
        self.restore()
        self.start_log()

    def _open(self) -> int:
        """On the first process: hold the directory, describe the run, greet. Returns the hold's token."""
        out, recipe = Path(self.cfg.out), config.recipe_name(self.cfg)
        settled = dataclasses.asdict(self.cfg) | {"threads": self.threads}
        processes = f"{self.me.world} process{'es' if self.me.world > 1 else ''} by {self.me.by}"
        if self.me.by == "accelerate" and self.me.world == 1 and self.device.type == "cpu":
            processes += " (which starts several on CPUs with --multi_gpu only)"
        print(f"{recipe}  config {config.digest(rundir.plain(settled))}  {self.device.type}, {processes}")
        fields = "  ".join(f"{k}={v}" for k, v in settled.items())
        print(
            textwrap.fill(fields, 118, initial_indent="  ", subsequent_indent="  ", break_on_hyphens=False), flush=True
        )
        command = [sys.executable, *sys.argv]
        try:
            out.mkdir(parents=True, exist_ok=True)
            self.fence = Fence(out)
            rundir.describe(out, recipe=recipe, config=settled, command=command)
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from None
        if 0 < self.before.get("lanes", -1) < self.cfg.lanes:
            said = f"{self.before['lanes']} lanes became {self.cfg.lanes}, one a process: other bits from here on"
            print(said, flush=True)
            rundir.append_event(out, "lanes", before=self.before["lanes"], now=self.cfg.lanes)
        return self.fence.token

    def restore(self) -> None:
        """To the newest whole checkpoint; `restored` is its state, {} where there is none."""

        def passed_over(path: Path, why: str) -> None:
            if self.me.rank == 0:
                print(f"skipping {path}: {why}", file=sys.stderr, flush=True)
                rundir.append_event(Path(self.cfg.out), "skipped", checkpoint=path.name, reason=why)

        folder = Path(self.cfg.out) / "checkpoints"
        found = checkpoint.restore(folder, self.strategy.templates, passed_over, self.group)
        self.restored: dict[str, Any] = {}
        if found is None:
            return
        self.restored, tensors = found
        self.strategy.loaded(tensors)
        self.strategy.restore(self.restored["strategy"])
        self.unevaluated = self.restored["unevaluated"]
        self.left_out.restore(self.restored["left_out"])
        self.step_done = self._saved_step = self.restored["step"]
        self.guard.restore(self.restored.get("guard", {}))
        sums = self.restored["window"]
        self.window = sums if sums is None else torch.tensor(sums, dtype=torch.float64, device=self.device)

    def start_log(self) -> None:
        """From the restored step on: later rows are dropped."""
        resumed = self.step_done if self.restored else None
        if self.me.rank == 0:
            unit = "tokens" if self.speed.row_tokens else "rows"
            self.log = Log(
                Path(self.cfg.out), total_steps=self.cfg.steps, unit=unit, wandb=self.cfg.wandb, resumed=resumed,
                rows=self.restored.get("rows"),
            )  # fmt: skip
            if resumed is not None:
                facts = {"world": self.me.world, "strategy": self.cfg.strategy, "by": self.me.by}
                self.log.event("resume", step=resumed, **facts, **slurm.facts(os.environ))

    def look(self) -> None:
        """Learn how the step judged last was."""
        bad = heal.look(self)
        self.bad = self.bad or bad  # what came after it was its doing

    def save(self) -> None:
        """Publish a checkpoint of the step just done; with save_async, training goes on while it is written."""
        self.speed.mark("rest")
        self.settle()
        self.log.flush()
        folder = Path(self.cfg.out) / "checkpoints"
        if self._saved_step == self.step_done:
            return
        self.look()
        if self.bad:  # not to be saved: the step's end goes back
            return
        self.share_damage()
        self._saved_step = self.step_done
        info = {
            "strategy": self.strategy.state(),
            "data": self.loader.state(self.step_done) if self.loader else {},
            "left_out": self.left_out.state(),
            "rows": self.log.rows,
            "unevaluated": self.unevaluated,
            "guard": self.guard.state(),
            "window": self.window if self.window is None else self.window.tolist(),
            "written_by": {"strategy": self.cfg.strategy, "world": self.me.world, "torch": torch.__version__},
        }
        step, log = self.step_done, self.log
        self._saving = checkpoint.save(
            folder, step, self.strategy.tensors(), info, keep=self.cfg.keep, group=self.group,
            published=lambda path: log.event("save", step=step, checkpoint=path.name),
            background=self.cfg.save_async, check=self.fence.check if self.fence else lambda: None, token=self.token,
        )  # fmt: skip
        self.speed.saved = time.monotonic()
        self.speed.mark("checkpoint")

    def weights(self) -> dict[str, Tensor]:
        """The newest checkpoint's whole weights by parameter name, on the CPU."""
        return checkpoint.read(checkpoint.steps(Path(self.cfg.out) / "checkpoints")[-1])

    def settle(self, quiet: bool = False) -> None:
        """Wait for a checkpoint that is still being written."""
        if self._saving is not None:
            thread, self._saving = self._saving, None
            try:
                thread.join()
            except UserError:
                if not quiet:
                    raise

    def share_damage(self, always: bool = False) -> int:
        """How many rows of the window were damaged; if any (or `always`) all ranks tell one another which."""
        damaged = 0 if self.window is None else int(self.window[-2])
        if damaged or always:
            tell(self.left_out.share(self.gather), self.log.event if self.me.rank == 0 else None)
        return damaged

    def leave_unevaluated(self) -> None:
        """In the midst of an evaluation, by all processes: if a signal came to any, save the step without it and leave;
        the next launch has `unevaluated` set and begins with this evaluation."""
        noted = torch.tensor(int(bool(self.signals.name)), device=self.device)
        if self.me.world > 1:
            dist.all_reduce(noted, dist.ReduceOp.MAX)  # not in `group`, where a checkpoint may be under way
        if noted:
            self.unevaluated = True
            self.leave_by_signal()

    def leave_by_signal(self) -> NoReturn:
        """All processes: save the step that is done, and leave with the exit code that says so."""
        if self.step_done:
            self.save()
            self.settle()
        name = self.signals.name or "a signal to another rank"
        self.log.event("signal", signal=name, step=self.step_done)
        if self.me.rank == 0:
            saved = "saved; the same command goes on" if self.step_done else "nothing to save; the same command begins"
            print(f"stopped by {name} after step {self.step_done}, {saved}", flush=True)
            if told := os.environ.get("DLTRAIN_STOPPED"):  # a batch script, which need not hear the exit code
                Path(told).write_text(f"{name} after step {self.step_done}\n")
        raise SystemExit(130 if name == "SIGINT" else STOPPED)


def _recorded(out: Path) -> dict[str, Any]:
    """The configuration of the run in `out`, {} if there is none."""
    if not out.name:
        raise UserError("out (the run directory) is empty: give --out DIR")
    return rundir.read_json(out / "config.json")["config"] if (out / "config.json").exists() else {}
