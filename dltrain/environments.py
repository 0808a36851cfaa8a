"""Games played side by side, one action each a turn. The only importer of gymnasium and ale_py.

`atari/pong` is a game of the Arcade Learning Environment by the name of its ROM, as Mnih et al. 2015
(https://doi.org/10.1038/nature14236, methods) have it: no sticky actions, every fourth frame, the maximum of two
frames, grey, 84x84 pixels, up to 30 idle frames at the start, five minutes at most. Any other name is gymnasium's.

An episode is a function of its actions and its seed, which is (what for, seed, actor, turn): nothing has state that the
actions since the episode's beginning would not restore.

Legend: A actors (each has a game of its own), T turns; frames_A... are uint8 [A, 84, 84] or float32 [A, D].
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dltrain.errors import UserError
from dltrain.seeds import key

ATARI = "atari/"
SKIP = 4  # frames of an action
MINUTES_5 = 18_000  # frames


@dataclass(frozen=True)
class Seen:
    """What a turn's actions led to."""

    frames: np.ndarray  # [A, ...]
    rewards_A: np.ndarray  # float32
    ends_A: np.ndarray  # whether nothing follows that a value could be of: termination or, in Atari, a lost life
    ages_A: np.ndarray  # int32, turns since the episode began: at 0 the game began and the action was ignored


class Actors:
    """`n` games. `game` as above; `what` they are played for and `seed` decide the episodes.

    Attributes: `actions`, how many there are; `shape` and `dtype` of a frame; `longest`, the turns of an episode at
    most; `over_A`, whose episode has ended, by itself or by a limit of time: the next turn begins another.

    Raises:
        UserError: for a game that is not there, or has other than discrete actions and arrays to see.
    """

    def __init__(self, game: str, n: int, what: str, seed: int):
        self.games = _Atari(game, n) if game.startswith(ATARI) else _Gymnasium(game, n)
        self.actions, self.shape, self.dtype = self.games.actions, self.games.shape, self.games.dtype
        self.longest, self.what, self.seed = self.games.longest, what, seed
        self.over_A, self.ages_A = np.ones(n, bool), np.zeros(n, np.int32)

    def seeds(self, turn: int) -> np.ndarray:
        """Of the episodes that begin in this turn, int64 [A]."""
        return np.array([key(self.what, self.seed, actor, turn) % 2**31 for actor in range(len(self.over_A))])

    def turn(self, turn: int, actions_A: np.ndarray) -> Seen:
        """Every game takes its action, or begins if it was over."""
        begin_A = self.over_A
        frames, rewards_A, ends_A, self.over_A = self.games.step(
            actions_A, begin_A, self.seeds(turn) if begin_A.any() else None
        )
        self.ages_A = np.where(begin_A, 0, self.ages_A + 1).astype(np.int32)
        return Seen(frames, rewards_A, ends_A, self.ages_A)

    def restore(self, turns: Iterable[tuple[int, np.ndarray]], starts_A: np.ndarray, frames: np.ndarray) -> None:
        """Play the actions of turns again, from the earliest start on, after which everyone must see these frames.
        `starts_A`: the turns in which the episodes began that are under way then.

        Raises:
            UserError: where the games came out otherwise.
        """
        turn, seen = 0, None
        for turn, actions_A in turns:
            self.over_A = self.over_A | (starts_A == turn)
            seen = self.turn(turn, actions_A)
        if seen is None or not (np.array_equal(turn - seen.ages_A, starts_A) and np.array_equal(seen.frames, frames)):
            raise UserError("the games went another way than before: is gymnasium or ale-py of another version here?")


class _Gymnasium:
    """Environments of gymnasium that show arrays, one after the other."""

    def __init__(self, game: str, n: int):
        self.envs = [make(game) for _ in range(n)]
        sees: Any = self.envs[0].observation_space
        self.actions, self.shape, self.dtype = int(self.envs[0].action_space.n), sees.shape, sees.dtype
        self.longest = self.envs[0].spec.max_episode_steps

    def step(self, actions_A: np.ndarray, begin_A: np.ndarray, seeds_A: np.ndarray | None) -> tuple:
        n = len(self.envs)
        frames, rewards_A = np.empty((n, *self.shape), self.dtype), np.zeros(n, np.float32)
        ends_A, over_A = np.zeros(n, bool), np.zeros(n, bool)
        for i, env in enumerate(self.envs):
            if begin_A[i]:
                assert seeds_A is not None
                frames[i] = env.reset(seed=int(seeds_A[i]))[0]
            else:
                frames[i], rewards_A[i], ends_A[i], late, _ = env.step(int(actions_A[i]))
                over_A[i] = ends_A[i] or late
        return frames, rewards_A, ends_A, over_A


