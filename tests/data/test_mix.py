"""Mixing: each source has its share after any number of rows, its own epochs, and a past that cannot be changed."""

import json
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch

from dltrain.data.mix import Joined, Mix
from dltrain.data.order import Order, Windowed
from dltrain.errors import UserError


def worst_error(mix: Mix, n: int, first: int = 0) -> float:
    """max |rows of source k among the first ... first + i positions - i w_k|, over i up to n and all k."""
    source = mix.deal(np.arange(first, first + n))[0]
    share = [float(w) for w in [weights for start, weights in mix.weights if start <= first][-1]]
    given = np.cumsum(source[:, None] == np.arange(len(share)), axis=0)
    return float(np.abs(given - np.arange(1, n + 1)[:, None] * share).max())


@pytest.mark.parametrize(
    "weights",
    [
        (1,),
        (1 / 3, 2 / 3),
        ("1/3", "1/6", "1/2"),
        (0.7, 0.2, 0.1),
        (0.9, 0, 0.1),
        (5, 3, 1),
        (1000, 1, 1, 1),
        (1,) * 10,
        (0.31, 0.17, 0.13, 0.11, 0.09, 0.07, 0.05, 0.04, 0.02, 0.01),
        tuple(range(1, 11)),
        (0.123456789, 0.3, 0.577215),  # rounded
    ],
    ids=str,
)
def test_shares_hold_after_any_number_of_rows(weights):
    mix = Mix([50] * len(weights), [(0, weights)])
    used = sum(weight != 0 for weight in weights)
    bound = 1 - 1 / (2 * used - 2) if used > 1 else 0
    assert worst_error(mix, 3000) <= bound + 1e-9
    assert worst_error(mix, 70_000) <= bound + 1e-9  # all of a period


def test_shares_hold_for_random_weights():
    generator = np.random.default_rng(0)
    for _ in range(60):
        sources = int(generator.integers(2, 13))
        weights = generator.integers(0, generator.integers(2, 300), sources).tolist()
        weights[0] += 1
        mix = Mix([9] * sources, [(0, weights)])
        assert worst_error(mix, sum(weights)) < 1
        assert mix.dealt(10 * sum(weights)) == [10 * weight for weight in weights]


def test_weights_are_exact_up_to_65536_parts():
    def used(*weights):
        return Mix([9] * len(weights), [(0, weights)]).weights[0][1]

    assert used(1 / 3, 2 / 3) == (Fraction(1, 3), Fraction(2, 3))
    assert used(0.1, "0.2", Fraction(7, 10)) == (Fraction(1, 10), Fraction(1, 5), Fraction(7, 10))
    assert used(65_535, 1) == (Fraction(65_535, 65_536), Fraction(1, 65_536))
    assert used(65_536, 1) == (Fraction(65_535, 65_536), Fraction(1, 65_536))  # 65,537 parts: rounded
    rounded = used(0.123456789, 0.3, 0.576543211)
    assert sum(rounded) == 1 and all(65_536 % w.denominator == 0 for w in rounded)
    assert max(abs(a - b) for a, b in zip(rounded, (0.123456789, 0.3, 0.576543211))) < 1 / 65_536


