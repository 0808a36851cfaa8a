"""How fast a run is: what depends on the clock, kept apart from what does not."""

import os
import time
from pathlib import Path

import torch

from dltrain.flops import Flops, Work, count
from dltrain.meter import mfu, peak_flops

# communication: exchanges after backward; those of sharded weights are inside of forward and backward. rest: the host's
PHASES: tuple[str, ...] = ("data", "forward", "backward", "communication", "optimizer", "checkpoint", "rest")


class Phases:
    """Seconds of each phase: the time from one mark to the next belongs to what is marked, so they add up to all of it.

    On a GPU marks are events in its queue, which are read at the end of a window: nothing waits for them.
    """

    def __init__(self, cuda: bool):
        self.cuda = cuda
        self.begin()

    def begin(self) -> None:
        """A window begins."""
        self.seconds: dict[str, float] = dict.fromkeys(PHASES, 0.0)
        self._events: list[tuple[str, torch.cuda.Event]] = []
        self._last = time.perf_counter()
        if self.cuda:
            self.mark("rest")

    def mark(self, phase: str) -> None:
        """What was done since the last mark was `phase`."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._events.append((phase, event))
        else:
            now = time.perf_counter()
            self.seconds[phase] += now - self._last
            self._last = now

    def close(self) -> dict[str, float]:
        """The seconds of the window, which ends: waits for the device."""
        self.mark("rest")
        if self.cuda:
            self._events[-1][1].synchronize()
            for (_, before), (phase, event) in zip(self._events, self._events[1:], strict=False):
                self.seconds[phase] += before.elapsed_time(event) / 1000
        return self.seconds


class Speed:
    """Measures steps between two readings."""

    def __init__(self, device: torch.device, world: int, precision: str):
        self.cuda, self.world = device.type == "cuda", world
        name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.peak = peak_flops(name, precision)
        self.flops: Flops | None = None  # of a row
        self.row_tokens = 0  # 0: the unit is rows
        self.saved: float | None = None  # time.monotonic() of the last checkpoint
        self.phases = Phases(self.cuda)
        self.mark = self.phases.mark
        self.begin(0)

    def measure(self, work: Work, batch: int, remat: str) -> None:
        """Learn what a row costs, where the device's peak is known."""
        self.row_tokens = work.tokens
        self.flops = count(work, batch, remat) if self.peak else None

    def begin(self, step: int) -> None:
        """Start measuring at `step`."""
        self.clock, self.since = time.perf_counter(), step
        self.phases.begin()

    def read(self, step: int, steps: int, rows_read: int) -> dict[str, float]:
        """Figures since the last reading, in which `rows_read` were read; `steps` make the run. Starts anew."""
        phases = self.phases.close()
        spent, done = max(time.perf_counter() - self.clock, 1e-9), max(step - self.since, 1)
        seconds = spent / done
        rows = rows_read / spent
        found = {
            "step_seconds": seconds,
            "data_wait": phases["data"] / spent,
            "eta_seconds": seconds * (steps - step),
            "memory_gib": (torch.cuda.max_memory_allocated() if self.cuda else _resident()) / 2**30,
            "tokens_per_second" if self.row_tokens else "rows_per_second": rows * (self.row_tokens or 1),
        }
        found |= {f"{phase}_seconds": spent / done for phase, spent in phases.items()}
        if self.flops:
            shares = {"mfu": self.flops.needed, "mfu_6n": self.flops.by_parameters, "hfu": self.flops.run}
            used = {name: mfu(rows * flops / self.world, self.peak) for name, flops in shares.items() if flops}
            found |= {name: share for name, share in used.items() if share is not None}
        if self.saved is not None:
            found["checkpoint_age_seconds"] = time.monotonic() - self.saved
        self.begin(step)
        return found


def _resident() -> int:
    """Bytes of this process's resident memory, where /proc tells."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0
