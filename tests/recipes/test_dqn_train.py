"""DQN: killed, resumed, on two processes or sharded, the same bytes; the memory and the games are where they were."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import worlds
from PIL import Image, ImageSequence

pytest.importorskip("gymnasium", reason="pip install 'dltrain[rl]'")
pytest.importorskip("ale_py", reason="pip install 'dltrain[rl]'")

from dltrain import checkpoint
from dltrain.environments import Actors
from dltrain.initial import fill, leaves
from dltrain.models.q_network import ImageQ
from dltrain.recipes.dqn_train import PRESETS, Config, Learner, build_optimizer, main, play, renew

DEBUG = PRESETS["debug"]
BREAKOUT = {
    "game": "atari/breakout", "actors": 2, "batch": 4, "lanes": 2, "frames": 4, "warm": 12, "memory": 24, "steps": 4,
    "episodes": 1, "eval_epsilon": 1.0, "eval_every": 0, "save_every": 0,
}  # fmt: skip


def run(out: Path, world: int, strategy: str, **changes) -> tuple[str, bytes, bytes]:
    worlds.launch(world, main, dataclasses.replace(DEBUG, out=str(out), strategy=strategy, **changes))
    return *toy.outcome(out), b"".join(path.read_bytes() for path in sorted((out / "replay").iterdir()))


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, tuple[str, bytes, bytes]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(out, 1, "single")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_give_the_bits_of_one(tmp_path, whole, strategy):
    assert run(tmp_path / "run", 2, strategy) == whole[1]


def test_killed_and_resumed_on_two_processes(tmp_path, whole):
    """The last checkpoint is torn, so that the turns of five steps are known to none: they are played again."""
    out = tmp_path / "run"
    run(out, 1, "single", save_every=5, steps=15)
    (checkpoint.steps(out / "checkpoints")[-1] / "manifest.json").unlink()
    assert run(out, 2, "fsdp") == whole[1]
    assert [row["step"] for row in events(out) if row["kind"] == "resume"] == [10]


def test_the_result_is_the_best_checkpoints(whole):
    out = whole[0]
    scores = {row["step"]: row["eval/return"] for row in toy.rows_of(out) if "eval/return" in row}
    assert sorted(scores) == [12, 24]
    best = max(scores, key=lambda step: (scores[step], step))
    results = json.loads((out / "results.json").read_text())
    assert f"of step-{best:08}," in results["notes"][0]
    path = next(path for path in checkpoint.steps(out / "checkpoints") if path.name.endswith(str(best)))
    learner = Learner(DEBUG, Actors(DEBUG.game, 1, "any", 0))
    learner.load_state_dict(checkpoint.read(path))
    score, (seed, *actions) = play(DEBUG, learner, "test", 0.0, torch.device("cpu"))
    assert results["figures"][0]["value"] == score and len(actions) > 5
    assert play(DEBUG, learner, "eval", 0.0, torch.device("cpu"))[1][0] != seed
    with Image.open(out / "episode.gif") as gif:
        assert len(list(ImageSequence.Iterator(gif))) == -(-(len(actions) + 1) // 4)
    assert b"data:image/gif;base64," in (out / "report.html").read_bytes()


def events(out: Path) -> list[dict]:
    return [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]


def learner_of(cfg: Config, actors: Actors) -> Learner:
    learner = Learner(cfg, actors)
    fill(learner, leaves(learner), cfg.seed)
    return learner


def test_the_loss_is_the_papers():
    """Huber's, of reward + gamma max Q of the target network, whose value counts unless the episode has ended."""
    learner = learner_of(DEBUG, Actors(DEBUG.game, 1, "train", 0))
    random, n = torch.Generator().manual_seed(0), 6
    learner.unit.copy_(torch.tensor([0.5, 1.0, 2.0, 4.0]))
    batch = {
        "states": torch.randn(n, 2, 4, generator=random), "next": torch.randn(n, 2, 4, generator=random),
        "actions_M": torch.tensor([0, 1, 0, 1, 0, 1]), "rewards_M": torch.tensor([1.0, -7.0, 0.5, 30.0, 0.0, 1.0]),
        "ends_M": torch.tensor([0.0, 0, 1, 1, 0, 0]), "weights_M": torch.tensor([1.0, 1, 1, 1, 1, 0]),
    }  # fmt: skip
    sums = learner(batch)
    total = 0.0
    for m in range(n - 1):
        best = learner.target(batch["next"][m : m + 1] / learner.unit).max().item()
        goal = min(1.0, max(-1.0, batch["rewards_M"][m].item())) + 0.99 * best * (1 - batch["ends_M"][m].item())
        error = abs(learner.online(batch["states"][m : m + 1] / learner.unit)[0, batch["actions_M"][m]].item() - goal)
        total += 0.5 * error**2 if error < 1 else error - 0.5
    assert sums["loss"].item() == pytest.approx(total, rel=1e-5)
    sums["loss"].backward()
    assert all(p.grad is not None and p.grad.any() for p in learner.online.parameters())
    assert all(p.grad is None for p in learner.target.parameters())


