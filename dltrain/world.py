"""A process among its fellows: who it is, on which device, and how all come to agree."""

import dataclasses
import datetime
import os
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from dltrain import config, launch
from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.progress import track

T = TypeVar("T")


class World:
    """The processes of a launch. `me` is this one's place among them; `group` is of all, for tensors on the CPU, as is
    `aside`, where they compute on GPUs: for what one host tells the others while its device is at work."""

    def __init__(self) -> None:
        self.me = launch.detect(os.environ)
        self.group: Any = None
        self.aside: Any = None

    def join(self) -> None:
        """Find the device and the others."""
        self.device = _device(self.me)
        if self.me.world == 1:
            return
        dist.init_process_group(
            self._backend(),
            init_method=f"tcp://{self.me.master}" if self.me.by == "slurm" else "env://",
            rank=self.me.rank,
            world_size=self.me.world,
            timeout=datetime.timedelta(minutes=30),
        )
        self.group = dist.new_group(backend="gloo")
        self.aside = dist.new_group(backend="gloo") if self.device.type == "cuda" else None

    def join_alone(self) -> None:
        """A process group of one, which sharding asks for."""
        if not dist.is_initialized():
            dist.init_process_group(self._backend(), store=dist.HashStore(), rank=0, world_size=1)

    def _backend(self) -> str:
        return "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"

    def agree(self, cfg: Config) -> None:
        """Ranks that were started with different commands must not train together: UserError that says where."""
        mine = {k: repr(v) for k, v in dataclasses.asdict(cfg).items()} | {"recipe": config.recipe_name(cfg)}
        for rank, theirs in enumerate(self.gather(mine)):
            if different := [k for k in mine if theirs.get(k) != mine[k]]:
                k = different[0]
                raise UserError(
                    f"ranks disagree on {', '.join(different)}: {k} is {mine[k]} on rank {self.me.rank} "
                    f"and {theirs.get(k)} on rank {rank}; start all with the same command"
                )

    def gather(self, value: Any) -> list[Any]:
        """Everyone's value, by rank."""
        if self.me.world == 1:
            return [value]
        everyone: list[Any] = [None] * self.me.world
        dist.all_gather_object(everyone, value)
        return everyone

    def first(self, work: Callable[[], T]) -> T:
        """Let rank 0 do it and give all the result; its UserError comes to all and is printed once."""
        answer: list[Any] = [None, None]
        if self.me.rank == 0:
            try:
                answer[0] = work()
            except UserError as error:
                answer[1] = str(error)
        if self.me.world > 1:
            dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            raise self.alike(UserError(answer[1]))
        return answer[0]

    def alike(self, error: UserError) -> UserError:
        """An error that all ranks have alike: rank 0 will print it."""
        error.told = self.me.rank != 0
        return error

    def everywhere(self, work: Callable[[], T]) -> T:
        """Do it on rank 0, which leaves something in a cache, then on all."""

        def warm() -> None:
            work()

        self.first(warm)
        return work()

    def say(self, text: str) -> None:
        """Print it once."""
        if self.me.rank == 0:
            print(text, flush=True)

    def track(self, items: Sequence[T], what: str) -> Iterable[T]:
        """`items`, with a progress bar on rank 0."""
        return track(items, what) if self.me.rank == 0 else items


def _device(me: launch.Launch) -> torch.device:
    wants_cpu = os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true")
    if not torch.cuda.is_available() or wants_cpu or os.environ.get("DLTRAIN_DEVICE") == "cpu":
        return torch.device("cpu")
    if me.local_rank >= torch.cuda.device_count():
        raise UserError(f"local rank {me.local_rank} has no GPU: this node has {torch.cuda.device_count()}")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # what deterministic cuBLAS asks for
    torch.cuda.set_device(me.local_rank)
    return torch.device("cuda", me.local_rank)
