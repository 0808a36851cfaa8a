"""Copies that should be the same: one bit turned on one rank is found, and named. 15 s."""

import dataclasses
from pathlib import Path

import pytest
import torch
import worlds
from toy import Config, Toy, ToyRows

from dltrain.errors import UserError
from dltrain.loop import fit
from dltrain.optim import adamw
from dltrain.replicas import sums
from dltrain.run import Run


def train(cfg: Config, guilty: int, what: str) -> str:
    """Turn the last bit of the first element of a tensor of rank `guilty` after three steps; what the run says."""
    try:
        with Run(cfg) as run:
            task, optimizer = run.prepare(lambda: Toy(cfg.dropout), adamw(1e-2))

            def schedule(step: int) -> float:
                if step == 3 and run.me.rank == guilty:
                    tensor = run.strategy.tensors()[what]
                    local = tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[union-attr]
                    local.view(torch.int32).view(-1)[0] ^= 1
                return 0.0  # no update, which would spread to other tensors

            fit(run, task, optimizer, schedule, run.batches(ToyRows()))
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("world", "strategy", "guilty", "words"),
    [
        (3, "ddp", 1, "after step 4, the copy on rank 1 differs from the other 2 in "),
        (2, "ddp", 1, "after step 4, the copies on ranks 0, 1 differ in "),
        (4, "hybrid", 3, "after step 4, the copies on ranks 1, 3 differ in "),
        (2, "ddp", -1, ""),
        (4, "hybrid", -1, ""),
    ],
)
def test_a_bit_is_found(world, strategy, guilty, words, tmp_path):
    what = "optim/blocks.0.up.weight/exp_avg"
    cfg = Config(out=str(tmp_path / "run"), steps=6, strategy=strategy, check_replicas=2)
    said = worlds.launch(world, train, cfg, guilty, what, local_world=2 if strategy == "hybrid" else 0)
    assert len(set(said)) == 1
    assert said[0].startswith(words + what) if words else said[0] == ""


def test_any_bit_counts():
    tensors = {str(d): torch.zeros(5, dtype=d) for d in (torch.float32, torch.bfloat16, torch.int64, torch.uint8)}
    assert sums(tensors).tolist() == [0, 0, 0, 0]
    for i, tensor in enumerate(tensors.values()):
        tensor.view(torch.uint8)[-1] ^= 128
        assert sums(tensors).tolist()[i] != 0


def test_there_must_be_copies(tmp_path):
    with pytest.raises(UserError, match="check_replicas compares copies"):
        Run(dataclasses.replace(Config(out=str(tmp_path / "run")), check_replicas=5)).__enter__()
    assert not Path(tmp_path / "run/hang").exists()
