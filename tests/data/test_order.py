"""The order of rows: each exactly once an epoch, a new order every epoch, from the position alone."""

import collections
import hashlib
import json
import math
import time

import numpy as np
import pytest
import torch

from dltrain.data.order import Order, Windowed
from dltrain.errors import UserError
from dltrain.seeds import key


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


@pytest.mark.parametrize(
    ("n", "start", "golden"),
    [
        (7, 0, "ca6cde19a198d872"),  # many epochs in a block
        (1_281_167, 1_281_167 - 500, "7ba1510739be2204"),  # two
        (1_281_167, 5 * 1_281_167, "921a03c6e58ce1d1"),  # one
        (10**12, 10**14, "cd7b56b92b5c78fa"),  # too large for tables
    ],
)
def test_a_stored_run_goes_on_as_it_began(n, start, golden):
    index = Order(n, 7).at(np.arange(start, start + 1000))[1]
    assert hashlib.sha256(index.astype("<i8").tobytes()).hexdigest()[:16] == golden


def test_a_block_is_its_positions_one_by_one():
    """Blocks within an epoch take a table, others do not; both are the same function."""
    order = Order(3000, 4)
    positions = np.arange(2000, 7000, 7)
    _, index = order.at(positions)
    for part in (positions[:100], positions[100:400], positions[400:], positions[:0]):
        assert (order.at(part)[1] == index[np.searchsorted(positions, part)]).all()
    assert [order.at(np.array([p]))[1].item() for p in positions[::50]] == index[::50].tolist()


