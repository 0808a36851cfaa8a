"""Who hangs, from dossiers written by hand; and what one rank sees of itself. 12 s."""

import dataclasses
import faulthandler
import os
import threading
import time

import pytest

from dltrain.doctor import note, proc
from dltrain.doctor.board import Board, Dossier, Silent, Worker
from dltrain.doctor.diagnosis import activity, diagnose, without, words
from dltrain.doctor.watch import Line, Watch

C10D = "/x/site-packages/torch/distributed/distributed_c10d.py"
DATA = "/x/site-packages/torch/utils/data/dataloader.py"
STEP = Line("/me/train.py", 7, "step", "all_gather(everyone, mine)")
REPORT = Line("/me/train.py", 9, "report", "dist.barrier()")


def dossier(rank: int, *stack: Line, **fields) -> Dossier:
    return Dossier(rank, "a", 100 + rank, fields.pop("step", 3), 8.0, fields.pop("worried", True), stack, **fields)


def gathers(rank: int, **fields) -> Dossier:
    return dossier(rank, Line(C10D, 1, "all_gather_single"), Line(C10D, 2, "wrapper"), STEP, **fields)


def barrier(rank: int, **fields) -> Dossier:
    return dossier(rank, Line(C10D, 3, "barrier"), REPORT, **fields)


def verdict(*dossiers: Dossier, world: int = 0):
    by_rank = {d.rank: d for d in dossiers}
    silent = without(world or len(dossiers), by_rank)
    found = diagnose(by_rank, silent)
    if found:
        assert words(found, by_rank, silent).count("\n  rank ") == len(by_rank) + len(silent)
    return found and (found.ranks, found.kind)


def neighbour(rank: int, **fields) -> Silent:
    return Silent(rank, "a", 100 + rank, 3, line=STEP, **fields)


@pytest.mark.parametrize(
    ("known", "expected"),
    [
        ({"state": "T"}, ((1,), "stopped")),
        ({"state": "T", "dump": "Thread 1:\n  File x"}, ((1,), "stopped")),
        ({"state": "gone"}, ((1,), "dead")),
        ({"state": "S", "dump": "Thread 1:\n  File x"}, ((1,), "gil")),
        ({"state": "S"}, ((1,), "mute")),
        ({"state": "R", "busy": True}, None),
    ],
)
def test_a_silent_rank(known, expected):
    assert verdict(gathers(0, neighbours=(neighbour(1, **known),)), world=2) == expected


def test_one_neighbour_that_takes_it_for_busy_is_enough():
    told = [gathers(r, neighbours=(neighbour(2, state="S", busy=b),)) for r, b in ((0, False), (1, True))]
    assert verdict(*told, world=3) is None
    assert verdict(*told[::-1], world=3) is None


def test_a_silent_host():
    assert verdict(gathers(0), gathers(1), world=4) == ((2, 3), "silent")


def test_the_rendezvous():
    waiting = [dossier(r, Line("/x/rendezvous.py", 1, "_create_c10d_store"), STEP) for r in (0, 2)]
    assert verdict(*waiting, world=3) == ((1,), "missing")
    assert verdict(*waiting, barrier(1)) == ((1,), "mismatch")


def test_one_that_moves_may_be_slow():
    busy = dossier(1, STEP, worried=False)
    assert verdict(gathers(0), busy, gathers(2)) is None


@pytest.mark.parametrize(
    ("stack", "fields", "kind", "said"),
    [
        ([Line(DATA, 1, "_get_data")], {"workers": (Worker(7, "T"), Worker(8, "S"))}, "loader", "worker 7 is stopped"),
        ([Line(DATA, 1, "_get_data")], {"workers": (Worker(7, "gone"),)}, "loader", "worker 7 is dead"),
        ([Line(DATA, 1, "_get_data")], {"workers": (Worker(7, "S", "read of /d"),)}, "loader", "read of /d"),
        ([Line("/me/dltrain/checkpoint.py", 1, "save")], {"blocked": "fsync of /c"}, "disk", "fsync of /c"),
        ([Line("/me/a.py", 1, "f", "x = file.read()")], {"blocked": "read of /pipe"}, "file", "read of /pipe"),
        ([Line(threading.__file__, 1, "wait"), STEP], {}, "lock", "waits for a lock"),
        ([Line("/me/a.py", 1, "f", "with lock:")], {}, "lock", "waits for a lock"),
        ([Line("/me/a.py", 1, "f", "time.sleep(9)")], {}, "asleep", "sleeps"),
        ([Line("/me/a.py", 1, "f", "y = extension(x)")], {}, "code", "does not come back"),
    ],
)
def test_one_outside_of_collectives_keeps_the_others_waiting(stack, fields, kind, said):
    stuck = dossier(1, *stack, **fields)
    assert said in activity(stuck).words
    assert verdict(gathers(0), stuck, gathers(2)) == ((1,), kind)


def test_a_wait_for_an_asynchronous_collective_is_one():
    work = dossier(1, Line("/me/lanes.py", 1, "_merge", "work.wait()"))
    assert activity(work).shared
    cpp = dossier(1, Line("/x/site-packages/torch/autograd/graph.py", 1, "_engine_run_backward"))
    assert activity(cpp).shared