class _Atari:
    """ALE's own vector environment, which plays in threads."""

    def __init__(self, game: str, n: int):
        self.envs = make_atari(game, n)
        self.actions, self.shape, self.dtype = int(self.envs.single_action_space.n), (84, 84), np.dtype(np.uint8)
        self.longest, self.lives_A = MINUTES_5 // SKIP, None

    def step(self, actions_A: np.ndarray, begin_A: np.ndarray, seeds_A: np.ndarray | None) -> tuple:
        n = len(begin_A)
        rewards_A, ends_A, over_A = np.zeros(n, np.float32), np.zeros(n, bool), np.zeros(n, bool)
        frames, info = None, {}
        if self.lives_A is not None:
            frames, rewards, died, late, info = self.envs.step(actions_A.astype(np.int64))
            on_A = ~begin_A  # the others were over, and ALE has begun them with a seed of its own
            rewards_A[on_A] = rewards[on_A]
            ends_A[on_A] = (died | (info["lives"] < self.lives_A))[on_A]
            over_A[on_A] = (died | late)[on_A]
        if begin_A.any():
            assert seeds_A is not None
            frames, info = self.envs.reset(seed=seeds_A[begin_A], options={"reset_mask": begin_A})
        self.lives_A = info["lives"]
        assert frames is not None
        return frames[:, 0].copy(), rewards_A, ends_A, over_A


def make(game: str, render: bool = False) -> Any:
    """An environment of gymnasium. UserError where that, or the game, is missing or of another kind."""
    try:
        import gymnasium
    except ImportError as error:
        raise UserError("games need gymnasium: pip install 'dltrain[rl]'") from error
    try:
        env = gymnasium.make(game, render_mode="rgb_array" if render else None, disable_env_checker=True)
    except gymnasium.error.Error as error:
        raise UserError(
            f"--game {game}: {str(error).splitlines()[0]}; Atari's games are {ATARI}pong and so on"
        ) from None
    discrete = isinstance(env.action_space, gymnasium.spaces.Discrete)
    limit = env.spec.max_episode_steps if env.spec else None
    if not (discrete and isinstance(env.observation_space, gymnasium.spaces.Box) and limit):
        raise UserError(
            f"--game {game}: wanted are discrete actions, arrays to see and a limit of time, as CartPole-v1"
        )
    return env


def make_atari(game: str, n: int, colours: bool = False) -> Any:
    """ALE's vector environment, in 84x84 grey, or in the colours and the size of the screen."""
    try:
        from ale_py import roms
        from ale_py.vector_env import AtariVectorEnv
        from gymnasium.vector import AutoresetMode
    except ImportError as error:
        raise UserError("Atari's games need gymnasium and ale-py: pip install 'dltrain[rl]'") from error
    name = game.removeprefix(ATARI)
    if name not in (known := roms.get_all_rom_ids()):
        near = difflib.get_close_matches(name, known, 3) or ["pong"]
        raise UserError(f"--game {game}: ale-py has no such game; there are {', '.join(ATARI + one for one in near)}")
    height, width = (210, 160) if colours else (84, 84)
    return AtariVectorEnv(
        name, n, num_threads=min(n, os.cpu_count() or 1), max_num_frames_per_episode=MINUTES_5,
        autoreset_mode=AutoresetMode.NEXT_STEP, img_height=height, img_width=width, grayscale=not colours, stack_num=1,
        frameskip=SKIP, maxpool=True, noop_max=30, reward_clipping=False, use_fire_reset=False,
    )  # fmt: skip


def film(game: str, seed: int, actions: Sequence[int]) -> Iterator[np.ndarray]:
    """uint8 [H, W, 3] pictures of an episode: its beginning, and what every action led to."""
    if game.startswith(ATARI):
        atari = make_atari(game, 1, colours=True)
        yield atari.reset(seed=np.array([seed]))[0][0, 0].copy()
        for action in actions:
            yield atari.step(np.array([action]))[0][0, 0].copy()
        return
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame draws without a screen
    env = make(game, render=True)
    env.reset(seed=seed)
    yield env.render()
    for action in actions:
        env.step(int(action))
        yield env.render()
