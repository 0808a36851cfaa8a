"""Where a step's time and memory go, seen from outside: nothing in a loop knows that it is measured."""

import contextlib
import time
import weakref
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dltrain.data.loader import Rows
from dltrain.throughput.turns import Player

PHASES = "data", "forward", "backward", "between", "optimizer", "rest"


class Phases:
    """Seconds of each phase, adding up to all that the turns take that are looked at.

    `data` is making the rows; `between` is from a backward to the update: clipping, and what a trainer does there;
    `rest` has copies to the device, and all else. A GPU is waited for at every change, so that the sum is more than an
    undisturbed step takes.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self.now, self.since = "rest", 0.0

    def turn(self, phase: str) -> None:
        """Another phase begins."""
        synchronise(self.device)
        now = time.perf_counter()
        self.seconds[self.now] += now - self.since
        self.now, self.since = phase, now

    @contextlib.contextmanager
    def of(self, player: Player, rows: "Watched") -> Iterator[None]:
        """Measure what the player does meanwhile."""
        backward = Tensor.backward

        def timed(*args: Any, **kwargs: Any) -> None:
            self.turn("backward")
            backward(*args, **kwargs)
            self.turn("between")

        hooks = [
            player.module.register_forward_pre_hook(lambda *ignored: self.turn("forward")),
            player.module.register_forward_hook(lambda *ignored: self.turn("rest")),
            register_optimizer_step_pre_hook(lambda *ignored: self.turn("optimizer")),
            register_optimizer_step_post_hook(lambda *ignored: self.turn("rest")),
        ]
        rows.phases = self
        synchronise(self.device)
        self.since, self.now = time.perf_counter(), "rest"
        try:
            with mock.patch.object(Tensor, "backward", timed):
                yield
            self.turn("rest")
        finally:
            rows.phases = None
            for hook in hooks:
                hook.remove()


class Watched:
    """Rows whose making can be timed."""

    def __init__(self, rows: Rows):
        self.rows, self.fingerprint = rows, rows.fingerprint
        self.phases: Phases | None = None

    def __len__(self) -> int:
        return len(self.rows)

    def batch(self, *index: Any) -> dict[str, Any]:
        if self.phases is None:
            return self.rows.batch(*index)
        before = self.phases.now
        self.phases.turn("data")
        batch = self.rows.batch(*index)
        self.phases.turn(before)
        return batch


class Memory:
    """The most that a turn allocates above what was there before, in `bytes`; enter it in the thread that allocates.

    A GPU's allocator knows. On a CPU it is storages as the operations of ATen make them, and as Python lets them go.
    """

    def __init__(self, device: torch.device):
        self.device, self.bytes = device, 0
        self.storages = _Storages() if device.type == "cpu" else None

    def __enter__(self) -> "Memory":
        if self.storages:
            self.storages.__enter__()
        else:
            torch.cuda.reset_peak_memory_stats(self.device)
            self.before = torch.cuda.memory_allocated(self.device)
        return self

    def __exit__(self, *error: Any) -> None:
        if self.storages:
            self.storages.__exit__(*error)
            self.bytes = self.storages.most
        else:
            self.bytes = torch.cuda.max_memory_allocated(self.device) - self.before


class _Storages(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.known: set[int] = set()
        self.now = self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        old = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in old | self.known:
                    self.known.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.most = max(self.most, self.now)
                    weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return out

    def _gone(self, address: int, size: int) -> None:
        self.known.discard(address)
        self.now -= size


def state_bytes(player: Player) -> int:
    """Bytes of weights, buffers and the optimizer's state."""
    tensors = {*player.module.parameters(), *player.module.buffers()}
    tensors |= {t for state in player.optimizer.state.values() for t in state.values() if isinstance(t, Tensor)}
    return sum(_local(t).nbytes for t in tensors)


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def synchronise(device: torch.device) -> None:
    """Wait for what a GPU was given to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