def class_mix(index: np.ndarray, classes: int = 10, batch: int = 100) -> tuple[float, float]:
    """Chi-squared of the classes in each batch, of samples sorted by class: (p, statistic over its degrees of
    freedom)."""
    class_of = index * classes // len(index)
    table = np.zeros((len(index) // batch, classes))
    np.add.at(table, (np.arange(len(index)) // batch, class_of), 1)
    statistic, freedom = ((table - batch / classes) ** 2).sum() / (batch / classes), len(table) * (classes - 1)
    halves = torch.tensor([freedom / 2, statistic / 2], dtype=torch.float64)
    return torch.special.gammaincc(halves[0], halves[1]).item(), statistic / freedom


def test_batches_of_class_sorted_samples_are_mixed_as_by_chance():
    n = 50_000
    index = Order(n, 0).at(np.arange(n))[1]
    assert np.abs(index - np.arange(n)).mean() >= 0.95 * n / 3
    assert 0.01 < class_mix(index)[0] < 0.99  # 500 batches
    ps = [class_mix(Order(n, key(seed)).at(np.arange(n))[1])[0] for seed in range(16)]
    assert abs(np.mean(ps) - 0.5) < 4 * math.sqrt(1 / 12 / len(ps))  # uniform: neither clumped nor spread too evenly
    assert class_mix(np.arange(n))[0] == 0 and class_mix(np.arange(n).reshape(100, -1).T.ravel())[0] == 1


def test_epochs_and_seeds_are_independent():
    n = 20_000
    orders = [Order(n, seed).at(np.arange(2 * n))[1].reshape(2, n) for seed in (11, 12)]
    for a, b in ((orders[0][0], orders[0][1]), (orders[0][0], orders[1][0]), (orders[0][1], orders[1][1])):
        assert abs(np.corrcoef(a, b)[0, 1]) < 4 / math.sqrt(n)
        assert (a == b).sum() <= 8  # Poisson of mean 1
        assert abs(np.corrcoef(a[:-1], b[1:])[0, 1]) < 4 / math.sqrt(n)
    keyed = [Order(64, key("order", seed)).at(np.arange(64 * 8))[1].reshape(8, 64) for seed in range(8)]
    assert len({row.tobytes() for rows in keyed for row in rows}) == 64


def test_state_tells_what_differs():
    state = json.loads(json.dumps(Order(100, 3).state()))
    Order(100, 3).check(state, 10**6)
    for other, words in ((Order(101, 3), "rows is 101, the checkpoint has 100"), (Order(100, 4), "seed is 4")):
        with pytest.raises(UserError, match=words):
            other.check(state, 0)
    with pytest.raises(UserError, match="shuffle is True, the checkpoint has False"):
        Order(100, 3).check(Order(100, 3, shuffle=False).state(), 0)


COUNTS = [[5], [0, 3, 0], [10, 1, 0, 7, 64, 0, 3], [100] * 9, [1] * 40]


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("shards", [1, 2, 4, 100])
def test_windows_give_each_sample_once_an_epoch_from_few_shards(counts, shards):
    order, n = Windowed(counts, 3, shards), sum(counts)
    epoch, index = order.at(np.arange(3 * n))
    assert epoch.tolist() == np.repeat(np.arange(3), n).tolist()
    assert (np.sort(index.reshape(3, n), axis=1) == np.arange(n)).all()
    shard = np.searchsorted(np.cumsum(counts), index, "right")
    position, opened = 0, []
    while position < 3 * n:
        wanted, after = order.window(position)
        assert len(wanted) <= shards and set(shard[position:after]) == set(wanted)
        assert [part.tolist() for part in order.window(after - 1)[:1]] == [wanted.tolist()]
        position, opened = after, opened + wanted.tolist()
    assert position == 3 * n and sorted(opened) == sorted(3 * np.flatnonzero(counts).tolist())


def test_a_position_alone_is_enough_for_windows():
    order = Windowed([30, 0, 7, 12, 50, 1, 20], 1, 2)
    positions = np.arange(700)
    epoch, index = order.at(positions)
    jumbled = np.random.default_rng(0).permutation(700)
    assert all((part == whole[jumbled]).all() for part, whole in zip(order.at(jumbled), (epoch, index)))
    assert Windowed([30, 0, 7, 12, 50, 1, 20], 1, 2).at(np.array([432]))[1].item() == index[432]
    assert len({row.tobytes() for row in index[:600].reshape(5, 120)}) == 5
    assert (Windowed([30, 0, 7, 12, 50, 1, 20], 2, 2).at(positions)[1] != index).any()
    alone = Windowed([64], 1, 1).at(np.arange(64 * 5))[1].reshape(5, 64)  # one window, always the same shards
    assert len({row.tobytes() for row in alone}) == 5
    assert index[:8].tolist() == [65, 83, 102, 55, 96, 82, 118, 87]


def test_windows_far_into_a_large_index():
    """Sample 10^8 + 10^12 of 10,000 shards: from the position alone, in the time of one epoch's order of shards."""
    counts = np.random.default_rng(0).integers(5_000, 15_000, 10_000)
    start = time.perf_counter()
    index = Windowed(counts, 1, 16).at(np.arange(10**12 + 10**8, 10**12 + 10**8 + 1000))[1]
    assert time.perf_counter() - start < 1
    shard = np.searchsorted(np.cumsum(counts), index, "right")
    assert len(np.unique(index)) == 1000 and 2 <= len(np.unique(shard)) <= 32


def test_what_a_window_costs_in_mixing():
    """Class-sorted, 500 shards of 100: samples travel as far as by a whole shuffle, since the shards are shuffled,
    but a batch has the classes of the window's shards: 1 is chance, unshuffled shards one at a time are 100."""
    n = 50_000
    clumping = []
    for shards in (1, 10, 50, 500):
        index = Windowed([100] * 500, 2, shards).at(np.arange(n))[1]
        assert np.abs(index - np.arange(n)).mean() >= 0.95 * n / 3
        clumping.append(class_mix(index)[1])
    assert clumping[0] == pytest.approx(100) and 8 < clumping[1] < 13 and 2 < clumping[2] < 4
    assert 0.9 < clumping[3] < 1.1


def test_windows_that_cannot_be():
    with pytest.raises(UserError, match="2 shards with no samples"):
        Windowed([0, 0], 1, 2)
    with pytest.raises(UserError, match="at least 1"):
        Windowed([3], 1, 0)
    state = json.loads(json.dumps(Windowed([3, 4], 1, 2).state()))
    Windowed([3, 4], 1, 2).check(state, 5)
    for other, words in (
        (Windowed([4, 3], 1, 2), "counts"),
        (Windowed([3, 4], 2, 2), "seed is 2"),
        (Windowed([3, 4], 1, 1), "window is 1, the checkpoint has 2"),
        (Order(7, 1), "shuffle is True, the checkpoint has None"),
    ):
        with pytest.raises(UserError, match=words):
            other.check(state, 5)
