"""Which row comes when: pure functions of (seed, position), with nothing to store and nothing to replay.

Shapes: P positions, S shards, K of them that have samples, W windows of an epoch.

Ask in blocks: thousands of positions at once cost about 0.1 us each, one alone some tens of microseconds.
"""

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from dltrain.errors import UserError
from dltrain.seeds import key

ROUNDS = 6
GOLDEN = np.uint64(0x9E3779B97F4A7C15)  # by which the state of SplitMix64 advances
TABLE_BITS = 16  # tables for halves up to this, so for n up to 2^32: at most 3 MiB


class Ordering(Protocol):
    """An endless stream of rows by position. Equal arguments give equal results, in any process."""

    n: int  # every index is below it

    def at(self, position_P: np.ndarray, /) -> tuple[np.ndarray, np.ndarray]:
        """int64 [P], each >= 0 -> (epoch_P, index_P), int64."""
        ...

    def state(self) -> dict[str, Any]:
        """What identifies the stream: small, and the same after a turn through JSON."""
        ...

    def check(self, state: dict[str, Any], position: int, /) -> None:
        """UserError naming what differs if this stream is not, up to `position`, the one that had `state`."""
        ...


class Order:
    """Position p is row `index` of epoch p // n; every epoch is its own permutation of 0 ... n - 1.

    The permutation is a Feistel network over the smallest square power of two >= n, keyed by (seed, epoch), walked
    along its cycle until it falls below n: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 3
    (cycle walking).

    Seed a in epoch b - 1 has the order of seed b in epoch a - 1, so small seeds share orders: give a `seeds.key`.
    """

    def __init__(self, n: int, seed: int, shuffle: bool = True):
        assert n >= 1, n
        self.n, self.seed, self.shuffle = n, seed, shuffle
        self._key = mix(np.array([seed & (2**64 - 1)], np.uint64))
        self._half = max(3, ((n - 1).bit_length() + 1) // 2)  # bits; below 3 there are too few round functions
        self._table: tuple[int, np.ndarray | None] = (-1, None)  # the epoch asked for last, its round functions

    def at(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [P], each >= 0 -> (epoch_P, index_P), int64."""
        position_P = np.asarray(position_P, np.int64)
        epoch_P = position_P // self.n
        x_P = position_P - epoch_P * self.n
        if not self.shuffle or not x_P.size:
            return epoch_P, x_P
        one_epoch = bool((epoch_P == epoch_P[0]).all())
        key_P = self._epoch_key(epoch_P[:1] if one_epoch else epoch_P)
        table = self._round_functions(int(epoch_P[0]), key_P) if one_epoch and self._half <= TABLE_BITS else None
        x_P = self._encrypt(x_P, key_P, table)
        walk = np.flatnonzero(x_P >= self.n)
        while walk.size:
            x_P[walk] = y = self._encrypt(x_P[walk], key_P if one_epoch else key_P[walk], table)
            walk = walk[y >= self.n]
        return epoch_P, x_P

    def state(self) -> dict[str, Any]:
        return {"rows": self.n, "seed": self.seed, "shuffle": self.shuffle}

    def check(self, state: dict[str, Any], position: int) -> None:
        """UserError naming what differs, at any position."""
        require_same(self.state(), state)

    def _epoch_key(self, epoch_P: np.ndarray) -> np.ndarray:
        return mix(self._key ^ mix(epoch_P.astype(np.uint64) + np.uint64(1)))

    def _round_functions(self, epoch: int, key_1: np.ndarray) -> np.ndarray:
        """All values of the round functions of an epoch, int64 [ROUNDS, 2^half]: a look-up instead of two mixes."""
        cached, table = self._table
        if table is None or cached != epoch:
            right = np.arange(1 << self._half, dtype=np.int64)
            table = np.stack([self._round(i, right, key_1) for i in range(ROUNDS)])
            self._table = epoch, table
        return table

    def _encrypt(self, x_P: np.ndarray, key_P: np.ndarray, table: np.ndarray | None) -> np.ndarray:
        left, right = x_P >> self._half, x_P & ((1 << self._half) - 1)
        for i in range(ROUNDS):
            left ^= self._round(i, right, key_P) if table is None else table[i].take(right)
            left, right = right, left
        left <<= self._half
        left |= right
        return left

    def _round(self, i: int, right_P: np.ndarray, key_P: np.ndarray) -> np.ndarray:
        mixed = mix((key_P + np.uint64(i)) ^ mix(right_P.view(np.uint64)))
        mixed &= np.uint64((1 << self._half) - 1)
        return mixed.view(np.int64)


class Windowed:
    """A shuffle that needs few shards at a time, for shards that are far away.

    Each epoch puts the shards in an order of its own and cuts it into windows of at most `shards` shards, as equal as
    can be; within a window all samples are permuted. So every sample comes once an epoch, and every shard is wanted
    during one window of an epoch. Index i counts samples in the order of the shards, as `Shards` does.
    """

    def __init__(self, counts_S: Sequence[int] | np.ndarray, seed: int, shards: int):
        """`counts_S` samples in each shard (0 is allowed); `shards` of them in a window. UserError if there is no
        sample, or no shard in a window."""
        self._count_S = np.asarray(counts_S, np.int64)
        self.n, self.seed, self.shards = int(self._count_S.sum()), seed, shards
        if not self.n:
            raise UserError(f"{len(self._count_S)} shards with no samples at all; check the pattern of the shards")
        if shards < 1:
            raise UserError(f"a window of {shards} shards holds nothing; give at least 1")
        self._first_S = np.cumsum(self._count_S) - self._count_S
        self._full = np.flatnonzero(self._count_S)  # [K]; there is nothing to open in the others
        self._shard_order = Order(len(self._full), key("shards", seed))
        windows = -(-len(self._full) // shards)
        self._edge = np.arange(windows + 1) * len(self._full) // windows  # [W + 1], in shards of the epoch
        self._plan: tuple[int, np.ndarray, np.ndarray] = (-1, self._full, self._full)
        self._inner: tuple[tuple[int, int], Order] = ((-1, -1), self._shard_order)

    def at(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [P], each >= 0 -> (epoch_P, index_P), int64."""
        position_P = np.asarray(position_P, np.int64)
        epoch_P = position_P // self.n
        index_P = position_P - epoch_P * self.n
        for epoch in np.unique(epoch_P).tolist():
            shard_K, start_K = self._epoch(epoch)
            here = np.flatnonzero(epoch_P == epoch)
            offset_P = index_P[here]
            window_P = np.searchsorted(start_K[self._edge], offset_P, "right") - 1
            for window in np.unique(window_P).tolist():
                inside = np.flatnonzero(window_P == window)
                low, high = self._edge[window : window + 2].tolist()
                place = start_K[low] + self._order(epoch, window, start_K).at(offset_P[inside] - start_K[low])[1]
                k = low + np.searchsorted(start_K[low : high + 1], place, "right") - 1
                index_P[here[inside]] = self._first_S[shard_K[k]] + place - start_K[k]
        return epoch_P, index_P

    def window(self, position: int) -> tuple[np.ndarray, int]:
        """(shards that the window of a position reads, first position after it): what to fetch, and when to go on."""
        epoch, offset = divmod(position, self.n)
        shard_K, start_K = self._epoch(epoch)
        window = int(np.searchsorted(start_K[self._edge], offset, "right")) - 1
        low, high = self._edge[window : window + 2].tolist()
        return shard_K[low:high], epoch * self.n + int(start_K[high])

    def state(self) -> dict[str, Any]:
        counts = hashlib.sha256(self._count_S.astype("<i8").tobytes()).hexdigest()[:16]
        return {"rows": self.n, "seed": self.seed, "window": self.shards, "counts": counts}

    def check(self, state: dict[str, Any], position: int) -> None:
        """UserError naming what differs, at any position."""
        require_same(self.state(), state)

    def _epoch(self, epoch: int) -> tuple[np.ndarray, np.ndarray]:
        """(shards in the order of this epoch [K], positions where they would start one after the other [K + 1])."""
        cached, shard_K, start_K = self._plan
        if cached != epoch:
            many = len(self._full)
            shard_K = self._full[self._shard_order.at(np.arange(epoch * many, (epoch + 1) * many))[1]]
            start_K = np.concatenate([[0], np.cumsum(self._count_S[shard_K])])
            self._plan = epoch, shard_K, start_K
        return shard_K, start_K

    def _order(self, epoch: int, window: int, start_K: np.ndarray) -> Order:
        cached, order = self._inner
        if cached != (epoch, window):
            samples = int(start_K[self._edge[window + 1]] - start_K[self._edge[window]])
            order = Order(samples, key("window", self.seed, epoch, window))
            self._inner = (epoch, window), order
        return order


def require_same(now: dict[str, Any], was: dict[str, Any]) -> None:
    """UserError in one line naming the first entry of two states that differs."""
    for name in now | was:
        if now.get(name) != was.get(name):
            raise UserError(
                f"data {name} is {now.get(name)}, the checkpoint has {was.get(name)}; restore it or start a new run"
            )


def require_same_past(what: str, now: list[list[Any]], was: list[list[Any]], position: int) -> None:
    """UserError unless two lists of [position it holds from, value] agree before `position`."""
    past_now, past_was = ([entry for entry in entries if entry[0] < position] for entries in (now, was))
    if past_now != past_was:
        raise UserError(
            f"{what} before position {position} are {past_now}, the checkpoint has {past_was}; "
            f"restore them, and change only what begins at {position} or later"
        )


def mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 on an array of uint64: Steele, Lea and Flood, 2014, figure 17 (variant 13)."""
    x = x + GOLDEN
    shifted = x >> np.uint64(30)
    x ^= shifted
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= np.right_shift(x, np.uint64(27), out=shifted)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= np.right_shift(x, np.uint64(31), out=shifted)
    return x


def key_hashes(keys: Iterable[str]) -> np.ndarray:
    """The first 8 bytes of each key's SHA-256, as uint64."""
    digests = [hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()[:8] for key in keys]
    return np.frombuffer(b"".join(digests), "<u8")


def split(hash_N: np.ndarray, held_out: float = 0.05) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) numbers, ascending int64, of the samples with these `key_hashes`.

    A sample is held out for its key alone, so it stays where it is when shards are added, renamed or put in another
    order. Neither part is empty: UserError for fewer than two samples.
    """
    assert 0 < held_out < 1, held_out
    if len(hash_N) < 2:
        raise UserError(f"{len(hash_N)} samples cannot be split into training and held-out ones; give at least 2")
    held_N = hash_N < np.uint64(held_out * 2**64)
    if not held_N.any():
        held_N[np.argmin(hash_N)] = True
    if held_N.all():
        held_N[np.argmax(hash_N)] = False
    return np.flatnonzero(~held_N), np.flatnonzero(held_N)
