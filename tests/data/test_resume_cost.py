"""To resume costs the same wherever it is, opens nothing that came before, and memory does not grow."""

import os
import time

import numpy as np
import pytest
import torch

from dltrain.data.loader import Loader
from dltrain.data.order import Order, Windowed
from dltrain.data.shards import Shards, write_shards


class Numbers:
    """Rows that are the samples of shards: what is in them."""

    def __init__(self, shards: Shards):
        self.shards, self.fingerprint = shards, shards.fingerprint

    def __len__(self) -> int:
        return len(self.shards)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict:
        number_M = [int(sample["txt"]) for sample in self.shards.read(index_M)]
        return {"number_M": torch.tensor(number_M), "count": torch.tensor(len(number_M))}


def numbered(folder, samples: int, per_shard: int) -> None:
    write_shards(({"__key__": f"{i:08d}", "txt": str(i)} for i in range(samples)), folder, "s", per_shard)


def first_batch(rows: Numbers, order, step: int) -> list[int]:
    loader = Loader(rows, order, batch=64, lanes=4, micro_batch=16, workers=0)
    steps = loader.steps(step, step + 1, range(4))
    found = [n for micro in next(steps) for n in micro.batch["number_M"].tolist()]
    steps.close()
    return found


def best_of(times: int, work) -> float:
    """Seconds; the machine may be busy with something else."""
    took = []
    for _ in range(times):
        began = time.perf_counter()
        work()
        took.append(time.perf_counter() - began)
    return min(took)


@pytest.mark.parametrize("windowed", [False, True], ids=["shuffled", "windowed"])
def test_the_first_batch_at_99_percent_of_an_epoch(tmp_path, windowed):
    numbered(tmp_path, 10_000, 200)
    step = 10_000 * 99 // 100 // 64

    def resume() -> list[int]:
        rows = Numbers(Shards(str(tmp_path)))
        order = Windowed(rows.shards.counts_S, 5, 4) if windowed else Order(len(rows), 5)
        return first_batch(rows, order, step)

    rows = Numbers(Shards(str(tmp_path)))
    order = Windowed(rows.shards.counts_S, 5, 4) if windowed else Order(len(rows), 5)
    assert resume() == order.at(np.arange(step * 64, (step + 1) * 64))[1].tolist()
    assert best_of(3, resume) < 0.05


@pytest.mark.parametrize("windowed", [False, True], ids=["in file order", "windowed"])
def test_no_shard_of_the_past_is_opened(tmp_path, windowed):
    numbered(tmp_path, 2_000, 20)
    rows = Numbers(Shards(str(tmp_path)))
    order = Windowed(rows.shards.counts_S, 5, 4) if windowed else Order(len(rows), 5, shuffle=False)
    step = 2_000 * 9 // 10 // 64
    past = set(np.unique(order.at(np.arange(step * 64))[1] // 20).tolist())
    now = set(np.unique(order.at(np.arange(step * 64, (step + 1) * 64))[1] // 20).tolist())
    for s in past - now:
        (tmp_path / f"s-{s:06d}.tar").write_bytes(b"")  # nothing can be read of it
    assert first_batch(rows, order, step) == order.at(np.arange(step * 64, (step + 1) * 64))[1].tolist()
    assert set(rows.shards._open) == now and len(past - now) > 80


def test_the_first_batch_at_sample_100_000_000(tmp_path):
    """10,000 names of one shard of 10,001 samples. Indexes are read once, to make the catalog; later launches read
    that."""
    numbered(tmp_path / "real", 10_001, 10_001)
    (tmp_path / "many").mkdir()
    for i in range(10_000):
        for ending in ("tar", "tar.idx"):
            os.link(tmp_path / "real" / f"s-000000.{ending}", tmp_path / "many" / f"{i:05d}.{ending}")
    began = time.perf_counter()
    rows = Numbers(Shards(str(tmp_path / "many")))
    print(f"without the catalog: {time.perf_counter() - began:.1f} s")
    step = 10**8 // 64

    def resume() -> None:
        rows = Numbers(Shards(str(tmp_path / "many")))
        found = first_batch(rows, Order(len(rows), 5), step)
        positions = np.arange(step * 64, (step + 1) * 64)
        assert found == (Order(len(rows), 5).at(positions)[1] % 10_001).tolist()

    assert len(rows) == 100_010_000
    took = best_of(3, resume)
    print(f"with it: {took:.2f} s")
    assert took < 1


def resident() -> int:
    """Bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@pytest.mark.skipif(not os.path.exists("/proc/self/statm"), reason="memory is read from /proc")
def test_memory_does_not_grow_over_50_epochs(tmp_path):
    numbered(tmp_path, 600, 100)
    rows = Numbers(Shards(str(tmp_path)))
    loader = Loader(rows, Order(len(rows), 5), batch=40, lanes=4, micro_batch=10, workers=0)
    steps = loader.steps(0, 10**9, range(4))
    sizes = []
    for _ in range(52):
        for _ in range(15):
            next(steps)
        for _ in rows.shards:  # in file order too
            pass
        sizes.append(resident())
    steps.close()
    assert sizes[-1] - sizes[1] <= 1 << 20, [size >> 10 for size in sizes]
