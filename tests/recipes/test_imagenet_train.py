"""Batch norm, running averages and LARS: stopped, resumed, on two processes or sharded, the same bytes."""

import dataclasses
from pathlib import Path

import pytest
import torch
import toy
import worlds
from torch import nn

from dltrain import checkpoint
from dltrain.errors import UserError
from dltrain.recipes.imagenet_train import PRESETS, Classify, main, network, rows_of, schedule_of

DEBUG = PRESETS["debug"]
HARD = {"optimizer": "lars", "lr": 4.0, "precision": "bf16", "smoothing": 0.1, "rand_augment": 9.0, "steps": 4}


def run(out: Path, world: int, strategy: str, **changes) -> tuple[str, bytes]:
    worlds.launch(world, main, dataclasses.replace(DEBUG, out=str(out), strategy=strategy, **changes))
    return toy.outcome(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, tuple[str, bytes]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(out, 1, "single")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_bits_of_one(tmp_path, whole, strategy):
    assert run(tmp_path / "run", 2, strategy) == whole[1]


def test_stopped_and_resumed_on_two_processes(tmp_path, whole):
    out = tmp_path / "run"
    run(out, 1, "single", steps=3)
    assert run(out, 2, "fsdp")[0] == whole[1][0]


def test_lars_in_bf16_with_augmentation(tmp_path):
    one = run(tmp_path / "one", 1, "single", **HARD)
    assert run(tmp_path / "ddp", 2, "ddp", **HARD) == one
    assert run(tmp_path / "fsdp", 2, "fsdp", **HARD) == one


def test_what_a_run_leaves(whole):
    tensors = checkpoint.read(checkpoint.steps(whole[0] / "checkpoints")[-1])
    assert int(tensors["average.steps"]) == int(tensors["model.norm.num_batches_tracked"]) == 8
    for name, tensor in tensors.items():
        if name.startswith("model.") and "running" in name:
            assert not torch.equal(tensor, tensors[name.replace("model.", "average.model.", 1)]), name
    (row,) = [row for row in toy.rows_of(whole[0]) if row["step"] == 8 and "eval/top1" in row]
    assert 0 <= row["eval/top1"] <= row["eval/top5"] <= 1
    assert (whole[0] / "filters.png").stat().st_size > 100


def batch_of(cfg) -> dict:
    rows, _ = rows_of(cfg)
    index = torch.arange(cfg.batch).numpy()
    return rows.batch(index * 0, index)


def test_padding_weighs_nothing_and_only_training_smooths_labels():
    cfg = dataclasses.replace(DEBUG, average=0.0, smoothing=0.5)
    torch.manual_seed(0)
    task, batch = Classify(cfg).eval(), batch_of(cfg)
    few = {name: value[:5] for name, value in batch.items() if value.ndim}
    padded = batch | {"weights_B": (torch.arange(cfg.batch) < 5).float()}
    for name, value in task(few).items():
        torch.testing.assert_close(task(padded)[name], value)
    plain = Classify(dataclasses.replace(cfg, smoothing=0.0)).eval()
    plain.load_state_dict(task.state_dict())
    assert torch.equal(plain(batch)["loss"], task(batch)["loss"])
    assert plain.train()(batch)["loss"] != task.train()(batch)["loss"]


def test_evaluation_is_of_the_average():
    torch.manual_seed(0)
    task, batch = Classify(DEBUG).eval(), batch_of(DEBUG)
    assert task.average is not None
    task.average.model.get_parameter("fc.bias").data[3] = 100.0
    assert task(batch)["top1"] == (batch["labels_B"] == 3).sum()


def test_other_heads_count_by_three_tenths():
    class Heads(nn.Module):
        def forward(self, images):
            logits = torch.zeros(len(images), 10)
            return (logits, logits, logits) if self.training else logits

    cfg = dataclasses.replace(DEBUG, average=0.0)
    task, batch = Classify(cfg), batch_of(cfg)
    task.model = Heads()
    chance = cfg.batch * torch.log(torch.tensor(10.0))
    torch.testing.assert_close(task(batch)["loss"], 1.6 * chance)
    torch.testing.assert_close(task.eval()(batch)["loss"], chance)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_networks_that_take_their_images(name):
    cfg = PRESETS[name]
    with torch.device("meta"):
        logits = network(cfg).eval()(torch.empty(2, 3, cfg.size, cfg.size))
    assert logits.shape == (2, cfg.classes)
    schedule = schedule_of(cfg)
    assert max(schedule(step) for step in range(0, cfg.steps, max(1, cfg.steps // 200))) <= 1.0
    assert schedule(cfg.steps - 1) < 0.02 or name == "debug"


def test_what_cannot_be(tmp_path):
    cfg = dataclasses.replace(DEBUG, out=str(tmp_path / "run"))
    with pytest.raises(worlds.Died, match="need whole tensors"):
        worlds.launch(1, main, dataclasses.replace(cfg, strategy="zero1"))
    with pytest.raises(UserError, match="no image model"):
        main(dataclasses.replace(cfg, model="resnet-9000-b"))
    with pytest.raises(UserError, match="has no dropout"):
        main(dataclasses.replace(cfg, dropout=0.5))
    with pytest.raises(UserError, match="has a class 9, counted from 0: give --classes 10"):
        main(dataclasses.replace(cfg, classes=8))
