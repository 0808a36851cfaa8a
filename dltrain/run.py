"""Run: the process among its fellows, its device, seeds, run directory, step counter and signals.

The only object that knows a rank. A loop is the recipe's own; these verbs make it resumable, exact and quiet:

    with Run(cfg) as run:
        task, optimizer = run.prepare(build_task, build_optimizer)      # wrapped, filled, restored
        data = run.batches(rows)
        for step in run.steps():                                        # from the restored step on
            for batch in run.lanes(data):                               # this process's share, in micro-batches
                run.backward(task(batch))                               # sums over the micro-batch
            norm = run.step()                                           # the tree, one division, the clip, the update
            if run.due(cfg.save_every): run.save()
"""

import contextlib
import dataclasses
import os
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dltrain import checkpoint, config, launch, rundir
from dltrain.config import Config
from dltrain.damage import LeftOut, tell
from dltrain.data.loader import Loader, Rows
from dltrain.data.order import Order, Ordering
from dltrain.data.ramp import Ramp
from dltrain.errors import UserError
from dltrain.lanes import all_gather
from dltrain.log import Log, NullLog
from dltrain.seeds import key, seed_step
from dltrain.signals import Signals
from dltrain.speed import Speed
from dltrain.strategy import Lanes
from dltrain.world import World

STOPPED = 75  # exit code of a run that a signal stopped and that can go on: EX_TEMPFAIL of sysexits.h


