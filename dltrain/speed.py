"""How fast a run is: what depends on the clock, kept apart from what does not."""

import os
import time
from pathlib import Path

import torch

from dltrain.meter import mfu, peak_flops


class Speed:
    """Measures steps between two readings. `row_flops` forward and backward, `row_tokens` (0: the unit is rows)."""

    def __init__(self, device: torch.device, world: int, precision: str):
        self.cuda, self.world = device.type == "cuda", world
        name = torch.cuda.get_device_name(device) if self.cuda else "cpu"
        self.peak = peak_flops(name, precision)
        self.row_flops, self.row_tokens = 0.0, 0
        self.saved: float | None = None  # time.monotonic() of the last checkpoint
        self.begin(0)

    def begin(self, step: int) -> None:
        """Start measuring at `step`."""
        self.clock, self.waited, self.since = time.perf_counter(), 0.0, step

    def wait(self, seconds: float) -> None:
        """Count time that was spent waiting for data."""
        self.waited += seconds

    def read(self, step: int, steps: int, rows_read: int) -> dict[str, float]:
        """Figures since the last reading, in which `rows_read` were read; `steps` make the run. Starts anew."""
        now = time.perf_counter()
        spent = max(now - self.clock, 1e-9)
        seconds = spent / max(step - self.since, 1)
        rows = rows_read / spent
        found = {
            "step_seconds": seconds,
            "data_wait": self.waited / spent,
            "eta_seconds": seconds * (steps - step),
            "memory_gib": (torch.cuda.max_memory_allocated() if self.cuda else _resident()) / 2**30,
            "tokens_per_second" if self.row_tokens else "rows_per_second": rows * (self.row_tokens or 1),
        }
        if self.row_flops and (used := mfu(rows * self.row_flops / self.world, self.peak)) is not None:
            found["mfu"] = used
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
