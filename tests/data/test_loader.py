"""The loader's contract: the ledger of rows depends on (seed, position) alone."""

import multiprocessing

import numpy as np
import pytest
import torch

from dltrain.data.loader import Loader, n_micro, nth
from dltrain.data.order import Order
from dltrain.data.shards import Shards, write_shards
from dltrain.errors import UserError


class Samples:
    """Rows that are the samples of shards: the number in the key, and the epoch."""

    def __init__(self, shards: Shards):
        self.shards, self.fingerprint = shards, shards.fingerprint

    def __len__(self):
        return len(self.shards)

    def batch(self, epoch, index):
        number = [-1 if i < 0 else int(self.shards[int(i)]["txt"]) for i in index]
        threads = torch.tensor(torch.get_num_threads())
        return {
            "number": torch.tensor(number),
            "epoch": torch.from_numpy(epoch),
            "count": torch.tensor(sum(i >= 0 for i in index)),
            "threads": threads,
        }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """23 samples in shards of 5, 0, 1 and 17."""
    folder = tmp_path_factory.mktemp("rows")
    first = 0
    for i, n in enumerate((5, 0, 1, 17)):
        samples = [{"__key__": f"{j:03d}", "txt": str(j)} for j in range(first, first + n)]
        if not write_shards(samples, folder, f"{i}", 100):
            (folder / f"{i}.tar").write_bytes(bytes(10240))
        first += n
    return folder


@pytest.fixture
def rows(folder):
    return Samples(Shards(str(folder)))


def ledger(rows, mine, workers, first=0, last=6):
    """{(step, lane, part): [(epoch, number), ...]} of one process."""
    loader = Loader(rows, Order(len(rows), 7), batch=12, lanes=6, micro_batch=1, workers=workers)
    return {
        (step, micro.lane, micro.part): list(zip(micro.batch["epoch"].tolist(), micro.batch["number"].tolist()))
        for step, micros in zip(range(first, last), loader.steps(first, last, mine))
        for micro in micros
    }


@pytest.mark.filterwarnings("ignore:This DataLoader will create 3 worker:UserWarning")  # on a machine of two cores
def test_ledger_is_the_same_for_any_processes_and_workers(rows):
    alone = ledger(rows, range(6), 0)
    epoch, index = Order(23, 7).at(np.arange(72))
    expected = list(zip(epoch.tolist(), index.tolist()))
    assert [row for key in sorted(alone) for row in alone[key]] == expected
    for e in range(3):
        assert sorted(number for epoch, number in expected if epoch == e) == list(range(23))
    assert len(alone) == 6 * 6 * 2
    for world in (2, 3, 5):  # more processes than shards too; 5 lanes' owners are uneven
        for workers in (0, 1, 3) if world == 2 else (0,):
            together: dict = {}
            for rank in range(world):
                part = ledger(rows, range(rank, 6, world), workers if rank == 0 else 0)
                assert not together.keys() & part.keys()
                together |= part
            assert together == alone, (world, workers)
    assert not multiprocessing.active_children()


def test_resume_reads_nothing_before_its_step(rows):
    whole = ledger(rows, range(6), 0)
    seen = []
    read = Samples.batch

    class Recorded(Samples):
        def batch(self, epoch, index):
            seen.extend(zip(epoch.tolist(), index.tolist()))
            return read(self, epoch, index)

    rest = ledger(Recorded(rows.shards), range(6), 0, first=4)
    assert rest == {key: value for key, value in whole.items() if key[0] >= 4}
    assert seen == [row for key in sorted(rest) for row in rest[key]]


def test_stopping_early_leaves_no_process_and_draws_no_random_number(rows):
    before = torch.get_rng_state()
    steps = Loader(rows, Order(len(rows), 0), batch=4, lanes=2, micro_batch=2, workers=1).steps(0, 10**9, [0, 1])
    micro = next(steps)[1]
    assert (micro.lane, micro.part, micro.parts) == (1, 0, 1) and micro.batch["threads"].item() == 1
    assert multiprocessing.active_children()
    steps.close()
    assert not multiprocessing.active_children()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("workers", [0, 1])
def test_damaged_shard_stops_the_run_with_one_line(tmp_path, workers):
    (path,) = write_shards([{"__key__": f"{j:03d}", "txt": str(j)} for j in range(4)], tmp_path, "x", 4)
    rows = Samples(Shards(str(path)))
    path.write_bytes(path.read_bytes().replace(b"3\0\0\0", b"4\0\0\0", 1))
    with pytest.raises(UserError, match=r"x-000000.tar: sample '003'") as error:
        list(Loader(rows, Order(len(rows), 0), batch=4, lanes=1, micro_batch=4, workers=workers).steps(0, 1, [0]))
    assert "\n" not in str(error.value)


def test_state_says_what_differs(rows, tmp_path):
    def loader(rows=rows, seed=7, batch=12):
        return Loader(rows, Order(len(rows), seed), batch=batch, lanes=1, micro_batch=1, workers=0)

    state = loader().state(10**8)
    assert state["position"] == 12 * 10**8 and len(repr(state)) < 1000
    loader().check(state)
    other = Samples(Shards(str(write_shards([{"__key__": "a", "txt": "1"}], tmp_path, "x", 1)[0])))
    for changed, words in (
        (loader(seed=8), "seed is 8"),
        (loader(batch=6), "batch sizes"),
        (loader(other), "the data has changed"),
    ):
        with pytest.raises(UserError, match=words):
            changed.check(state)


def test_no_rows(tmp_path):
    (tmp_path / "0.tar").write_bytes(bytes(10240))
    empty = Samples(Shards(str(tmp_path)))
    with pytest.raises(UserError, match="no rows"):
        Loader(empty, Order(1, 0), batch=1, lanes=1, micro_batch=1, workers=0)


def test_a_pass_sees_each_row_once_and_ends_in_padding(rows):
    assert n_micro(rows, 4) == 6
    numbers = [number for j in range(8) for number in nth(rows, 4, j)["number"].tolist()]
    assert numbers == [*range(23), *[-1] * 9]
    assert int(nth(rows, 4, 5)["count"]) == 3
    assert int(nth(rows, 4, 7)["count"]) == 0