def test_each_source_goes_through_its_own_epochs():
    sizes, n = [20, 7, 300], 2000
    mix = Mix(sizes, [(0, (2, 1, 3))], seed=5)
    source, within = mix.deal(np.arange(n))
    epoch, index = mix.at(np.arange(n))
    for k, (size, first) in enumerate(zip(sizes, (0, 20, 27))):
        mine = source == k
        assert within[mine].tolist() == list(range(mine.sum()))
        assert (epoch[mine] == within[mine] // size).all()
        whole = index[mine][: mine.sum() // size * size].reshape(-1, size) - first
        assert (np.sort(whole, axis=1) == np.arange(size)).all()
        assert len({row.tobytes() for row in whole}) == len(whole)  # a new order each time
    assert mix.n == 327 and mix.dealt(n) == np.bincount(source).tolist()


def test_weights_equal_to_sizes_make_one_epoch_of_everything():
    sizes = [5000, 123, 1, 777, 60]
    mix = Mix(sizes, [(0, sizes)])
    epoch, index = mix.at(np.arange(3 * sum(sizes)))
    assert (epoch == np.repeat(np.arange(3), sum(sizes))).all()
    assert (np.sort(index.reshape(3, -1), axis=1) == np.arange(sum(sizes))).all()


def test_a_position_alone_is_enough():
    mix = Mix([1000, Windowed([30, 0, 12], 1, 2), Order(9, 0, shuffle=False)], [(0, (3, 1, 1)), (777, (1, 1, 0))], 4)
    epoch, index = mix.at(np.arange(2000))
    jumbled = np.random.default_rng(0).permutation(2000)
    assert all((part == whole[jumbled]).all() for part, whole in zip(mix.at(jumbled), (epoch, index)))
    assert all(part.size == 0 for part in mix.at(np.arange(0)))
    assert index[:10].tolist() == [160, 1012, 879, 1042, 397, 797, 1038, 631, 1043, 328]
    far = 10**12
    assert mix.dealt(far + 100)[0] - mix.dealt(far)[0] == 50  # no walk through what came before


def test_weights_change_at_a_position_and_no_row_is_lost():
    phases = [(0, (3, 1)), (1001, (1, 1)), (5000, (0, 1)), (6000, (1, 4))]
    mix = Mix([100, 10_000], phases, 1)
    source, within = mix.deal(np.arange(9000))
    for k in range(2):
        assert within[source == k].tolist() == list(range((source == k).sum()))
    for (start, _), end in zip(phases, (1001, 5000, 6000, 9000)):
        assert worst_error(mix, end - start, start) < 1
    first, second = mix.dealt(5000)
    assert first + second == 5000 and mix.dealt(6000) == [first, second + 1000]
    before = Mix([100, 10_000], phases[:1], 1)
    assert all((a == b).all() for a, b in zip(mix.at(np.arange(1001)), before.at(np.arange(1001))))


def test_only_the_future_may_change():
    def mix(*phases, sizes=(10, 20), seed=1):
        return Mix(list(sizes), phases, seed)

    start, later = (0, (3, 1)), (100, (1, 1))
    state = json.loads(json.dumps(mix(start, later).state()))
    assert len(json.dumps(state)) < 300
    mix((0, (0.75, 0.25)), (100, (2, 2))).check(state, 1000)  # the same weights
    mix(start, (100, (9, 1)), (200, (1, 9))).check(state, 100)
    mix(start).check(state, 100)
    for other in (mix(start), mix(start, (100, (9, 1))), mix(start, (99, (1, 1))), mix((0, (2, 1)), later)):
        with pytest.raises(UserError, match=r"mixing weights before position 101 are \[.*, the checkpoint has \["):
            other.check(state, 101)
    with pytest.raises(UserError, match="source 1 of the mix: data rows is 21, the checkpoint has 20"):
        mix(start, later, sizes=(10, 21)).check(state, 0)
    with pytest.raises(UserError, match="source 0 of the mix: data seed"):
        mix(start, later, seed=2).check(state, 0)
    with pytest.raises(UserError, match="sources is 3, the checkpoint has 2"):
        mix((0, (1, 1, 1)), sizes=(10, 20, 30)).check(state, 0)
    with pytest.raises(UserError, match="sources is 2, the checkpoint has 0"):
        mix(start).check(Order(30, 1).state(), 0)


@pytest.mark.parametrize(
    ("sizes", "phases", "words"),
    [
        ([9, 9], [], "begin at 0"),
        ([9, 9], [(5, (1, 1))], "begin at 0"),
        ([9, 9], [(0, (1, 1)), (8, (1, 2)), (8, (1, 3))], "ascend"),
        ([9, 9], [(0, (1, 1, 1))], "3 mixing weights for 2 sources"),
        ([9, 9], [(0, (1, -1))], "negative"),
        ([9, 9], [(0, (0, 0))], "above 0"),
        ([9, 9], [(0, (1, float("nan")))], "not all numbers"),
        ([9, 9], [(0, (1, "many"))], "not all numbers"),
        ([9, 9], [(0, (1, "1/0"))], "not all numbers"),
        ([9, 9], [(0, (1, 1e-7))], "1e-07 is under 1/65536"),
        ([9, 0], [(0, (1, 1))], "source 1 of the mix has no rows"),
    ],
    ids=str,
)
def test_mixes_that_cannot_be(sizes, phases, words):
    with pytest.raises(UserError, match=words):
        Mix(sizes, phases)


class Toy:
    """Row i of source `name` holds [1000 name + i, epoch]; odd rows count twice; row 3 is damaged."""

    def __init__(self, name: int, n: int, width: int = 2):
        self.name, self.n, self.width, self.fingerprint = name, n, width, f"toy {name}"

    def __len__(self):
        return self.n

    def batch(self, epoch_M, index_M):
        index, real = torch.from_numpy(index_M), torch.from_numpy(index_M >= 0)
        rows = torch.stack([1000 * self.name + index, torch.from_numpy(epoch_M)][: self.width], 1)
        rows = torch.where(real[:, None], rows, 0)
        batch: dict[str, Any] = {"rows": rows, "weight": real.float(), "count": (1 + index % 2)[real].sum()}
        if (index_M == 3).any():
            batch["damaged"] = [f"{self.name}/3"]
        return batch


def test_joined_rows_keep_their_order():
    joined = Joined(Toy(1, 5), Toy(2, 4), Toy(3, 100))
    assert len(joined) == 109
    batch = joined.batch(np.array([0, 1, 2, 0, 3, 4, 0]), np.array([8, 0, 9, -1, 3, 108, 5]))
    assert batch["rows"].tolist() == [[2003, 0], [1000, 1], [3000, 2], [0, 0], [1003, 3], [3099, 4], [2000, 0]]
    assert batch["weight"].tolist() == [1, 1, 1, 0, 1, 1, 1]
    assert (
        batch["count"].dtype == torch.int64 and batch["count"].shape == () and batch["count"] == 2 + 1 + 1 + 2 + 2 + 1
    )
    assert batch["damaged"] == ["1/3", "2/3"]
    padding = joined.batch(np.zeros(2, np.int64), np.full(2, -1))
    assert padding["rows"].tolist() == [[0, 0], [0, 0]] and padding["count"] == 0 and "damaged" not in padding
    with pytest.raises(UserError, match=r"source 1 have rows of \[1\] int64, other sources \[2\] int64"):
        Joined(Toy(1, 5), Toy(2, 5, width=1)).batch(np.zeros(2, np.int64), np.array([0, 6]))


def test_joined_fingerprint_is_of_all_in_order():
    prints = {
        Joined(*rows).fingerprint for rows in ((Toy(1, 5), Toy(2, 5)), (Toy(2, 5), Toy(1, 5)), (Toy(1, 5), Toy(2, 6)))
    }
    assert len(prints) == 3
    assert Joined(Toy(1, 5), Toy(2, 5)).fingerprint in prints
