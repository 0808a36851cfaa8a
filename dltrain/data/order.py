"""Which row comes when: a pure function of (seed, position), with nothing to store and nothing to replay.

Shapes: P positions.
"""

import hashlib
from collections.abc import Iterable

import numpy as np

from dltrain.errors import UserError

ROUNDS = 6


class Order:
    """Position p is row `index` of epoch p // n; every epoch is its own permutation of 0 ... n - 1.

    The permutation is a Feistel network over the smallest square power of two >= n, keyed by (seed, epoch), walked
    along its cycle until it falls below n: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002, section 3
    (cycle walking).
    """

    def __init__(self, n: int, seed: int, shuffle: bool = True):
        assert n >= 1, n
        self.n, self.shuffle = n, shuffle
        self._key = _mix(np.array([seed & (2**64 - 1)], np.uint64))
        self._half = np.uint64(
            max(3, ((n - 1).bit_length() + 1) // 2)
        )  # bits; below 3 there are too few round functions

    def at(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 positions >= 0 -> (epoch_P, index_P), int64."""
        epoch_P, index_P = np.divmod(np.asarray(position_P, np.int64), self.n)
        if not self.shuffle:
            return epoch_P, index_P
        key_P = _mix(self._key ^ _mix(epoch_P.astype(np.uint64) + np.uint64(1)))
        index_P = self._encrypt(index_P.astype(np.uint64), key_P)
        while (outside := np.flatnonzero(index_P >= self.n)).size:
            index_P[outside] = self._encrypt(index_P[outside], key_P[outside])
        return epoch_P, index_P.astype(np.int64)

    def _encrypt(self, x_P: np.ndarray, key_P: np.ndarray) -> np.ndarray:
        mask = np.uint64((1 << int(self._half)) - 1)
        left, right = x_P >> self._half, x_P & mask
        for i in range(ROUNDS):
            left, right = right, left ^ (_mix((key_P + np.uint64(i)) ^ _mix(right)) & mask)
        return (left << self._half) | right


def _mix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 on an array of uint64: Steele, Lea and Flood, 2014, figure 17 (variant 13)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


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
