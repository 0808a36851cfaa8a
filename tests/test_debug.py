"""The checklist passes a good task and names the line of each bug that is seeded.

Legend: B rows, L tokens, D width, V vocabulary.
"""

import math
import os
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import dltrain
from dltrain.debug import checklist
from dltrain.optim import adamw
from dltrain.schedules import constant

V, L, D = 40, 6, 32

CHANCE = "loss at initialisation is that of chance"
GRADIENTS = "every parameter has a gradient"
ROWS = "rows do not see each other"
FUTURE = "no position sees the future"
OVERFITS = "overfits one batch"
SAME = "the same seed gives the same bits"
RESUME = "3 + 3 steps equal 6"


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    batch: int = 8
    lanes: int = 2


class Rows:
    """The next token is a function of this one and the one before."""

    fingerprint = "debug"

    def __len__(self) -> int:
        return 64

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        ids_BL = np.stack([np.random.Generator(np.random.Philox(key=int(i) + 1)).integers(V, size=L) for i in index_M])
        before_BL = np.concatenate([ids_BL[:, :1], ids_BL[:, :-1]], axis=1)
        found = {"ids_BL": ids_BL, "targets_BL": (3 * ids_BL + before_BL) % V, "count": np.array(ids_BL.size)}
        return {k: torch.from_numpy(v) for k, v in found.items()}


class Good(nn.Module):
    """A causal model: each position has the mean of those before it, and itself."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, D)
        self.norm, self.up, self.out = nn.LayerNorm(2 * D), nn.Linear(2 * D, 4 * D), nn.Linear(4 * D, V)

    def context(self, h_BLD: Tensor) -> Tensor:
        return h_BLD.cumsum(1) / torch.arange(1, L + 1)[:, None]

    def hidden(self, h_BLD: Tensor) -> Tensor:
        return h_BLD

    def targets(self, targets_BL: Tensor) -> Tensor:
        return targets_BL

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h_BLD = self.embed(batch["ids_BL"])
        h_BLD = self.hidden(torch.cat([h_BLD, self.context(h_BLD)], -1))
        logits_BLV = self.out(F.gelu(self.up(self.norm(h_BLD))))
        targets = self.targets(batch["targets_BL"]).flatten()
        return {"loss": F.cross_entropy(logits_BLV.flatten(0, 1), targets, reduction="sum")}


class WrongScale(Good):
    def forward(self, batch):
        return {"loss": super().forward(batch)["loss"] / len(batch["ids_BL"])}  # a mean where a sum is due


class TooConfident(Good):
    def hidden(self, h_BLD):
        self.norm.weight.data.fill_(60.0)  # a wrong initialisation
        return h_BLD


class Detached(Good):
    def hidden(self, h_BLD):
        return h_BLD.detach()


class Unused(Good):
    def __init__(self):
        super().__init__()
        self.forgotten = nn.Linear(D, D)


class SeesOtherRows(Good):
    def hidden(self, h_BLD):
        return h_BLD - h_BLD.mean(0)  # what a batch norm without its running statistics does


class SeesItsNeighbour(Good):
    def hidden(self, h_BLD):
        return h_BLD + 0.1 * h_BLD.roll(1, 0)


class SeesTheFuture(Good):
    def context(self, h_BLD):
        return h_BLD.mean(1, keepdim=True).expand_as(h_BLD)


class ShuffledLabels(Good):
    def targets(self, targets_BL):
        if not self.training and not torch.is_grad_enabled():
            return targets_BL
        return targets_BL.flatten()[torch.randperm(targets_BL.numel())].view_as(targets_BL)


class LearnsNothing(Good):
    def forward(self, batch):
        return {"loss": super().forward(batch)["loss"] + 0.0 * self.up.weight.sum()}

    def hidden(self, h_BLD):
        return 0.0 * h_BLD


class CountsItsCalls(Good):
    """State that no checkpoint has: a schedule in a Python counter."""

    calls = 0

    def forward(self, batch):
        self.calls += self.training
        return {"loss": super().forward(batch)["loss"] * (1 + 0.001 * self.calls)}


class DrawsFromTheSystem(Good):
    def hidden(self, h_BLD):
        return h_BLD * (1 + 1e-3 * os.urandom(1)[0] / 255 * self.training)


@pytest.fixture(autouse=True)
def torch_as_before():
    deterministic, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    yield
    torch.use_deterministic_algorithms(deterministic)
    torch.set_num_threads(threads)


def verdicts(capsys, task: type[nn.Module], chance: float = math.log(V), causal: bool = True, decode=None):
    """{line: whether it passed} and the exit code."""
    code = 0
    options: dict[str, Callable] = {"decode": decode} if decode else {}
    try:
        checklist(
            Config(out="unused"),
            task,
            adamw(3e-3, decay=0.0),
            constant(),
            Rows(),
            chance=chance,
            causal=causal,
            **options,
        )
    except SystemExit as exit:
        code = exit.code
    lines = [line for line in capsys.readouterr().out.splitlines() if line[:6] in ("ok    ", "FAIL  ")]
    return {line[6:50].strip(): line.startswith("ok") for line in lines}, code


def failed(found: dict[str, bool]) -> set[str]:
    return {line for line, good in found.items() if not good}


def test_a_good_task_passes(capsys):
    found, code = verdicts(capsys, Good)
    assert found == dict.fromkeys(
        ["a row as the model sees it", CHANCE, GRADIENTS, ROWS, FUTURE, OVERFITS, SAME, RESUME], True
    )
    assert code == 0


def test_it_shows_a_row_and_leaves_no_run_behind(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found, _ = verdicts(capsys, Good, causal=False, decode=lambda batch: f"ids {batch['ids_BL'][0].tolist()}")
    assert FUTURE not in found
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("task", "wrong", "also"),
    [
        (WrongScale, {CHANCE}, {ROWS}),
        (TooConfident, {CHANCE}, {OVERFITS}),
        (Detached, {GRADIENTS}, {OVERFITS}),
        (Unused, {GRADIENTS}, set()),
        (SeesOtherRows, {ROWS}, {OVERFITS}),
        (SeesItsNeighbour, {ROWS}, {OVERFITS}),
        (SeesTheFuture, {FUTURE}, {OVERFITS}),
        (ShuffledLabels, {OVERFITS}, set()),
        (LearnsNothing, {OVERFITS, GRADIENTS}, set()),
        (CountsItsCalls, {RESUME}, set()),
        (DrawsFromTheSystem, {SAME, RESUME}, set()),
    ],
)
def test_a_seeded_bug_is_caught(capsys, task, wrong, also):
    """On its own line (`wrong`); a bug may well show on others (`also`)."""
    found, code = verdicts(capsys, task)
    assert code == 1
    assert wrong <= failed(found) <= wrong | also


def test_a_wrong_expectation_is_caught(capsys):
    found, code = verdicts(capsys, Good, chance=math.log(2 * V))
    assert (failed(found), code) == ({CHANCE}, 1)
