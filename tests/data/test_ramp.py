"""Batches that grow: every position in one step, both ways in closed form."""

import json

import pytest

from dltrain.data.ramp import Ramp
from dltrain.errors import UserError

SIZES = [
    ((0, 5),),
    ((0, 64), (10_000, 128), (50_000, 256)),
    ((0, 10), (25, 3), (26, 7), (28, 4), (100, 1), (103, 50)),  # overlaps, a segment reached across, shrinking
    ((0, 1000), (3, 2), (5, 9)),
]


@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_steps_tile_the_positions(sizes):
    ramp, position = Ramp(sizes), 0
    for step in range(500):
        size = max((start, size) for start, size in sizes if start <= position)[1]  # what holds at its first row
        assert (ramp.position(step), ramp.batch(step)) == (position, size)
        assert [ramp.step_at(p) for p in (position, position + size // 2, position + size - 1)] == [step] * 3
        position += size


def test_far_away_in_closed_form():
    ramp = Ramp(((0, 64), (10_000, 128), (10**11, 4096)))
    assert [ramp.position(step) for step in (0, 157, 158)] == [0, 10_048, 10_176]  # 157 x 64: the last reaches over
    step = ramp.step_at(10**15)
    assert ramp.position(step) <= 10**15 < ramp.position(step + 1) == ramp.position(step) + 4096


@pytest.mark.parametrize("sizes", [(), ((1, 4),), ((0, 4), (9, 8), (9, 2)), ((0, 4), (9, 8), (5, 2)), ((0, 0),)])
def test_ramps_that_cannot_be(sizes):
    with pytest.raises(UserError, match=r"begin at 0|at least 1"):
        Ramp(sizes)


def test_only_the_future_may_change():
    state = json.loads(json.dumps(Ramp(((0, 4), (100, 8))).state()))
    Ramp(((0, 4), (100, 8))).check(state, 1000)
    Ramp(((0, 4), (100, 16), (300, 32))).check(state, 100)
    Ramp(((0, 4),)).check(state, 40)
    for other in (((0, 4), (100, 16)), ((0, 4),), ((0, 4), (100, 8), (103, 16))):
        with pytest.raises(UserError, match=r"batch sizes before position 104 are .*, the checkpoint has"):
            Ramp(other).check(state, 104)
