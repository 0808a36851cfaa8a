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
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dltrain import config, heal, replicas
from dltrain.config import Config
from dltrain.data.loader import Loader, Rows
from dltrain.data.order import Order, Ordering
from dltrain.data.ramp import Ramp
from dltrain.doctor.doctor import Doctor
from dltrain.errors import UserError
from dltrain.flops import Work
from dltrain.lanes import all_gather
from dltrain.models.batch_norm import Statistics
from dltrain.resume import Resumable
from dltrain.seeds import key, seed_step
from dltrain.signals import Signals, Stop, end_with_launcher
from dltrain.speed import Speed
from dltrain.strategy import Lanes

NO_DATA = 2.0**20  # more than there are lanes: a signal came before a step's data


class Run(Resumable):
    """One launch of a run. `cfg` is resolved on entry: out, lanes, strategy and precision are what will be used.

    Raises:
        UserError: for an impossible combination, all conflicts at once; for a run directory of another configuration;
            for ranks that disagree.
    """

    def __init__(self, cfg: Config):
        super().__init__(cfg)
        self.leaving = contextlib.ExitStack()

    def __enter__(self) -> "Run":
        self.doctor = Doctor(self.cfg.out, self.me, lambda: self.step_done, self.cfg.hang_exit)
        try:
            return self._enter()
        except BaseException:
            self.doctor.stop()
            raise

    def _enter(self) -> "Run":
        self.join()
        self.doctor.watch.spins = self.device.type == "cuda"
        self.agree(self.cfg)
        self.resolve()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore  # a debugging aid, 2% of a step
        torch.backends.cudnn.benchmark = False
        if self.cfg.strategy not in ("single", "ddp") or self.cfg.precision != "fp32":
            self.join_alone()
        self.signals = Signals(say=self.me.rank == 0)
        if self.me.by in ("torchrun", "accelerate"):
            end_with_launcher()
        self.speed = Speed(self.device, self.me.world, self.cfg.precision)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        try:
            self._exit(kind, error, trace)
        finally:
            self.doctor.stop()

    def _exit(self, kind: type | None, error: BaseException | None, trace: object) -> None:
        self.leaving.close()
        self.settle(quiet=error is not None)
        self.log.close()
        if self.fence:
            self.fence.release()
        self.signals.restore()
        if not dist.is_initialized():
            return
        if error is None or isinstance(error, SystemExit):
            dist.barrier()  # without it a peer that still talks dies of the closed connection
            dist.destroy_process_group()
        elif self.me.world > 1 and not isinstance(error, UserError):
            sys.excepthook(kind, error, trace)  # type: ignore[arg-type]
            config.leave(self.doctor.last_words(error))  # the others may wait in a collective: do not wait for them

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
        self.statistics = Statistics(self.strategy.module)
        self.open()
        return self.task, self.optimizer

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
            workers=cfg.workers, pin=self.device.type == "cuda", jumps=self.skipped.jumps(),
        )  # fmt: skip
        if self.restored:
            loader.check(self.restored["data"])
        self.loader, self._stream = loader, loader.steps(0, 0, [])
        self.read_from_here()
        return iter(lambda: next(self._stream), None)

    def read_from_here(self) -> None:
        """Let the data of `batches` go on at this step."""
        assert self.loader
        self._stream.close()
        mine = [min(lane, self.strategy.lanes - 1) for lane in self.strategy.mine]
        self._stream = self.loader.steps(self.step_done, self.cfg.steps, mine)
        self.leaving.callback(self._stream.close)  # ends the workers

    # --- the step ------------------------------------------------------------------------------------------------

    def steps(self) -> Iterator[int]:
        """The steps still to do. After a signal to any rank, all save the step they are in and leave (exit code 75)."""
        self.speed.begin(self.step_done)
        if self.step_done < self.cfg.steps and any(self.gather(bool(self.signals.name))):
            self.leave_by_signal()
        if self.cfg.on_bad == "rollback" and not self.restored:
            self.save()  # something to go back to
        while self.step_done < self.cfg.steps:
            yield self.step_done
            if self.guard.at_once or self.step_done == self.cfg.steps:
                self.look()
            if self.bad:
                bad, self.bad = self.bad, None
                heal.go_back(self, bad)
            if self.step_done < self.cfg.steps and self._stopped():
                self.leave_by_signal()

    def lanes(self, data: Iterator[list[Any]]) -> Iterator[dict[str, Tensor]]:
        """This process's micro-batches of the step, on its device, each with its own random numbers."""
        yield from self.each(self.fetch(data))

    def fetch(self, data: Iterator[list[Any]]) -> list[Any]:
        """This process's micro-batches of the step, for a loss that couples rows: `each` then goes through them."""
        self.speed.mark("rest")
        micros, self._no_data = self._next(data)
        self.speed.mark("data")
        return micros

    def each(self, micros: list[Any]) -> Iterator[dict[str, Tensor]]:
        """What `lanes` gives, of micro-batches that `fetch` gave."""
        parts, n = micros[0].parts, self.strategy.lanes
        lanes = [self.strategy.mine[i // parts] for i in range(len(micros))]
        count = sum(int(m.batch["count"]) for m, lane in zip(micros, lanes, strict=True) if lane < n)
        if self.strategy.begin(count, self._no_data):
            self.leave_by_signal()
        self._tell()
        self.sums: dict[int, Tensor] = {}
        for micro, lane in zip(micros, lanes, strict=True):
            self._at = (lane, micro.part == parts - 1)
            self._counts = [float(len(micro.damaged)), float(micro.batch["count"]), NO_DATA * self._no_data]
            self.left_out.note(self.step_done + 1, micro.damaged if lane < n else [])
            seed_step(self.cfg.seed, self.step_done, min(lane, n - 1), micro.part)
            self.strategy.forward_of(self._at[1])
            self.speed.mark("rest")
            yield {k: v.to(self.device, non_blocking=True) for k, v in micro.batch.items()}

    def _next(self, data: Iterator[list[Any]]) -> tuple[list[Any], bool]:
        """The step's micro-batches. If a signal came before them: padding, and True. The others may be waiting for this
        process in the step's exchanges, so it takes the step with them, and none of them takes the update."""
        if self.loader is None:
            return next(data), False
        try:
            with self.signals.waiting():
                return next(data), False
        except Stop:
            if self.me.world == 1:
                self.leave_by_signal()
            return self.loader.padding(self.step_done, self.strategy.mine), True

    def backward(self, sums: dict[str, Tensor]) -> None:
        """Take an objective's sums over the micro-batch; `sums["loss"]` is what is trained."""
        self.speed.mark("forward")
        lane, last = self._at
        self.names = sorted(sums)
        values = torch.stack([sums[k].detach().double() for k in self.names])
        extra = values.new_tensor(self._counts)
        extra[-1] += bool(self.signals.name)
        self.strategy.backward(sums["loss"], lane, last)
        self.speed.mark("backward")
        values = torch.cat([values, extra, *self.statistics.take()])
        self.sums[lane] = self.sums[lane] + values if lane in self.sums else values

    def step(self) -> Tensor:
        """Combine the lanes, divide once by the global count, clip, update. Returns the gradient's norm."""
        self.speed.mark("rest")
        added = self.gather_lanes([self.sums[lane] for lane in self.strategy.mine]).sum(0)
        self._asked = self._told(added[len(self.names) + 2])
        if self._asked >= NO_DATA:
            self.leave_by_signal()
        n = len(self.names)
        loss, norm = added[self.names.index("loss")] / added[n + 1], self.strategy.reduce(added[n + 1], self.cfg.clip)
        self.speed.mark("communication")
        self.look()  # at the step before, which a GPU has long judged
        good = self.guard.judge(self.step_done + 1, loss, norm, added[n + 3 :])
        self.strategy.step(good if self.guard.skips(self.step_done + 1) else None)
        self.speed.mark("optimizer")
        counted = torch.where(good, added, 0.0)
        self.window = counted[: n + 2] if self.window is None else self.window + counted[: n + 2]
        self.statistics.update(counted[n + 3 :])
        self.step_done += 1
        self.log.tick(self.step_done)
        if self.cfg.check_replicas and self.step_done % self.cfg.check_replicas == 0:
            replicas.check(self, self.strategy.tensors(), self.strategy.copies(), self.step_done)
        return torch.where(good, norm.to(self.device), torch.nan)  # no more of a bad step than the record knows

    def _tell(self) -> None:
        """Where devices compute, hosts tell one another of signals beside them: nobody waits for a device's sums."""
        if self.aside is not None:
            note = torch.tensor([bool(self.signals.name) + NO_DATA * self._no_data])
            self._note = note, dist.all_reduce(note, group=self.aside, async_op=True)

    def _told(self, in_sums: Tensor) -> float:
        """How many processes ask to stop, from their notes, which came as the step began, or from the step's sums."""
        if self.me.world == 1:
            return 0.0
        if self.aside is None:
            return float(in_sums)
        note, work = self._note
        work.wait()  # type: ignore[union-attr]
        return float(note)

    def gather_lanes(self, mine: list[Tensor]) -> Tensor:
        """A tensor for each of the own lanes, all of one shape -> [lanes, ...]: all of them, in order, everywhere."""
        n, world = self.strategy.lanes, self.me.world
        here = torch.stack(mine)
        if world == 1:
            return here
        width = -(-n // world)
        if len(mine) < width:
            here = torch.cat([here, here.new_zeros(width - len(mine), *here.shape[1:])])
        everyone = here.new_empty(world * width, *here.shape[1:])
        all_gather(everyone, here)
        where = {lane: r * width + i for r in range(world) for i, lane in enumerate(self.strategy.deal(n, world, r))}
        return everyone[[where[lane] for lane in range(n)]]

    def means(self) -> dict[str, float]:
        """The sums since the last call over their global count: waits for the device."""
        assert self.window is not None
        values, self.window = (self.window[:-2] / self.window[-1]).tolist(), None
        return dict(zip(self.names, values, strict=True))

    def due(self, every: int) -> bool:
        """Whether the step just done is a multiple of `every` or the last (0: only the last)."""
        return self.step_done == self.cfg.steps or (every > 0 and self.step_done % every == 0)

    # --- what is kept and said -----------------------------------------------------------------------------------

    def measure(self, work: Work) -> None:
        """Tell the meter what the recipe computes. Before prepare()."""
        self.speed.measure(work, self.cfg.batch, self.cfg.remat)

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

    def report_eval(self, name: str, means: dict[str, float]) -> None:
        """Log held-out figures under `name/...`."""
        values = {f"{name}/{k}": v for k, v in means.items()}
        self.log.metrics(self.step_done, values)
        self.log.line(self.step_done, values)
        self.speed.begin(self.step_done)

    def _stopped(self) -> bool:
        return self._asked > 0 if self.me.world > 1 else bool(self.signals.name)
