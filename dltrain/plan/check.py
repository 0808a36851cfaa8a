"""Predicted peaks of memory beside measured ones: `python -m dltrain.plan.check`, on a GPU where there is one.

Each configuration is trained for three steps in a process of its own. On a GPU the peak is that of torch's allocator,
without the margin; on a CPU that of the process's resident memory over what it had before the task was built.
"""

import contextlib
import io
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dltrain.config import Config
from dltrain.data.token_rows import blank
from dltrain.data.windows import Windows
from dltrain.flops import Work
from dltrain.loop import fit
from dltrain.models.gpt import Gpt, GptConfig
from dltrain.optim import adamw
from dltrain.plan.machines import machine
from dltrain.plan.memory import Place, memory, sizes
from dltrain.plan.trace import trace
from dltrain.progress import track
from dltrain.run import Run

VOCAB = 8192


@dataclass(frozen=True, kw_only=True)
class Training(Config):
    """A GPT on random tokens."""

    steps: int = 3
    strategy: Any = "single"
    lanes: int = 1
    batch: int = 8
    layers: int = 4
    width: int = 256
    row: int = 256
    dropout: float = 0.0


class Predict(nn.Module):
    def __init__(self, cfg: Training):
        super().__init__()
        heads = max(1, cfg.width // 64)
        self.model = Gpt(
            GptConfig(
                vocab=VOCAB, layers=cfg.layers, width=cfg.width, heads=heads, positions=cfg.row, dropout=cfg.dropout
            )
        )

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"loss": self.model.loss(batch["ids_BL"], batch["targets_BL"])}


SMALL = [
    Training(),
    Training(batch=16),
    Training(batch=16, remat="full"),
    Training(batch=16, micro_batch=4),
    Training(batch=16, lanes=4),
    Training(width=512, batch=4),
    Training(width=512, batch=4, remat="selective"),
    Training(layers=12),
    Training(layers=12, batch=16, remat="full"),
    Training(row=512, batch=4),
    Training(dropout=0.1),
    Training(width=768, layers=2, batch=4, lanes=2),
]
BIG = [
    Training(precision="bf16", workers=0, row=1024, width=width, layers=layers, batch=batch, remat=again)
    for width, layers in ((768, 12), (1024, 24), (2048, 24), (2560, 32))
    for batch in (4, 16)
    for again in ("none", "selective", "full")
]


def work_of(cfg: Training) -> Work:
    return Work(lambda: Predict(cfg), adamw(1e-4), blank(cfg.row), tokens=cfg.row, causal=True)


def predicted(cfg: Training, gpu: bool) -> float:
    """Bytes, without the margin."""
    work = work_of(cfg)
    cfg = replace(cfg, precision="fp32" if cfg.precision == "auto" else cfg.precision)
    rows = cfg.micro_batch or cfg.batch // cfg.lanes
    found, buffers = sizes(work)
    step = trace(work, cfg, rows, machine("h200") if gpu else None)
    taken = memory(found, buffers, cfg, Place(1, 1), step)
    return taken.total - taken.margin


def measured(cfg: Training) -> float:
    """Bytes that the training took at most, in this process."""
    tokens = np.random.Generator(np.random.Philox(key=0)).integers(0, VOCAB, 100_000)
    work, rows = work_of(cfg), Windows(tokens, cfg.row, 1, "random tokens")
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.redirect_stdout(io.StringIO()),
        Run(replace(cfg, out=f"{folder}/run", log_every=1000)) as run,
    ):
        before = 0
        if run.device.type == "cpu":
            torch.ones(64, 64).matmul(torch.ones(64, 64))  # what the first product takes once
            Path("/proc/self/clear_refs").write_text("5")  # the high-water mark begins here
            before = _status("VmRSS")
        run.save = lambda: None  # type: ignore[method-assign]
        task, optimizer = run.prepare(work.task, work.optimizer)
        fit(run, task, optimizer, lambda step: 1.0, run.batches(rows))
        return torch.cuda.max_memory_allocated() if run.device.type == "cuda" else _status("VmHWM") - before


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def apart(cfg: Training) -> float:
    """`measured` in a process of its own, whose allocator gives back what is freed."""
    env = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_ARENA_MAX": "1"}
    command = [sys.executable, "-m", "dltrain.plan.check", json.dumps(asdict(cfg))]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return float(done.stdout.splitlines()[-1])


def main() -> None:
    if sys.argv[1:]:
        print(measured(Training(**json.loads(sys.argv[1]))))
        return
    gpu, off = torch.cuda.is_available(), []
    print(f"{'configuration':<58}{'predicted':>12}{'measured':>12}{'off':>8}")
    for cfg in track(BIG if gpu else SMALL, "trainings"):
        said, was = predicted(cfg, gpu), apart(cfg)
        off.append(said / was - 1)
        named = f"width {cfg.width}, {cfg.layers} layers, {cfg.batch} x {cfg.row}"
        named += f", {cfg.lanes} lanes" * (cfg.lanes > 1) + f", micro {cfg.micro_batch}" * (cfg.micro_batch > 0)
        named += f", remat {cfg.remat}" * (cfg.remat != "none") + ", dropout" * (cfg.dropout > 0)
        print(f"{named:<58}{said / 2**20:>8.0f} MiB{was / 2**20:>8.0f} MiB{off[-1]:>8.1%}", flush=True)
    sizes_off = sorted(map(abs, off))
    print(f"median {statistics.median(sizes_off):.1%}, worst {sizes_off[-1]:.1%} of {len(off)}")


if __name__ == "__main__":
    main()
