"""How kernels are timed: providers take turns within one process, and the GPU's own ceilings are measured beside them.

A provider's time is the median of its turns, with the 20th and 80th percentile, between two CUDA events; before each
turn the L2 cache is overwritten, which also gives the host time to run ahead. On a CPU nothing is timed that means
anything: that is for `--smoke`.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

TURNS = 25
WARM_UP = 3


@dataclass(frozen=True)
class Case:
    """One comparison. Each provider does all the work of the operation when called; ours comes first.

    `bytes` and `flops` are the least that the operation needs, for its share of the ceilings; 0 where one says nothing.
    """

    op: str
    shape: str
    providers: dict[str, Callable[[], Any]]
    bytes: int = 0
    flops: int = 0


@dataclass(frozen=True)
class Timing:
    """Milliseconds."""

    median: float
    low: float
    high: float


@dataclass
class Clock:
    """Times functions on a device; `turns` times each."""

    device: torch.device
    turns: int = TURNS
    _flushed: Tensor = field(init=False)

    def __post_init__(self) -> None:
        size = 256 << 20 if self.device.type == "cuda" else 1
        self._flushed = torch.empty(size, dtype=torch.int8, device=self.device)

    def compare(self, functions: dict[str, Callable[[], Any]]) -> dict[str, Timing]:
        """All functions in turn, A-B-A-B."""
        for function in functions.values():
            for _ in range(WARM_UP if self.device.type == "cuda" else 1):
                function()
        spent: dict[str, list[Callable[[], float]]] = {name: [] for name in functions}
        for _ in range(self.turns):
            for name, function in functions.items():
                self._flushed.zero_()
                spent[name].append(self._time(function))
        return {name: _timing([read() for read in reads]) for name, reads in spent.items()}

    def _time(self, function: Callable[[], Any]) -> Callable[[], float]:
        """Starts a turn; the result waits for it and says its milliseconds."""
        if self.device.type != "cuda":
            began = time.perf_counter()
            function()
            spent = 1e3 * (time.perf_counter() - began)
            return lambda: spent
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        function()
        end.record()

        def read() -> float:
            end.synchronize()
            return start.elapsed_time(end)

        return read

    def ceilings(self, smoke: bool) -> dict[str, float]:
        """Bytes per second of a copy (read and written) and FLOP/s of a bfloat16 product of 8192 x 8192 matrices."""
        n = 64 if smoke else 8192
        a, b = torch.randn(2, n, n, device=self.device).bfloat16()
        source = torch.randn((1 << 12) if smoke else (1 << 28), device=self.device)
        target = torch.empty_like(source)
        found = self.compare({"copy": lambda: target.copy_(source), "gemm": lambda: a @ b})
        return {
            "copy_bytes_per_second": 2 * source.numel() * 4 / found["copy"].median * 1e3,
            "gemm_flops_per_second": 2 * n**3 / found["gemm"].median * 1e3,
        }


def _timing(values: list[float]) -> Timing:
    if len(values) == 1:
        return Timing(values[0], values[0], values[0])
    fifths = statistics.quantiles(values, n=5)
    return Timing(statistics.median(values), fifths[0], fifths[3])


def gradients(
    function: Callable[..., Tensor | tuple[Tensor, ...]], inputs: tuple[Tensor, ...]
) -> Callable[[], tuple[Tensor, ...]]:
    """The backward pass alone: forward runs once, here; gradients arrive at all outputs."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves)
    outs = out if isinstance(out, tuple) else (out,)
    grads = [torch.randn_like(o) for o in outs]
    return lambda: torch.autograd.grad(outs, leaves, grads, retain_graph=True)


def measure(clock: Clock, cases: Iterator[Case], ceilings: dict[str, float]) -> Iterator[dict[str, Any]]:
    """One record a case; "of_copy" and "of_gemm" are our share of the ceilings, "times" how often faster we are."""
    for case in cases:
        found = clock.compare(case.providers)
        ours, *others = found
        seconds = found[ours].median / 1e3
        record: dict[str, Any] = {"op": case.op, "shape": case.shape}
        record["milliseconds"] = {name: vars(timing) for name, timing in found.items()}
        record["times"] = {name: found[name].median / found[ours].median for name in others}
        if case.bytes:
            record["of_copy"] = case.bytes / seconds / ceilings["copy_bytes_per_second"]
        if case.flops:
            record["of_gemm"] = case.flops / seconds / ceilings["gemm_flops_per_second"]
        yield record
