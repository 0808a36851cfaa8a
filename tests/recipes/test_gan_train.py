"""Two players: each moves in its own turn alone; killed, resumed, on two processes or sharded, the same bytes."""

import dataclasses
import io
import math
import os
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import worlds
from PIL import Image
from torch import Tensor

from dltrain import checkpoint
from dltrain.data.ring import RingRows
from dltrain.data.shards import write_shard
from dltrain.initial import fill, leaves
from dltrain.models.gan import ImageCritic, ImageGenerator
from dltrain.recipes.gan_train import PRESETS, Config, Players, main, players_optimizer, real_of, rows_of

DEBUG = dataclasses.replace(PRESETS["debug"], eval_every=12)
SMALL = {"shards": "images", "size": 16, "width": 4, "latent": 3}  # for players without a run: no shards are read


def run(out: Path, world: int, strategy: str, **changes) -> tuple[str, bytes]:
    cfg = dataclasses.replace(DEBUG, out=str(out), strategy=strategy, **changes)
    worlds.launch(world, main, cfg)
    return toy.outcome(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, tuple[str, bytes]]:
    """One process, two rounds of five turns of the critic and one of the generator, a checkpoint in every turn."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(out, 1, "single", save_every=1, keep=20)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_bits_of_one(tmp_path, whole, strategy):
    assert run(tmp_path / "run", 2, strategy) == whole[1]


def test_stopped_in_the_middle_of_a_round_and_resumed_on_two_processes(tmp_path, whole):
    """After three turns the generator has not moved: its moments are in the checkpoint all the same."""
    out = tmp_path / "run"
    run(out, 1, "single", steps=3)
    assert run(out, 2, "fsdp")[0] == whole[1][0]


def test_each_moves_in_its_turn_alone_and_the_average_is_at_first_a_mean(whole):
    tensors = {int(path.name[-8:]): checkpoint.read(path, "") for path in checkpoint.steps(whole[0] / "checkpoints")}
    assert sorted(tensors) == list(range(1, 13))

    def moved(step: int) -> set[str]:
        before, now = tensors[step - 1], tensors[step]
        return {name.split("/", 1)[1].split(".")[0] for name in now if not torch.equal(before[name], now[name])}

    assert [moved(step) for step in (2, 5, 8, 11)] == [{"critic"}] * 4
    assert [moved(step) for step in (6, 12)] == [{"generator", "average"}] * 2
    name = "layers.0.weight"
    generator, average = (
        [tensors[step][f"model/{player}.{name}"] for step in (6, 12)] for player in ("generator", "average")
    )
    assert torch.equal(average[0], generator[0])
    torch.testing.assert_close(average[1], (generator[0] + generator[1]) / 2)


def test_zero_and_lanes_0_are_refused(tmp_path):
    with pytest.raises(worlds.Died, match="two players take turns"):
        worlds.launch(1, main, dataclasses.replace(DEBUG, out=str(tmp_path / "run"), lanes=0))


def players_of(cfg: Config) -> Players:
    players = Players(cfg)
    fill(players, leaves(players), cfg.seed)
    return players


def batch_of(cfg: Config, n: int = 6) -> dict[str, Tensor]:
    if cfg.shards == "ring":
        return RingRows(0).batch(np.zeros(n, np.int64), np.arange(n))
    images = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (n, 3, cfg.size, cfg.size), np.uint8))
    return {"images_BCHW": images, "weights_B": torch.ones(n), "count": torch.tensor(n)}


@pytest.mark.parametrize("shards", ["ring", "images"])
@pytest.mark.parametrize("objective", ["gan", "wgan", "wgan-gp"])
def test_a_loss_reaches_one_player(objective, shards):
    cfg = dataclasses.replace(DEBUG, objective=objective, **(SMALL if shards == "images" else {}))
    for turn, other in [("critic", "generator"), ("generator", "critic")]:
        players = players_of(cfg)
        sums = players(batch_of(cfg), turn)
        sums["loss"].backward()
        learning = {name.split(".")[0] for name, p in players.named_parameters() if p.grad is not None}
        assert learning == {turn}, other
        assert all(p.grad is not None and p.grad.any() for p in getattr(players, turn).parameters() if p.ndim > 1)
        assert sorted(sums) == ["distance", "generator_loss", "loss"]


def test_losses_are_the_papers():
    cfg = dataclasses.replace(DEBUG, objective="gan")
    players = players_of(cfg)
    for p in players.critic.parameters():
        torch.nn.init.zeros_(p)  # knows nothing: says 1/2 of everything
    sums = {name: float(value.detach()) for name, value in players(batch_of(cfg), "critic").items()}
    assert sums["loss"] == pytest.approx(6 * math.log(4))  # Goodfellow et al., section 4.1
    assert sums["generator_loss"] == pytest.approx(6 * math.log(2))
    assert sums["distance"] == pytest.approx(0, abs=1e-5)


def test_the_penalty_is_each_rows_own():
    """A critic of slope s has the penalty (s - 1)^2 in every row: not of the batch's summed gradient."""
    players = players_of(DEBUG)
    line = torch.nn.Linear(2, 1, bias=False)
    slope_12, players.critic.layers = line.weight, torch.nn.Sequential(line)
    with torch.no_grad():
        slope_12.copy_(torch.tensor([[3.0, 4.0]]))
    penalty_B = players.penalty(torch.randn(7, 2), torch.randn(7, 2))
    torch.testing.assert_close(penalty_B, torch.full((7,), 16.0))
    penalty_B.sum().backward()
    torch.testing.assert_close(slope_12.grad, 7 * 2 * (5 - 1) * slope_12.detach() / 5)


