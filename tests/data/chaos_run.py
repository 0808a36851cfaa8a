"""A small run whose every row is known: what `exactly_once.py` kills.

Each process writes what it reads into a ledger of its own, one fsynced line a step. Every token of the text has a
number of its own, as has every image, so the ledger says what was trained on without a word from the code under test.

Legend: M rows of a micro-batch, L tokens of a row, D width, V vocabulary.
"""

import hashlib
import io
import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dltrain
from dltrain.data.crops import RandomResizedCrop
from dltrain.data.images import ImageRows
from dltrain.data.mix import Joined, Mix
from dltrain.data.packing import best_fit
from dltrain.data.shards import Shards, write_shards
from dltrain.data.token_rows import TokenRows
from dltrain.data.tokens import TokenShards
from dltrain.loop import fit
from dltrain.optim import adamw
from dltrain.run import Run

BATCH, LANES, L, D, V = 24, 12, 16, 8, 64
SHARES = (2, 1)  # of the two sources, in the mix and in rows


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    data: str = ""  # folder that `make_text` or `make_images` filled
    kind: str = "text"
    on_error: Literal["raise", "skip", "substitute"] = "raise"
    batch: int = BATCH
    lanes: int = LANES
    micro_batch: int = 1
    log_every: int = 1
    save_every: int = 3


class Numbers:
    """The tokenizer that made the shards of `make_text`: any number is a token."""

    vocab_size, digest = 1 << 31, "0" * 64

    def arrays(self, texts: list[str]) -> list[np.ndarray]:
        raise NotImplementedError


class Task(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(V, D), nn.Linear(D, V)

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        if "images_BCHW" in batch:
            ids_ML = batch["images_BCHW"].flatten(1)[:, :L].long()
            targets_ML = batch["labels_B"][:, None].expand(ids_ML.shape)
        else:
            ids_ML, targets_ML = batch["ids_BL"], batch["targets_BL"]
        targets_ML = torch.where(targets_ML < 0, targets_ML, targets_ML % V)
        logits_MLV = self.head(self.embed(ids_ML % V))
        return {"loss": F.cross_entropy(logits_MLV.flatten(0, 1), targets_ML.flatten(), reduction="sum")}


def train(cfg: Config, ledger: str) -> None:
    """From wherever the run was to its end; `ledger` is this launch's, without the rank."""
    with Run(cfg) as run:
        make = text_rows if cfg.kind == "text" else image_rows
        shards = [Shards(str(Path(cfg.data, str(k))), on_error=cfg.on_error) for k in range(len(SHARES))]
        sources = [make(each, k) for k, each in enumerate(shards)]
        order = Mix([len(rows) for rows in sources], [(0, SHARES)], cfg.seed)
        task, optimizer = run.prepare(Task, adamw(1e-2))
        data = run.batches(Joined(*sources), order)
        fit(run, task, optimizer, lambda step: 1.0, noted(run, data, f"{ledger}-{run.me.rank}.jsonl"))


def noted(run: Run, data: Iterator[list[Any]], ledger: str) -> Iterator[list[Any]]:
    """The same steps, each in the ledger before it is taken."""
    file = os.open(ledger, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for step, micros in enumerate(data, run.step_done):
        lanes = [run.strategy.mine[i // micros[0].parts] for i in range(len(micros))]
        entries = [[m.lane, m.part, *seen(m.batch)] for m, lane in zip(micros, lanes) if lane < run.strategy.lanes]
        os.write(file, json.dumps([step, entries]).encode() + b"\n")  # without lanes that are run for company
        os.fsync(file)
        yield micros


def seen(batch: dict[str, Tensor]) -> tuple[list[int], str]:
    """(numbers of the tokens that are predicted, or of the images; digest of every tensor of the micro-batch)."""
    digest = hashlib.sha256()
    for name in sorted(batch):
        digest.update(name.encode() + batch[name].contiguous().numpy().tobytes())
    numbers = batch["labels_B"] if "labels_B" in batch else batch["targets_BL"].flatten()
    return numbers[numbers >= 0].tolist(), digest.hexdigest()[:16]


def launched(variables: dict[str, str], log: str, cfg: Config, ledger: str) -> None:
    """What a process of a launch does; its words go to a file."""
    os.environ.update(variables)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    train(cfg, ledger)


# --- data --------------------------------------------------------------------------------------------------------


def text_rows(shards: Shards, source: int) -> TokenRows:
    return TokenRows(TokenShards(shards, Numbers()), L, pack=True)


def image_rows(shards: Shards, source: int) -> ImageRows:
    return ImageRows(shards, 4, RandomResizedCrop(), flip=0.5, seed=source)


def make_text(folder: Path, steps: int, draw: np.random.Generator) -> np.ndarray:
    """Two sources that make up `steps` steps together; every token that must be predicted, ascending."""
    first, wanted = 0, []
    for k, share in enumerate(SHARES):
        rows = BATCH * steps * share // sum(SHARES)
        length_D = draw.integers(1, 2 * L, rows)
        while len(best_fit(length_D, L, 1)) > rows:
            length_D = length_D[: len(length_D) * 63 // 64]
        full = np.full(rows - len(best_fit(length_D, L, 1)), L + 1)  # one row each
        length_D = draw.permutation(np.concatenate([length_D, full]))
        start_D = first + np.cumsum(length_D) - length_D
        first += int(length_D.sum())
        documents = [np.arange(a, a + n, dtype=np.uint32) for a, n in zip(start_D, length_D)]
        wanted += [document[1:] for document in documents]
        samples = ({"__key__": f"{i:06d}", "npy": document} for i, document in enumerate(documents))
        write_shards(samples, folder / str(k), "s", len(documents) // 3 + 1)
    return np.concatenate(wanted)


def make_images(folder: Path, steps: int, draw: np.random.Generator) -> np.ndarray:
    """As `make_text`; the numbers of all images."""
    from PIL import Image

    first = 0
    for k, share in enumerate(SHARES):
        rows = BATCH * steps * share // sum(SHARES)
        samples = []
        for i in range(rows):
            file = io.BytesIO()
            Image.fromarray(draw.integers(0, 256, (6, 6, 3), dtype=np.uint8)).save(file, "PNG")
            samples.append({"__key__": f"{i:06d}", "png": file.getvalue(), "cls": first + i})
        write_shards(samples, folder / str(k), "s", rows // 3 + 1)
        first += rows
    return np.arange(first)