def test_vectors_are_measured_in_their_spread_before_the_first_step(whole):
    unit = checkpoint.read(checkpoint.steps(whole[0] / "checkpoints")[-1])["unit"]
    assert unit.shape == (4,) and (unit > 0).all() and len(unit.unique()) == 4


def test_the_target_network_stands_still_between_renewals(tmp_path):
    out = tmp_path / "run"
    run(out, 1, "single", steps=11, save_every=1, keep=20, target_every=5)
    tensors = {int(path.name[-8:]): checkpoint.read(path) for path in checkpoint.steps(out / "checkpoints")}

    def equal(target: int, online: int) -> bool:
        names = [name.removeprefix("online.") for name in tensors[1] if name.startswith("online.")]
        return all(torch.equal(tensors[target][f"target.{n}"], tensors[online][f"online.{n}"]) for n in names)

    assert [[step for step in range(1, 12) if equal(at, step)] for at in (5, 9, 10, 11)] == [[5], [5], [10], [10]]


def test_the_paper_has_its_network_and_its_optimizer():
    """Mnih et al. 2015, methods; 1.7 million parameters for the four actions of Breakout."""
    network = ImageQ(4, 4, 512)
    assert sum(p.numel() for p in network.parameters()) == 1_686_180
    assert network(torch.zeros(2, 4, 84, 84)).shape == (2, 4)
    learner = learner_of(DEBUG, Actors(DEBUG.game, 1, "train", 0))
    renew(learner)
    assert all(torch.equal(a, b) for a, b in zip(learner.target.parameters(), learner.online.parameters(), strict=True))
    optimizer = build_optimizer(PRESETS["paper"], learner)
    assert isinstance(optimizer, torch.optim.RMSprop) and optimizer.defaults["centered"]


def test_atari_with_a_stop_between(tmp_path):
    """Frames, a stack of four and threads of games: the same bytes whether stopped or not, on one process or two."""
    one = run(tmp_path / "one", 1, "single", **BREAKOUT)
    run(tmp_path / "two", 1, "single", **BREAKOUT | {"steps": 2})
    assert run(tmp_path / "two", 2, "ddp", **BREAKOUT)[0] == one[0]
    frames = np.frombuffer(one[2], np.uint8)
    assert len(frames) > 8 * 2 * 84 * 84 and frames.any()


@pytest.mark.parametrize("changes", [{"strategy": "zero1"}, {"lanes": 0}, {"workers": 1}])
def test_what_makes_no_sense_is_refused(tmp_path, changes):
    with pytest.raises(worlds.Died, match="not under zero1 to zero3"):
        worlds.launch(1, main, dataclasses.replace(DEBUG, out=str(tmp_path / "run"), **changes))
