"""Packing: every unit of every document once, rows never too long, and a row is the same however it is asked for."""

import itertools
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dltrain.data.packing import Fixed, Packed, best_fit

lengths = st.lists(st.integers(0, 40), max_size=60).map(lambda found: np.array(found, np.int64))
modest = settings(max_examples=80, deadline=None, derandomize=True, database=None)


def units(packing, row, length_D):
    """[(document, unit), ...] of one row."""
    found = packing.pieces(np.array([row]))
    assert (found.start_P < found.stop_P).all() and (found.stop_P <= length_D[found.document_P]).all()
    assert not found.row_P.any()
    spans = zip(found.document_P.tolist(), found.start_P.tolist(), found.stop_P.tolist())
    return [(document, unit) for document, start, stop in spans for unit in range(start, stop)]


def everything(length_D, first=0):
    return [(document, unit) for document, length in enumerate(length_D.tolist()) for unit in range(first, length)]


@modest
@given(lengths, st.integers(1, 30), st.integers(1, 25))
def test_best_fit_has_every_unit_once(length_D, room, window):
    packed = best_fit(length_D, room, window=window)
    rows = [units(packed, row, length_D) for row in range(len(packed))]
    assert sorted(unit for row in rows for unit in row) == everything(length_D)
    assert all(0 < len(row) <= room and row == sorted(row) for row in rows)
    pieces = packed.pieces(np.arange(len(packed)))
    cuts = pieces.stop_P[pieces.stop_P < length_D[pieces.document_P]]
    assert not (cuts % room).any(), "a document that fits in a row was cut"


@modest
@given(lengths, st.integers(1, 30), st.integers(1, 25))
def test_overlap_gives_every_transition_once(length_D, room, window):
    """With an overlap of one, every unit but a document's first comes after its predecessor exactly once."""
    packed = best_fit(length_D, room, overlap=1, window=window)
    after = []
    for row in range(len(packed)):
        found = units(packed, row, length_D)
        steps = [b for a, b in itertools.pairwise(found) if b == (a[0], a[1] + 1)]
        assert 0 < len(steps) <= room
        after += steps
    assert sorted(after) == everything(length_D, first=1)


@modest
@given(lengths, st.integers(1, 30), st.integers(0, 1))
def test_fixed_is_the_stream_cut_evenly(length_D, room, overlap):
    fixed = Fixed(length_D, room, overlap)
    stream = everything(length_D)
    expected = [stream[at : at + room + overlap] for at in range(0, max(0, len(stream) - overlap), room)]
    assert [units(fixed, row, length_D) for row in range(len(fixed))] == expected


@pytest.mark.parametrize("way", ["packed", "fixed"])
def test_rows_do_not_depend_on_what_else_is_asked_for(way):
    length_D = np.random.Generator(np.random.Philox(key=1)).integers(0, 300, 500)
    packing = best_fit(length_D, 100) if way == "packed" else Fixed(length_D, 100)
    asked = np.array([7, 3, len(packing) - 1, 7, 0])
    found = packing.pieces(asked)
    assert found.row_P.tolist() == sorted(found.row_P.tolist()) and set(found.row_P.tolist()) == set(range(5))
    for m in range(len(asked)):
        alone, mine = packing.pieces(asked[m : m + 1]), found.row_P == m
        for name in ("document_P", "start_P", "stop_P"):
            assert (getattr(found, name)[mine] == getattr(alone, name)).all()
    assert not len(packing.pieces(asked[:0]).row_P)


def test_it_is_best_fit_decreasing():
    """9 8 7 5 2 1 in rows of 12: 9 takes the 2 that fits best when it comes, 8 nothing better, 7 the 5."""
    packed = best_fit(np.array([1, 2, 5, 7, 8, 9]), 12)
    rows = [packed.pieces(np.array([row])).document_P.tolist() for row in range(len(packed))]
    assert rows == [[0, 1, 5], [4], [2, 3]]


def test_long_rows_are_rounded_up_and_never_overfull():
    """Beyond STEPS, lengths are told apart in steps; one that rounds to more than a row still has a row."""
    generator = np.random.Generator(np.random.Philox(key=2))
    for room in (5001, 12_299, 100_003):
        length_D = np.concatenate([generator.integers(1, 3 * room, 300), [room - 1, room, room + 1]])
        packed = best_fit(length_D, room)
        found = packed.pieces(np.arange(len(packed)))
        size_R = np.bincount(found.row_P, found.stop_P - found.start_P)
        assert size_R.max() <= room and size_R.sum() == length_D.sum() and len(size_R) == len(packed)


def test_little_is_left_empty():
    """At most 1 % of rows of 1,024, for many short documents and for few long ones."""
    generator = np.random.Generator(np.random.Philox(key=3))
    for length_D in (generator.lognormal(4.6, 0.8, 20_000), generator.lognormal(11.0, 1.0, 100)):
        length_D = 1 + length_D.astype(np.int64)
        assert length_D.sum() / (len(best_fit(length_D, 1024)) * 1024) >= 0.99


def test_saved_it_is_the_same_and_pickles_as_a_name(tmp_path):
    packed = best_fit(np.random.Generator(np.random.Philox(key=4)).integers(0, 300, 5000), 100)
    packed.save(tmp_path)
    content = pickle.dumps(Packed.load(tmp_path))
    assert len(content) < 1000 < len(packed) and len(pickle.loads(content)) == len(packed)
    before, after = packed.pieces(np.arange(len(packed))), pickle.loads(content).pieces(np.arange(len(packed)))
    assert all((a == b).all() for a, b in zip(vars(before).values(), vars(after).values()))
    empty = best_fit(np.zeros(3, np.int64), 10)
    assert len(empty) == 0 and len(best_fit(np.empty(0, np.int64), 10)) == 0 and len(Fixed(np.zeros(2, int), 4)) == 0