def test_a_row_of_the_penalised_critic_does_not_see_the_others_and_a_padded_one_weighs_nothing():
    cfg = dataclasses.replace(DEBUG, **SMALL)
    critic = players_of(cfg).critic
    images = torch.rand(4, 3, 16, 16)
    torch.testing.assert_close(critic(images)[:1], critic(images[:1]))
    normed = ImageCritic(16, 4, normed=True)
    assert not torch.allclose(normed(images)[:1], normed(images[:1]))

    players, batch = players_of(DEBUG), batch_of(DEBUG)
    torch.manual_seed(0)
    some = players(batch | {"weights_B": torch.tensor([1.0, 1, 1, 1, 0, 0])}, "critic")["loss"]
    torch.manual_seed(0)
    other = batch["points_B2"].clone()
    other[4:] = 100.0
    padded = players(batch | {"points_B2": other, "weights_B": torch.tensor([1.0, 1, 1, 1, 0, 0])}, "critic")["loss"]
    torch.testing.assert_close(some, padded)


def test_wgan_clamps_and_has_rmsprop(tmp_path):
    out = tmp_path / "run"
    run(out, 1, "single", objective="wgan", steps=6, lr=0.1)
    weights = checkpoint.read(checkpoint.steps(out / "checkpoints")[-1])
    largest = {
        player: max(float(w.abs().max()) for n, w in weights.items() if player in n)
        for player in ("critic", "generator")
    }
    assert largest["critic"] == pytest.approx(DEBUG.clamp) and largest["generator"] > 0.1
    assert isinstance(
        players_optimizer(dataclasses.replace(DEBUG, objective="wgan"))(players_of(DEBUG)), torch.optim.RMSprop
    )


@pytest.mark.parametrize(("size", "parameters"), [(64, 12_658_435), (32, 3_448_579)])
def test_dcgan_has_its_size(size, parameters):
    """Radford et al., figure 1: 100 numbers -> 4x4x1024 -> 8x8x512 -> 16x16x256 -> 32x32x128 -> 64x64x3."""
    with torch.device("meta"):
        generator, critic = ImageGenerator(size, 100, 128), ImageCritic(size, 128, normed=False)
        images = generator(torch.empty(2, 100))
    assert images.shape == (2, 3, size, size) and critic(images).shape == (2,)
    assert sum(p.numel() for p in generator.parameters()) == parameters


def test_dcgan_on_shards_of_images(tmp_path):
    random = np.random.default_rng(0)

    def png() -> bytes:
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (9, 8), np.uint8)).save(file, "PNG")
        return file.getvalue()

    write_shard(tmp_path / "grey.tar", ({"__key__": f"{i:02}", "png": png(), "cls": b"0"} for i in range(40)))
    changes = SMALL | {"shards": str(tmp_path / "grey.tar"), "batch": 8, "lanes": 2, "steps": 4}
    for objective in ("gan", "wgan-gp"):
        out = tmp_path / objective
        one = run(out, 1, "single", objective=objective, critic_steps=1, **changes)
        assert run(tmp_path / f"{objective}-two", 2, "ddp", objective=objective, critic_steps=1, **changes) == one
        with Image.open(out / "samples.png") as sheet:
            assert min(sheet.size) >= 6 * 16  # 40 images of 16 pixels
        assert b"data:image/png;base64," in (out / "report.html").read_bytes()


@pytest.mark.data
@pytest.mark.long  # makes the shards of both, which tests/convert does in small
@pytest.mark.skipif("DLTRAIN_DATA" not in os.environ, reason="DLTRAIN_DATA names no folder")
@pytest.mark.parametrize(("preset", "rows"), [("mnist", 60_000), ("gpu", 50_000)])
def test_published_images(preset, rows):
    found = rows_of(PRESETS[preset])
    real = real_of(found.batch(np.zeros(3, np.int64), np.arange(3)))
    assert len(found) == rows and real.shape == (3, 3, 32, 32)
    assert -1 <= float(real.min()) < float(real.max()) <= 1
