"""A small task with everything that can break bits: dropout, uneven rows, odd sizes, units, an embedding used twice.

Legend: M rows of a micro-batch, L tokens, D width, V vocabulary.
"""

import hashlib
import json
import os
import signal
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dltrain
from dltrain import checkpoint
from dltrain.loop import fit
from dltrain.optim import adamw
from dltrain.run import Run
from dltrain.schedules import linear

V, L, D = 211, 13, 24


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    steps: int = 10
    batch: int = 24
    lanes: int = 4
    clip: float = 0.5
    log_every: int = 1
    save_every: int = 5
    dropout: float = 0.1


class ToyRows:
    """Rows of 1 to L random tokens, the rest padding."""

    fingerprint = "toy"

    def __init__(self, n: int = 100):
        self.n = n

    def __len__(self) -> int:
        return self.n

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        ids_ML = np.zeros((len(index_M), L), np.int64)
        lengths_M = np.zeros(len(index_M), np.int64)
        for m, i in enumerate(index_M):
            if i >= 0:
                random = np.random.Generator(np.random.Philox(key=int(i)))
                lengths_M[m] = random.integers(2, L + 1)
                ids_ML[m, : lengths_M[m]] = random.integers(1, V, lengths_M[m])
        targets_ML = np.where(np.arange(L) < lengths_M[:, None], ids_ML[:, ::-1] % 7, -100)  # not learnt in ten steps
        found = {"ids_ML": torch.from_numpy(ids_ML), "targets_ML": torch.from_numpy(targets_ML)}
        return found | {"count": torch.tensor(int(lengths_M.sum()))}


class Block(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 37), nn.Linear(37, D)
        self.dropout = dropout

    def forward(self, h_MLD: Tensor) -> Tensor:
        mixed = h_MLD + h_MLD.cumsum(1) * 0.1
        out = self.down(F.gelu(self.up(self.norm(mixed))))
        return h_MLD + F.dropout(out, self.dropout, self.training)


class Toy(nn.Module):
    def __init__(self, dropout: float):
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.blocks = nn.ModuleList(Block(dropout) for _ in range(2))
        self.norm = nn.LayerNorm(D)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h_MLD = self.embed(batch["ids_ML"])
        for block in self.blocks:
            h_MLD = block(h_MLD)
        logits_MLV = F.linear(self.norm(h_MLD), self.embed.weight).float()
        loss = F.cross_entropy(logits_MLV.flatten(0, 1), batch["targets_ML"].flatten(), reduction="sum")
        return {"loss": loss, "top1": (logits_MLV.argmax(-1) == batch["targets_ML"]).sum()}


def train(cfg: Config) -> None:
    with Run(cfg) as run:
        task, optimizer = run.prepare(lambda: Toy(cfg.dropout), adamw(1e-2))
        data = run.batches(ToyRows())

        def schedule(step: int) -> float:
            if str(step) == os.environ.get("DIE_AFTER"):  # this many steps
                os.kill(os.getpid(), signal.SIGKILL)
            return float("nan") if str(step) == os.environ.get("POISON_AT") else linear(2, 20)(step)

        fit(run, task, optimizer, schedule, data, evals={"eval": ToyRows(31)})


def outcome(out: Path) -> tuple[str, bytes]:
    """SHA-256 of the newest checkpoint's weights and optimizer state, and the bytes of metrics.jsonl."""
    newest = checkpoint.steps(out / "checkpoints")[-1]
    tensors = checkpoint.read(newest, "")
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode() + tensors[name].contiguous().numpy().tobytes())
    return f"{newest.name} {len(tensors)} {digest.hexdigest()[:16]}", (out / "metrics.jsonl").read_bytes()


def rows_of(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
