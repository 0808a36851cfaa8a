"""Games side by side: what a turn shows, that every episode is its seed's and its actions', and what is refused."""

import numpy as np
import pytest

gymnasium = pytest.importorskip("gymnasium", reason="pip install 'dltrain[rl]'")
pytest.importorskip("ale_py", reason="pip install 'dltrain[rl]'")

from dltrain.environments import Actors, Seen, film  # noqa: E402
from dltrain.errors import UserError  # noqa: E402

GAMES = ["CartPole-v1", "atari/breakout"]  # both lose soon


def actions(turns: int, n: int, of: int = 2) -> np.ndarray:
    return np.random.default_rng(0).integers(of, size=(turns, n))


def played(actors: Actors, actions_TA: np.ndarray, first: int = 0) -> list[Seen]:
    return [actors.turn(turn, actions_A) for turn, actions_A in enumerate(actions_TA, first)]


def same(a: Seen, b: Seen) -> bool:
    return all(np.array_equal(getattr(a, name), getattr(b, name)) for name in Seen.__dataclass_fields__)


def test_a_turn_is_gymnasiums_step_and_an_episode_ends_in_a_frame_of_its_own():
    actors, actions_TA = Actors("CartPole-v1", 2, "train", 3), actions(60, 2)
    env, over = gymnasium.make("CartPole-v1"), True
    for turn, actions_A in enumerate(actions_TA):
        seed = int(actors.seeds(turn)[1])
        seen = actors.turn(turn, actions_A)
        if over:
            frame, reward, end, over, age = env.reset(seed=seed)[0], 0.0, False, False, 0
        else:
            frame, reward, end, late, _ = env.step(int(actions_A[1]))
            over, age = end or late, age + 1
        assert np.array_equal(seen.frames[1], frame)
        assert (seen.rewards_A[1], seen.ends_A[1], seen.ages_A[1], actors.over_A[1]) == (reward, end, age, over)
    assert env.spec.max_episode_steps == actors.longest == 500


def test_a_limit_of_time_ends_no_value():
    actors = Actors("MountainCar-v0", 1, "train", 0)  # which random play does not solve
    *before, last = played(actors, actions(201, 1, 3))
    assert actors.over_A[0] and last.ages_A[0] == 200
    assert not any(seen.ends_A[0] for seen in [*before, last])
    assert actors.turn(201, np.zeros(1, np.int64)).ages_A[0] == 0


@pytest.mark.parametrize("game", GAMES)
def test_an_actor_does_not_depend_on_the_others(game):
    actions_TA = actions(150, 3)
    three, one = Actors(game, 3, "train", 1), Actors(game, 1, "train", 1)
    for a, b in zip(played(three, actions_TA), played(one, actions_TA[:, :1]), strict=True):
        assert np.array_equal(a.frames[0], b.frames[0])
        assert (a.rewards_A[0], a.ends_A[0], a.ages_A[0]) == (b.rewards_A[0], b.ends_A[0], b.ages_A[0])


@pytest.mark.parametrize("game", GAMES)
def test_restored_from_the_actions_alone(game):
    """They are in the midst of episodes that began in different turns, none of them in turn 0."""
    n, turns = 2, 400
    actions_TA = actions(turns + 300, n)
    whole = Actors(game, n, "train", 2)
    seen = played(whole, actions_TA[:turns])
    starts_A, frames = turns - 1 - seen[-1].ages_A, seen[-1].frames
    first = int(starts_A.min())
    assert first > 0 and len({*starts_A}) > 1
    again = Actors(game, n, "train", 2)
    again.restore(enumerate(actions_TA[first:turns], first), starts_A, frames)
    after = [played(actors, actions_TA[turns:], turns) for actors in (whole, again)]
    assert sum(bool((s.ages_A == 0).any()) for s in after[0]) > 1
    assert all(same(a, b) for a, b in zip(*after, strict=True))

    with pytest.raises(UserError, match="went another way"):
        Actors(game, n, "train", 2).restore(enumerate(actions_TA[first:turns], first), starts_A, 1 - frames)


def test_atari_is_what_the_paper_plays():
    """Grey frames of 84x84, of which the first has been idled to; a lost life ends values, the fifth the game."""
    actors, n = Actors("atari/breakout", 4, "train", 0), 4
    assert (actors.shape, actors.dtype, actors.actions, actors.longest) == ((84, 84), np.uint8, 4, 4500)
    lives = np.zeros(n)
    for turn, actions_A in enumerate(actions(500, n, 4)):
        begin_A = actors.over_A
        seen = actors.turn(turn, actions_A)
        assert seen.frames.any(axis=(1, 2)).all()
        assert (seen.ages_A == 0).tolist() == begin_A.tolist()
        assert not seen.ends_A[begin_A].any() and not seen.rewards_A[begin_A].any()
        lives = np.where(begin_A, 5, lives - seen.ends_A)
        assert (actors.over_A == (lives == 0)).all()
    assert len({*map(int, seen.ages_A)}) > 1


def test_a_film_is_the_episode():
    actors = Actors("atari/pong", 1, "eval", 5)
    seed, actions_TA = int(actors.seeds(0)[0]), actions(40, 1, 6)
    frames = [seen.frames[0] for seen in played(actors, np.concatenate([[[0]], actions_TA]))]
    pictures = list(film("atari/pong", seed, actions_TA[:, 0].tolist()))
    assert len(pictures) == len(frames) and pictures[0].shape == (210, 160, 3)
    for frame, picture in zip(frames, pictures, strict=True):  # the same ball at the same place
        left, right = (half.astype(float).mean() for half in np.hsplit(picture.mean(2), 2))
        assert abs((left - right) - (frame[:, :42].mean() - frame[:, 42:].mean())) < 6
    cart = list(film("CartPole-v1", 0, [0, 1, 1]))
    assert len(cart) == 4 and cart[0].shape == (400, 600, 3) and not np.array_equal(cart[0], cart[3])


@pytest.mark.parametrize(
    ("game", "why"),
    [
        ("atari/pomg", "atari/pong"),
        ("CartPoule-v1", "CartPoule"),
        ("Pendulum-v1", "discrete actions"),
        ("FrozenLake-v1", "arrays to see"),
    ],
)
def test_games_that_cannot_be_played_are_refused(game, why):
    with pytest.raises(UserError, match=why):
        Actors(game, 1, "train", 0)
