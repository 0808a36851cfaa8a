"""The order of rows: each exactly once an epoch, a new order every epoch, from the position alone."""

import collections
import math

import numpy as np
import pytest

from dltrain.data.order import Order


@pytest.mark.parametrize("n", [1, 2, 3, 7, 64, 65, 1000, 4097])
def test_each_index_once_an_epoch(n):
    epoch, index = Order(n, seed=3).at(np.arange(3 * n))
    assert epoch.tolist() == np.repeat(np.arange(3), n).tolist()
    assert (np.sort(index.reshape(3, n), axis=1) == np.arange(n)).all()
    if n > 10:
        assert len({row.tobytes() for row in index.reshape(3, n)}) == 3


def test_a_position_alone_is_enough():
    order = Order(1000, seed=1)
    positions = np.arange(2500)
    epoch, index = order.at(positions)
    backwards = order.at(positions[::-1])
    assert (backwards[0][::-1] == epoch).all() and (backwards[1][::-1] == index).all()
    assert order.at(np.array([1234]))[1].item() == index[1234]
    assert (Order(1000, seed=2).at(positions)[1] != index).any()
    assert Order(1000, 0).at(np.arange(4))[1].tolist() == [503, 151, 694, 273]  # a stored run must go on as it began


def test_without_shuffling():
    epoch, index = Order(5, 0, shuffle=False).at(np.arange(4, 7))
    assert epoch.tolist() == [0, 1, 1] and index.tolist() == [4, 0, 1]


def test_at_scale_in_constant_memory():
    index = Order(10**12, 7).at(10**14 + np.arange(100_000))[1]
    assert index.min() >= 0 and index.max() < 10**12 and len(np.unique(index)) == 100_000
    assert abs(index.mean() / 10**12 - 0.5) < 5 * math.sqrt(1 / 12 / 100_000)


def test_permutations_are_uniform():
    """Chi-squared over all 24 orders of 4 rows; 20,000 epochs; 23 degrees of freedom, 49.7 is p = 0.001."""
    orders = Order(4, 1).at(np.arange(4 * 20_000))[1].reshape(-1, 4)
    counts = collections.Counter(map(tuple, orders.tolist()))
    expected = len(orders) / 24
    assert len(counts) == 24 and sum((count - expected) ** 2 / expected for count in counts.values()) < 49.7


def test_shuffling_is_global():
    n = 20_000
    index = Order(n, 5).at(np.arange(n))[1]
    assert abs(np.abs(index - np.arange(n)).mean() / (n / 3) - 1) < 0.03  # a buffer of 1,000 would give 0.15
    assert abs(np.corrcoef(index[:-1], index[1:])[0, 1]) < 4 / math.sqrt(n)
