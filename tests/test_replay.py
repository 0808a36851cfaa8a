"""Replay memory: which transitions there are, what a state is, and that the files bring all of it back."""

from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("gymnasium", reason="pip install 'dltrain[rl]'")

from dltrain import replay as module
from dltrain.environments import Actors, Seen
from dltrain.errors import UserError
from dltrain.replay import Replay

A, K = 2, 3
WHERE = SimpleNamespace(dtype=np.dtype(np.float32), shape=(1,), over_A=np.ones(A, bool), longest=7)
LENGTHS = (5, 7)  # turns of every episode of actor 0 and of actor 1


def turn(t: int) -> tuple[np.ndarray, Seen]:
    """Actor a sees 100 t + a + 1; the action is the turn's number, the reward its negative."""
    ages_A = np.array([t % length for length in LENGTHS], np.int32)
    frames = (100.0 * t + np.arange(A) + 1).astype(np.float32)[:, None]
    ends_A = ages_A == np.array(LENGTHS) - 1
    return np.full(A, t), Seen(frames, np.full(A, -t, np.float32), ends_A, ages_A)


def filled(turns: int, transitions: int, **more) -> Replay:
    replay = Replay(WHERE, transitions, K, **more)  # type: ignore[arg-type]
    for t in range(turns):
        replay.append(*turn(t))
    return replay


def everything(replay: Replay, transitions: int) -> list[dict]:
    """Each transition of the memory once."""
    index_M = (np.arange(transitions) << 32) // transitions + 1
    batch = replay.batch(np.zeros_like(index_M), index_M)
    assert int(batch["count"]) == int(batch["weights_M"].sum())
    return [{k: v[m].numpy() for k, v in batch.items() if k != "count"} for m in range(transitions)]


@pytest.mark.parametrize("turns", [10, 11, 40])
def test_a_transition_is_a_row_and_the_one_before(turns):
    transitions = min(12, (turns - K) * A)
    found = set()
    for row in everything(filled(turns, 12), transitions):
        t, a = int(row["actions_M"]), round(float(row["next"][-1, 0])) % 100 - 1
        found.add((t, a))
        age = t % LENGTHS[a]
        assert row["rewards_M"] == -t and row["ends_M"] == (age == LENGTHS[a] - 1)
        assert row["weights_M"] == (age > 0)  # an episode's first frame is where nothing led

        def state(at: int, age: int, a: int = a) -> list[float]:
            return [100.0 * (at - k) + a + 1 if k <= age else 0.0 for k in reversed(range(K))]

        assert row["next"][:, 0].tolist() == state(t, age)
        if age > 0:
            assert row["states"][:, 0].tolist() == state(t - 1, age - 1)
    assert found == {(t, a) for t in range(turns - transitions // A, turns) for a in range(A)}


def test_what_the_actors_see_now_is_the_newest_state():
    replay = filled(16, 12)
    assert replay.states()[:, :, 0].tolist() == [[0.0, 0.0, 1501.0], [0.0, 1402.0, 1502.0]]


def test_spread():
    replay = filled(2, 12)  # 1 and 2, 101 and 102
    assert replay.spread().tolist() == [pytest.approx(np.std([1, 2, 101, 102]))]


@pytest.mark.parametrize("segment", [4, 4096])
def test_files_bring_back_the_turns_up_to_a_checkpoint(tmp_path, monkeypatch, segment):
    monkeypatch.setattr(module, "SEGMENT", segment)
    actors, random = Actors("CartPole-v1", A, "train", 0), np.random.default_rng(0)
    actions_TA = random.integers(2, size=(60, A))

    def play(replay: Replay, actors: Actors, first: int, end: int) -> None:
        for t in range(first, end):
            replay.append(actions_TA[t], actors.turn(t, actions_TA[t]))

    whole = Replay(actors, 20, K, tmp_path)
    play(whole, actors, 0, 41)
    expected = [row.copy() for row in whole.ring]
    play(whole, actors, 41, 60)  # will be forgotten
    whole.flush()
    assert len(list(tmp_path.iterdir())) == -(-60 // segment)

    actors = Actors("CartPole-v1", A, "train", 0)
    again = Replay(actors, 20, K, tmp_path)
    again.rewind(41)
    again.resume(41, actors)
    assert again.turn == 41 and all(np.array_equal(a, b) for a, b in zip(again.ring, expected, strict=True))
    play(again, actors, 41, 60)
    assert all(np.array_equal(a, b) for a, b in zip(again.ring, whole.ring, strict=True))
    assert sum(path.stat().st_size for path in tmp_path.iterdir()) == 60 * A * again.row.itemsize

    again.prune(501 + 13)  # an episode of CartPole may have 500 turns after its first frame
    assert len(list(tmp_path.iterdir())) == -(-60 // segment) - 13 // segment
    again.flush()
    again.rewind(0)
    assert not list(tmp_path.iterdir())


def test_lost_turns_are_named(tmp_path):
    replay = filled(10, 12, folder=tmp_path)
    replay.flush()
    replay.rewind(8)
    with pytest.raises(UserError, match=r"000000000000\.turns lacks turns"):
        replay.resume(10, Actors("CartPole-v1", A, "train", 0))


def test_a_shuffle_of_the_rows_draws_every_transition_alike():
    from dltrain.data.order import Order

    replay = filled(40, 12)
    drawn = replay.batch(*Order(len(replay), 5).at(np.arange(12_000)))
    counts = np.unique(drawn["next"][:, -1, 0].numpy(), return_counts=True)[1]
    assert len(counts) == 12 and np.abs(counts - 1000).max() < 4 * 30.3  # standard deviations