class Run(World):
    """One launch of a run. `cfg` is resolved on entry: out, lanes, strategy and precision are what will be used.

    Raises:
        UserError: for an impossible combination, all conflicts at once; for a run directory of another configuration;
            for ranks that disagree.
    """

    def __init__(self, cfg: Config):
        super().__init__()
        self.cfg = launch.honour(cfg, os.environ)
        self.step_done = 0  # optimizer steps that are in the weights
        self.loader: Loader | None = None
        self.leaving = contextlib.ExitStack()
        self._saving: threading.Thread | None = None
        self._saved_step = -1
        self.window: Tensor | None = None  # sums, damaged rows and count since the last report
        self.left_out = LeftOut()

    def __enter__(self) -> "Run":
        self.join()
        self.agree(self.cfg)
        self._resolve()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore  # a debugging aid, 2% of a step
        torch.backends.cudnn.benchmark = False
        if self.cfg.strategy not in ("single", "ddp") or self.cfg.precision != "fp32":
            self.join_alone()
        self.signals = Signals(say=self.me.rank == 0)
        self.speed = Speed(self.device, self.me.world, self.cfg.precision)
        self.log = NullLog()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.leaving.close()
        self.settle(quiet=error is not None)
        self.log.close()
        self.signals.restore()
        if not dist.is_initialized():
            return
        if error is None or isinstance(error, SystemExit):
            dist.barrier()  # without it a peer that still talks dies of the closed connection
            dist.destroy_process_group()
        elif self.me.world > 1 and not isinstance(error, UserError):
            sys.excepthook(kind, error, trace)  # type: ignore[arg-type]
            config.leave(1)  # the others may wait for this one in a collective: do not wait for them

    def _resolve(self) -> None:
        self.before = self.first(lambda: _recorded(Path(self.cfg.out)))
        try:
            self.cfg, self.threads = config.settle(self.cfg, self.me.world, self.me.local_world, self.before)
        except UserError as error:
            raise self.alike(error) from None
        torch.set_num_threads(self.threads)  # launchers set it differently

    # --- the task, its data, its past ----------------------------------------------------------------------------

    def prepare(
        self,
        build_task: Callable[[], nn.Module],
        build_optimizer: Callable[[nn.Module], Optimizer],
        weights: Callable[[], dict[str, Tensor]] | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        """Build, wrap and fill the task under the strategy, and restore the newest whole checkpoint if there is one.

        `weights` gives whole tensors by parameter name for a run that begins from another model's.
        """
        if self.cfg.strategy.startswith("zero"):
            from dltrain.zero import Zero

            self.strategy: Lanes = Zero(self.cfg, self.me, self.device)  # type: ignore[assignment]
        else:
            self.strategy = Lanes(self.cfg, self.me, self.device)
        self.task, self.optimizer = self.strategy.prepare(build_task, build_optimizer, weights)
        self.first(self._open)
        self._restore()
        self._start_log()
        return self.task, self.optimizer

    def _open(self) -> None:
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
            rundir.describe(out, recipe=recipe, config=settled, command=command)
        except OSError as error:
            raise UserError(f"{out} cannot be written ({error.strerror}): choose another --out") from None
        if 0 < self.before.get("lanes", -1) < self.cfg.lanes:
            said = f"{self.before['lanes']} lanes became {self.cfg.lanes}, one a process: other bits from here on"
            print(said, flush=True)
            rundir.append_event(out, "lanes", before=self.before["lanes"], now=self.cfg.lanes)

    def _restore(self) -> None:
        folder, skipped = Path(self.cfg.out) / "checkpoints", []
        found = self.first(lambda: checkpoint.newest(folder, lambda path, why: skipped.append((path, why))))
        for path, why in skipped:
            print(f"skipping {path}: {why}", file=sys.stderr, flush=True)
            rundir.append_event(Path(self.cfg.out), "skipped", checkpoint=path.name, reason=why)
        self.restored: dict[str, Any] = {}
        if found is None:
            return
        path, self.restored = found
        tensors = self.strategy.templates()
        checkpoint.load(path, tensors, self.group)
        self.strategy.loaded(tensors)
        self.strategy.restore(self.restored["strategy"])
        self.left_out.restore(self.restored["left_out"])
        self.step_done = self._saved_step = self.restored["step"]
        if self.restored["window"] is not None:
            self.window = torch.tensor(self.restored["window"], dtype=torch.float64, device=self.device)

    def _start_log(self) -> None:
        resumed = self.step_done if self.restored else None
        if self.me.rank == 0:
            unit = "tokens" if self.speed.row_tokens else "rows"
            self.log = Log(
                Path(self.cfg.out), total_steps=self.cfg.steps, unit=unit, wandb=self.cfg.wandb, resumed=resumed
            )
            if resumed is not None:
                self.log.event("resume", step=resumed, world=self.me.world, strategy=self.cfg.strategy, by=self.me.by)

    def batches(
        self, rows: Rows, order: Ordering | None = None, ramp: Sequence[tuple[int, int]] | None = None
    ) -> Iterator[list[Any]]:
        """Training data from the restored position on: a list of this process's micro-batches for every step.

        `order` is a shuffle of all rows by `cfg.seed` unless another is given (`data.order.Windowed`, `data.mix.Mix`);
        `ramp` is a batch size that grows with the samples seen (`data.ramp.Ramp`), instead of `cfg.batch`.
        """
        n, cfg = self.strategy.lanes, self.cfg
        sizes = Ramp(ramp or ((0, cfg.batch),))
        micro = cfg.micro_batch or min(size for _, size in sizes.sizes) // n
        loader = Loader(
            rows, order or Order(len(rows), key("order", cfg.seed)), batch=sizes, lanes=n, micro_batch=micro,
            workers=cfg.workers, pin=self.device.type == "cuda",
        )  # fmt: skip
        if self.restored:
            loader.check(self.restored["data"])
        self.loader = loader
        mine = [min(lane, n - 1) for lane in self.strategy.mine]
        steps = loader.steps(self.step_done, cfg.steps, mine)
        self.leaving.callback(steps.close)  # ends the workers
        return steps

    # --- the step ------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps still to do. After a signal to any rank, all save the step they are in and leave (exit code 75)."""
        self.speed.begin(self.step_done)
        while self.step_done < self.cfg.steps:
            yield self.step_done
            if self.step_done < self.cfg.steps and self._stopped():
                self._leave_by_signal()

    def lanes(self, data: Iterator[list[Any]]) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches of the step, on its device, each with its own random numbers."""
        began = time.perf_counter()
        micros = next(data)
        self.speed.wait(time.perf_counter() - began)
        parts, n = micros[0].parts, self.strategy.lanes
        lanes = [self.strategy.mine[i // parts] for i in range(len(micros))]
        self.strategy.begin(sum(int(m.batch["count"]) for m, lane in zip(micros, lanes, strict=True) if lane < n))
        self.sums: dict[int, Tensor] = {}
        for micro, lane in zip(micros, lanes, strict=True):
            self._at = (lane, micro.part == parts - 1)
            self._counts = [float(len(micro.damaged)), float(micro.batch["count"])]
            self.left_out.note(self.step_done + 1, micro.damaged if lane < n else [])
            seed_step(self.cfg.seed, self.step_done, min(lane, n - 1), micro.part)
            self.strategy.forward_of(self._at[1])
            yield {k: v.to(self.device, non_blocking=True) for k, v in micro.batch.items()}

    def backward(self, sums: dict[str, Tensor]) -> None:
        """Take an objective's sums over the micro-batch; `sums["loss"]` is what is trained."""
        lane, last = self._at
        self.names = sorted(sums)
        values = torch.stack([sums[k].detach().double() for k in self.names])
        extra = values.new_tensor([*self._counts, float(bool(self.signals.name))])
        values = torch.cat([values, extra])
        self.sums[lane] = self.sums[lane] + values if lane in self.sums else values
        self.strategy.backward(sums["loss"], lane, last)

    def step(self) -> Tensor:
        """Combine the lanes, divide once by the global count, clip, update. Returns the gradient's norm."""
        self.total = self._add_lanes([self.sums[lane] for lane in self.strategy.mine])
        self.window = self.total[:-1] if self.window is None else self.window + self.total[:-1]
        self.norm = self.strategy.step(self.total[-2], self.cfg.clip)
        self.step_done += 1
        self.log.tick(self.step_done)
        return self.norm

    def _add_lanes(self, mine: list[Tensor]) -> Tensor:
        """Every lane's sums, gathered and added in the lanes' order."""
        n, world = self.strategy.lanes, self.me.world
        if world == 1:
            return torch.stack(mine).sum(0)
        width = -(-n // world)
        mine += [torch.zeros_like(mine[0])] * (width - len(mine))
        everyone = mine[0].new_empty(world * width, mine[0].numel())
        all_gather(everyone, torch.stack(mine))
        where = {lane: r * width + i for r in range(world) for i, lane in enumerate(self.strategy.deal(n, world, r))}
        return everyone[[where[lane] for lane in range(n)]].sum(0)

    def means(self) -> dict[str, float]:
        """The sums since the last call over their global count: waits for the device."""
        assert self.window is not None
        values, self.window = (self.window[:-2] / self.window[-1]).tolist(), None
        return dict(zip(self.names, values, strict=True))

    def due(self, every: int) -> bool:
        """Whether the step just done is a multiple of `every` or the last (0: only the last)."""
        return self.step_done == self.cfg.steps or (every > 0 and self.step_done % every == 0)

    # --- what is kept and said -----------------------------------------------------------------------------------

    def measure(self, flops: float, tokens: int) -> None:
        """Tell the meter what a row costs (forward and backward FLOPs) and how many tokens it has. Before prepare()."""
        self.speed.row_flops, self.speed.row_tokens = flops, tokens

    def report(self, **values: Any) -> None:
        """Log the means since the last report, and `values` (numbers or 0-d tensors) of the step just done."""
        damaged = self.share_damage()
        numbers = self.means() | {k: float(v) for k, v in values.items()} | ({"damaged": damaged} if damaged else {})
        samples = self.samples(self.step_done)
        numbers |= {"samples": samples} | ({"tokens": samples * self.speed.row_tokens} if self.speed.row_tokens else {})
        speed = self.speed.read(self.step_done, self.cfg.steps, samples - self.samples(self.speed.since))
        self.log.metrics(self.step_done, numbers)
        self.log.speed(self.step_done, speed)
        self.log.line(self.step_done, numbers, speed)

    def samples(self, step: int) -> int:
        """Rows that the steps before `step` have read."""
        return self.loader.ramp.position(step) if self.loader else step * self.cfg.batch

    def share_damage(self, always: bool = False) -> int:
        """How many rows of the window were damaged; if any (or `always`) all ranks tell one another which."""
        damaged = 0 if self.window is None else int(self.window[-2])
        if damaged or always:
            tell(self.left_out.share(self.gather), self.log.event if self.me.rank == 0 else None)
        return damaged

    def report_eval(self, name: str, means: dict[str, float]) -> None:
        """Log held-out figures under `name/...`."""
        values = {f"{name}/{k}": v for k, v in means.items()}
        self.log.metrics(self.step_done, values)
        self.log.line(self.step_done, values)
        self.speed.begin(self.step_done)

    def save(self) -> None:
        """Publish a checkpoint of the step just done; with save_async, training goes on while it is written."""
        self.settle()
        self.log.flush()
        folder = Path(self.cfg.out) / "checkpoints"
        if self._saved_step == self.step_done:
            return
        self._refuse_poison()
        self.share_damage()
        self._saved_step = self.step_done
        info = {
            "strategy": self.strategy.state(),
            "data": self.loader.state(self.step_done) if self.loader else {},
            "left_out": self.left_out.state(),
            "window": self.window if self.window is None else self.window.tolist(),
            "written_by": {"strategy": self.cfg.strategy, "world": self.me.world, "torch": torch.__version__},
        }
        step, log = self.step_done, self.log
        self._saving = checkpoint.save(
            folder, step, self.strategy.tensors(), info, keep=self.cfg.keep, group=self.group,
            published=lambda path: log.event("save", step=step, checkpoint=path.name),
            background=self.cfg.save_async,
        )  # fmt: skip
        self.speed.saved = time.monotonic()

    def _refuse_poison(self) -> None:
        """Weights that are no numbers must not push out good ones. (fp16 may overflow: that step was skipped.)"""
        known = self.cfg.precision != "fp16" and not self.cfg.strategy.startswith("zero")
        if not bool(torch.isfinite(self.total).all()) or (known and not bool(torch.isfinite(self.norm))):
            why = f"the loss or its gradient is not finite at step {self.step_done}: not saved"
            raise self.alike(
                UserError(f"{why}; earlier checkpoints are whole; lower --lr, or raise --warmup, in a new --out")
            )

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

    def _stopped(self) -> bool:
        return bool(self.total[-1] > 0) if self.me.world > 1 else bool(self.signals.name)

    def _leave_by_signal(self) -> None:
        self.save()
        self.settle()
        name = self.signals.name or "a signal to another rank"
        self.log.event("signal", signal=name, step=self.step_done)
        if self.me.rank == 0:
            print(f"stopped by {name} after step {self.step_done}, saved; the same command goes on", flush=True)
        raise SystemExit(130 if name == "SIGINT" else STOPPED)


def _recorded(out: Path) -> dict[str, Any]:
    """The configuration of the run in `out`, {} if there is none."""
    if not out.name:
        raise UserError("out (the run directory) is empty: give --out DIR")
    return rundir.read_json(out / "config.json")["config"] if (out / "config.json").exists() else {}
