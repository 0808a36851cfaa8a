"""Random numbers of rows: each a function of (seed, epoch, row), whole batches at a time.

A numpy generator per row would cost 16 microseconds, an eighth of decoding an image; this costs less than one.

Shapes: M rows, N draws of each.
"""

import numpy as np

from dltrain import seeds
from dltrain.data.order import GOLDEN, mix


def row_keys(seed: int, epoch_M: np.ndarray, index_M: np.ndarray) -> np.ndarray:
    """uint64 [M]: what all random numbers of these rows come from."""
    key_M = np.uint64(seeds.key("row", seed)) ^ mix(epoch_M.astype(np.uint64) + np.uint64(1))
    return mix(mix(key_M) ^ index_M.astype(np.uint64))


def fork(key_M: np.ndarray, what: str) -> np.ndarray:
    """uint64 [M]: keys of their own for one thing, so that rows' crops do not follow their flips."""
    return mix(key_M.astype(np.uint64) ^ np.uint64(seeds.key(what)))


def uniform(key_M: np.ndarray, what: str, n: int) -> np.ndarray:
    """float64 [M, n] in [0, 1): for each key the first n outputs of a SplitMix64 that starts at `fork(key, what)`."""
    bits_MN = mix(fork(key_M, what)[:, None] + np.arange(n, dtype=np.uint64) * GOLDEN)
    return (bits_MN >> np.uint64(11)) * 2.0**-53


def generator(key_M: np.ndarray, what: str) -> np.random.Generator:
    """For what concerns a micro-batch as a whole: its first row says which micro-batch it is."""
    return np.random.Generator(np.random.Philox(key=seeds.key(what, int(key_M[0]))))
