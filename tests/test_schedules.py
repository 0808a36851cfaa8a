import pytest

from dltrain.errors import UserError
from dltrain.schedules import constant, cosine, linear, staircase


def test_linear():
    at = linear(4, 12)
    assert [at(s) for s in range(5)] == [0.25, 0.5, 0.75, 1.0, 1.0]  # no step at rate 0; the peak at the end of warm-up
    assert [at(s) for s in (8, 11, 12, 99)] == [0.5, 0.125, 0.0, 0.0]


def test_linear_without_warmup_and_without_decay():
    assert [linear(0, 4)(s) for s in range(5)] == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert [linear(2, 2)(s) for s in range(3)] == [0.5, 1.0, 0.0]
    assert linear(0, 0)(0) == 0.0


def test_cosine():
    at = cosine(2, 10, floor=0.1)
    assert [at(s) for s in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert at(6) == pytest.approx(0.55, abs=1e-15)  # half way
    assert at(9) > 0.1
    assert [at(10), at(99)] == [0.1, 0.1]
    assert [cosine(0, 4)(s) for s in (0, 4)] == [1.0, 0.0]


def test_constant():
    assert [constant()(s) for s in (0, 10**9)] == [1.0, 1.0]
    assert [constant(2)(s) for s in range(4)] == [0.5, 1.0, 1.0, 1.0]


def test_staircase():
    at = staircase((3, 5), 0.5)
    assert [at(s) for s in range(7)] == [1.0, 1.0, 1.0, 0.5, 0.5, 0.25, 0.25]
    assert staircase((), 0.1)(7) == 1.0


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: linear(11, 10), "11.*10"),
        (lambda: cosine(11, 10), "11.*10"),
        (lambda: linear(-1, 10), "-1"),
        (lambda: constant(-1), "-1"),
        (lambda: cosine(0, 10, floor=1.5), "1.5"),
        (lambda: staircase((5, 3), 0.1), "5, 3"),
        (lambda: staircase((3, 3), 0.1), "3, 3"),
        (lambda: staircase((-1, 3), 0.1), "-1, 3"),
    ],
)
def test_bad_numbers_are_named(build, message: str):
    with pytest.raises(UserError, match=message):
        build()
