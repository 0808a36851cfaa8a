"""Faults are pure functions of the seed, and what a judge says of notes."""

from pathlib import Path

import pytest

from dltrain.chaos import judge
from dltrain.chaos.plan import PLACES, listed, rounds
from dltrain.chaos.runner import Ended
from dltrain.errors import UserError

MIX = (("ddp", "fsdp", "zero2"), (1, 2, 3))


@pytest.mark.parametrize("kind", ["kills", "preemptions", "errors"])
def test_a_plan_is_its_seeds(kind):
    assert rounds(kind, 20, 7, *MIX) == rounds(kind, 20, 7, *MIX) != rounds(kind, 20, 8, *MIX)
    assert rounds(kind, 20, 7, *MIX)[:5] == rounds(kind, 5, 7, *MIX)


def test_kills_are_everywhere():
    faults = [launch.fault for each in rounds("kills", 400, 0, *MIX) for launch in each.launches]
    assert {fault.place for fault in faults if fault} == set(PLACES) - {"stall"}
    assert {fault.who for fault in faults if fault} == {"one", "all", "launcher", "worker"}


def test_zero_keeps_its_processes_and_the_others_do_not():
    for each in rounds("kills", 60, 0, *MIX):
        for launch in [*each.launches, each.last]:
            assert launch.world == 2 if launch.strategy == "zero2" else launch.world in (1, 2, 3)
            assert launch.fault is None or launch.fault.rank < launch.world


def test_a_list_of_faults():
    (one, two) = listed("SIGKILL:one:backward:3,ENOSPC:one:shard")
    assert str(one.launches[0].fault) == "SIGKILL of rank 0 at backward 3"
    assert str(two.launches[0].fault) == "ENOSPC of rank 0 at shard 1"
    with pytest.raises(UserError, match="HOW:WHO:PLACE"):
        listed("SIGKILL:one:nowhere")


def ended(first: int, done: int) -> Ended:
    notes = [["rows", step, [[0, 0, f"{step}"]]] for step in range(first, done + 1)]
    return Ended([0], notes + [["done", step + 1] for step in range(first, done)], 1.0, True, Path("log"))


def test_steps_that_were_lost():
    assert judge.lost([ended(0, 7), ended(6, 10)]) == 1
    assert judge.lost([ended(0, 7), Ended([1], [], 1.0, True, Path("log")), ended(3, 5), ended(3, 10)]) == 4
    assert judge.lost([ended(0, 6), ended(6, 10)]) == 0


def test_rows_that_were_read_twice_and_differ_are_marked():
    notes = [["rows", 3, [[0, 0, "a"], [1, 0, "b"]]], ["rows", 3, [[1, 0, "c"]]]]
    assert judge.rows_of(notes) == {(3, 0, 0): "a", (3, 1, 0): "two things"}
