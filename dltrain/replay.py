"""Replay memory: the last turns of all actors, of which the learner draws transitions (Lin 1992; Mnih et al. 2015).

A row is an arrival: the frame that an actor saw in a turn, and the action and reward that led there. So a transition is
a row and the one before, nothing is stored twice, and the newest row is what the actor sees now. A state is the last
K frames of the episode, with zeros before its beginning, both for the actors and for the learner.

Turns only ever come to it. With a folder they are also appended to files there, of which a run that resumes reads those
up to its checkpoint again and cuts off the rest: a checkpoint costs one fsync, however large the memory is.

Legend: A actors, K frames of a state, M rows of a micro-batch.
"""

import os
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor

from dltrain.environments import Actors, Seen
from dltrain.errors import UserError
from dltrain.files import sync
from dltrain.progress import track
from dltrain.rundir import saving

SEGMENT = 4096  # turns of a file


class Replay:
    """The last `transitions` transitions of `actors`, whose states are of `frames` frames.

    `folder`: where the turns are kept; `writes`: whether this is the process that writes them.
    """

    fingerprint = "replay"

    def __init__(self, actors: Actors, transitions: int, frames: int, folder: Path | None = None, writes: bool = True):
        fields: list[Any] = [("frame", actors.dtype, actors.shape), ("action", "u1"), ("reward", "<f4"), ("end", "?")]
        self.row, self.actors, self.frames = np.dtype([*fields, ("age", "<i4")]), len(actors.over_A), frames
        turns = -(-transitions // self.actors) + frames  # the oldest state needs the frames before it
        self.ring = np.empty((turns, self.actors), self.row)
        self.turn = 0  # how many there were
        self.reach = max(turns, actors.longest + 1)  # turns that going on from one asks for
        self.folder, self.writes = folder, writes
        self.file: tuple[int, BinaryIO] | None = None  # first turn of the segment, its file

    # --- what comes in -------------------------------------------------------------------------------------------

    def append(self, actions_A: np.ndarray, seen: Seen) -> None:
        """The actions of a turn and what they led to."""
        rows_A = self.ring[self.turn % len(self.ring)]
        rows_A["frame"], rows_A["action"], rows_A["reward"] = seen.frames, actions_A, seen.rewards_A
        rows_A["end"], rows_A["age"] = seen.ends_A, seen.ages_A
        if self.folder and self.writes:
            first = self.turn // SEGMENT * SEGMENT
            if self.file is None or self.file[0] != first:
                self.flush()
                self.file = first, self._path(first).open("ab", buffering=0)
            with saving(self._path(first)):
                self.file[1].write(rows_A.tobytes())
        self.turn += 1

    # --- what goes out -------------------------------------------------------------------------------------------

    def states(self) -> Tensor:
        """What the actors see now, [A, K, ...]."""
        return self._states(np.full(self.actors, self.turn - 1), np.arange(self.actors))

    def __len__(self) -> int:
        return 1 << 32

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        """Row i of 2^32 is the transition at the fraction i / 2^32 of the memory as it is now, so a shuffle of the rows
        draws uniformly. A row in which an episode began is no transition and weighs nothing.

        states and next, both [M, K, ...]; actions_M, rewards_M, ends_M, weights_M and count.
        """
        first = max(0, self.turn - len(self.ring)) + self.frames
        turn_M, actor_M = np.divmod(index_M * ((self.turn - first) * self.actors) >> 32, self.actors)
        turn_M += first
        rows_M = turn_M % len(self.ring), actor_M
        weights_M = torch.from_numpy(self.ring["age"][rows_M] > 0).float()
        return {
            "states": self._states(turn_M - 1, actor_M),
            "next": self._states(turn_M, actor_M),
            "actions_M": torch.from_numpy(self.ring["action"][rows_M].astype(np.int64)),
            "rewards_M": torch.from_numpy(self.ring["reward"][rows_M]),
            "ends_M": torch.from_numpy(self.ring["end"][rows_M]).float(),
            "weights_M": weights_M,
            "count": weights_M.sum().long(),
        }

    def _states(self, turn_M: np.ndarray, actor_M: np.ndarray) -> Tensor:
        back_K = np.arange(self.frames)[::-1]
        turn_MK = np.maximum(turn_M[:, None] - back_K, 0)
        frames = self.ring["frame"][turn_MK % len(self.ring), actor_M[:, None]]
        frames[back_K > self.ring["age"][turn_M % len(self.ring), actor_M][:, None]] = 0
        return torch.from_numpy(frames)

    def spread(self) -> Tensor:
        """Standard deviation of each number of the frames that are in memory; 1 of those that never change."""
        spread = self.ring["frame"][: self.turn].std((0, 1))
        return torch.from_numpy(np.where(spread > 0, spread, 1))

    # --- what is kept --------------------------------------------------------------------------------------------

    def flush(self) -> None:
        """Have all turns on the disk: to be called before a checkpoint is published."""
        if self.file is not None and self.folder:
            with saving(self.folder):
                os.fsync(self.file[1].fileno())
            self.file[1].close()
            self.file = None
            sync(self.folder)

    def rewind(self, turn: int) -> None:
        """Drop all later turns from the folder. The one process that writes calls this, before any calls `resume`."""
        assert self.folder is not None
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in self.folder.glob("*.turns"):
            keep = (turn - int(path.stem)) * self.actors * self.row.itemsize
            if keep <= 0:
                path.unlink()
            elif path.stat().st_size > keep:
                os.truncate(path, keep)
        sync(self.folder)

    def prune(self, turn: int) -> None:
        """Delete the files of turns so early that going on from `turn` does not need them."""
        for path in self.folder.glob("*.turns") if self.folder and self.writes else []:
            if int(path.stem) + SEGMENT <= turn - self.reach:
                path.unlink()

    def resume(self, turn: int, actors: Actors) -> None:
        """Read the memory as it was after `turn` turns, and play the episodes that were under way again.

        Raises:
            UserError: where the folder does not have the turns, or the games go another way.
        """
        self.turn = turn
        first = max(0, turn - len(self.ring))
        self.ring[np.arange(first, turn) % len(self.ring)] = self._read(first, turn)
        now_A = self.ring[(turn - 1) % len(self.ring)]
        starts_A = turn - 1 - now_A["age"]
        played = [*enumerate(self._read(starts_A.min(), turn)["action"], starts_A.min())]
        actors.restore(track(played, "turns played again") if self.writes else played, starts_A, now_A["frame"])

    def _read(self, first: int, end: int) -> np.ndarray:
        """The rows of the turns first ... end - 1, [T, A]."""
        parts = []
        for start in range(first // SEGMENT * SEGMENT, end, SEGMENT):
            a, b = max(first - start, 0), min(end - start, SEGMENT)
            path, count = self._path(start), (b - a) * self.actors
            offset = a * self.actors * self.row.itemsize
            rows = np.fromfile(path, self.row, count, offset=offset) if path.exists() else np.empty(0, self.row)
            if len(rows) < count:
                why = "remove the newest checkpoint, or begin anew in another --out"
                raise UserError(f"{path} lacks turns that the checkpoint counts on: {why}")
            parts.append(rows.reshape(-1, self.actors))
        return np.concatenate(parts)

    def _path(self, first: int) -> Path:
        assert self.folder is not None
        return self.folder / f"{first:012}.turns"
