"""webdataset's own stages on our shards: what a user has written for `wds.WebDataset` runs here unchanged.

for image, label in samples(Shards(pattern)).decode("rgb").map(crop).to_tuple("jpg", "cls"): ...

rows = StageRows(Shards(pattern), lambda source: source.decode("rgb").map(augment).to_tuple("jpg", "cls"),
                 names=("images_BHWC", "labels_B"), seed=cfg.seed)                    # to train on
"""

import contextlib
import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import default_collate

from dltrain.data.order import Ordering
from dltrain.data.shards import Shards
from dltrain.errors import UserError
from dltrain.seeds import key

BLOCK = 1024  # samples whose places are looked up at a time


def samples(shards: Shards, order: Ordering | None = None, first: int = 0, last: int | None = None) -> Any:
    """A webdataset pipeline of the samples at positions first ... last - 1 of `order`; one pass in file order without.

    It is at its first stage: .decode(), .map(), .to_tuple(), .batched() ... follow. Damaged samples are passed over
    where `shards.on_error` is "skip". Resume by giving `first`.
    """
    stop = last if last is not None else len(shards) if order is None else (first // len(shards) + 1) * len(shards)

    def read() -> Iterator[dict[str, Any]]:
        for start in range(first, stop, BLOCK):
            index_M = np.arange(start, min(start + BLOCK, stop))
            found = shards.stream([index_M if order is None else order.at(index_M)[1]])
            yield from (_plain(sample) for sample in found if len(sample) > 2 and not _lost(sample))

    return _pipeline(read)


class StageRows:
    """Rows (of `loader.Rows`) that a user's stages make of samples, each of its own sample alone.

    The batch has `names`, what the stages' tuples hold, put together as torch's default_collate does; "weight_B", 0 for
    padding and for damaged samples, else 1; and "count", their sum. `random`, `numpy.random` and torch are seeded by
    (seed, epoch, row) before each sample, so that augmentation which draws from them is the same wherever it runs.

    UserError for stages that do not give one tuple for one sample (filters, batches and shuffles are the loader's).
    """

    def __init__(self, shards: Shards, stages: Callable[[Any], Any], names: Sequence[str], seed: int):
        """`stages` is called with a pipeline, once, in every process that reads rows."""
        self.shards, self.stages, self.names, self.seed = shards, stages, tuple(names), seed
        self.fingerprint = shards.fingerprint
        self._made: tuple[Any, _Feed] | None = None

    def __len__(self) -> int:
        return len(self.shards)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Any]:
        found = self.shards.read(np.maximum(index_M, 0))
        damaged = [sample["__damage__"] for i, sample in zip(index_M, found) if i >= 0 and "__damage__" in sample]
        weight_M = torch.tensor([float(i >= 0 and not _lost(sample)) for i, sample in zip(index_M, found)])
        if not weight_M.any() and all(map(_lost, found)):
            raise UserError(f"{self.shards.name(int(index_M[0]))} and all beside it are damaged; restore the shards")
        intact = next(sample for sample in found if not _lost(sample))  # stands in for what weighs nothing
        whole = [_plain(intact if _lost(sample) else sample) for sample in found]
        keys = [key("stages", self.seed, int(e), int(i)) for e, i in zip(epoch_M, index_M)]
        tuples = self._through(list(zip(keys, whole)))
        columns = {name: _column([one[k] for one in tuples]) for k, name in enumerate(self.names)}
        return (
            columns | {"weight_B": weight_M, "count": weight_M.sum().long()} | ({"damaged": damaged} if damaged else {})
        )

    def _through(self, seeded: list[tuple[int, dict[str, Any]]]) -> list[tuple]:
        if self._made is None:
            feed = _Feed()
            self._made = self.stages(_pipeline(feed)), feed
        pipeline, feed = self._made
        feed.seeded = seeded
        with _own_random_numbers():
            tuples = list(pipeline)
        if len(tuples) != len(seeded) or any(
            not isinstance(one, tuple | list) or len(one) != len(self.names) for one in tuples
        ):
            raise UserError(
                f"the stages gave {len(tuples)} items for {len(seeded)} samples, not a tuple of {len(self.names)} "
                f"({', '.join(self.names)}) for each; leave filters, batches and shuffles out, and end in .to_tuple()"
            )
        return tuples

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_made": None}


def _column(values: list[Any]) -> Any:
    if isinstance(values[0], np.ndarray):  # what webdataset decodes is not writable, which torch warns of
        return torch.from_numpy(np.stack(values))
    return default_collate(values)


class _Feed:
    """The first stage: samples that are set from outside, each with its own random numbers."""

    seeded: Sequence[tuple[int, dict[str, Any]]] = ()

    def __call__(self) -> Iterator[dict[str, Any]]:
        for number, sample in self.seeded:
            random.seed(number)
            np.random.seed(number % 2**32)
            torch.default_generator.manual_seed(number % 2**63)  # not the GPUs, which stages leave alone
            yield sample


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    """Leave the process's generators as they were."""
    before = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(before[0])
        np.random.set_state(before[1])
        torch.set_rng_state(before[2])


def _pipeline(read: Callable[[], Iterable[dict[str, Any]]]) -> Any:
    from webdataset.compat import FluidInterface
    from webdataset.pipeline import DataPipeline

    class Pipeline(DataPipeline, FluidInterface):
        pass

    return Pipeline(read)


def _lost(sample: dict[str, Any]) -> bool:
    """Whether a damaged sample has nothing in its place."""
    return "__damage__" in sample and len(sample) == 3


def _plain(sample: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in sample.items() if name != "__damage__"}