def test_different_collectives():
    assert verdict(barrier(0), gathers(1), barrier(2)) == ((1,), "mismatch")
    assert verdict(gathers(0), gathers(1, step=4), gathers(2)) == ((1,), "mismatch")
    assert verdict(barrier(0, calls={"0": 5}), gathers(1, calls={"0": 5})) == ((0, 1), "mismatch")
    assert verdict(barrier(0, calls={"0": 5}), gathers(1, calls={"0": 4})) == ((1,), "mismatch")
    assert verdict(gathers(0), gathers(1)) == ((), "network")


def test_a_gpu_may_compute_for_long():
    assert verdict(dossier(0, STEP, gpu=True), dossier(1, STEP, gpu=True)) is None
    assert verdict(dossier(0, STEP, gpu=True), dossier(1, REPORT, gpu=True)) == ((0, 1), "mismatch")


def test_dossiers_come_and_go(tmp_path):
    mine = gathers(0, neighbours=(neighbour(1, state="T"),), workers=(Worker(7, "T"),), threads={"x": (STEP,)})
    a, b = Board(tmp_path, 0, 2), Board(tmp_path, 1, 2)
    a.post(mine)
    assert b.complaint() and b.dossiers() == {0: mine} and not b.judging() and a.judging()
    late = Board(tmp_path, 1, 2)  # of a later launch, which finds what the first one left
    assert not late.complaint() and late.dossiers() == {} and late.judging()
    a.post(dataclasses.replace(mine, worried=False))
    assert not b.complaint() and len(b.dossiers()) == 1
    b.fresh_for = 0.05
    time.sleep(0.1)
    assert b.dossiers() == {} and b.judging()  # its last word
    a.withdraw()
    assert not (tmp_path / "hang").exists()


def test_one_verdict(tmp_path):
    a, b = Board(tmp_path, 0, 2), Board(tmp_path, 1, 2)
    a.post(gathers(0))
    assert a.publish({"leave_at": 1.0}) and not b.publish({"leave_at": 2.0})
    assert a.verdict() == b.verdict() == {"leave_at": 1.0}
    later = Board(tmp_path, 0, 2)
    assert later.verdict() is None
    assert later.publish({"leave_at": 3.0}) and later.verdict() == {"leave_at": 3.0}


def watched(work, seconds: float) -> Watch:
    """What a watch of a thread that does `work` has seen after a while; looks come ten times as fast."""
    made: list[Watch] = []
    ready = threading.Event()

    def run() -> None:
        made.append(Watch(lambda: 0))
        ready.set()
        work()

    threading.Thread(target=run, daemon=True).start()
    ready.wait()
    for _ in range(round(seconds * 10)):
        time.sleep(0.1)
        made[0].look()
    return made[0]


def test_a_sleeper_is_still():
    assert watched(lambda: time.sleep(5), 1).still >= 7


def test_a_caller_of_the_same_line_is_not():
    def nap() -> None:
        time.sleep(0.15)

    def work() -> None:
        while True:
            nap()

    assert watched(work, 2).still <= 2


def test_a_computer_is_not():
    assert watched(lambda: sum(range(100_000_000)), 1).still <= 1  # one call that does not give the GIL away


def test_a_debugger_is_not():
    assert watched(lambda: exec(compile("import time; time.sleep(3)", "/x/pdb.py", "exec")), 1).still == 0


@pytest.mark.parametrize(("file", "longest"), [("/x/torch/distributed/distributed_c10d.py", 0), ("/x/a.py", 8)])
def test_patience_does_not_grow_by_what_others_do(file, longest):
    watch = watched(lambda: exec(compile("import time; time.sleep(1)", file, "exec")), 0.9)
    time.sleep(0.3)
    watch.thread = threading.get_ident()
    watch.look()
    assert longest - 3 < watch.longest <= longest


def test_patience_grows():
    watch = Watch(lambda: 0)
    assert watch.patience == 5
    watch.longest = 20
    assert watch.patience == 40
    watch.longest = 3600
    assert watch.patience == 60


def test_the_last_word_of_a_rank(tmp_path):
    faulthandler.cancel_dump_traceback_later()
    kept = note.Note(str(tmp_path), 3)
    kept.write(host="a", step=1, line=["x" * 200, 1, "f"])
    kept.write(host="a", step=2, line=["x", 1, "f"])
    word = note.read(str(tmp_path), 3)
    assert (word["pid"], word["step"], word["line"], word["dump"]) == (os.getpid(), 2, ["x", 1, "f"], "")
    assert 0 <= word["age"] < 1
    kept.close()
    assert note.read(str(tmp_path), 3) == {} and not note.folder(str(tmp_path)).exists()


def test_what_a_process_is_at(tmp_path):
    assert proc.process(os.getpid()).state in "RS"  # type: ignore[union-attr]
    assert proc.process(2**22 + 1) is None
    os.mkfifo(tmp_path / "pipe")
    handle, tasks = os.open(tmp_path / "pipe", os.O_RDWR), []

    def read() -> None:
        tasks.append(threading.get_native_id())
        os.read(handle, 1)

    thread = threading.Thread(target=read, daemon=True)
    thread.start()
    time.sleep(0.3)
    assert proc.blocked_on(os.getpid(), tasks[0]) == f"read of {tmp_path}/pipe"
    os.write(handle, b"x")
    thread.join()
    os.close(handle)
