"""How fast samples are read, as bytes, in one process: 1 MiB reads, webdataset, ours, mosaicml-streaming and litdata.

The same samples for all; the last two have them in formats of their own. They are no dependencies of ours: the table
says why, where one cannot be imported. The only importer of both.
"""

import contextlib
import importlib.util
import itertools
import os
import sys
import types
from collections.abc import Iterable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.data.cache import built
from dltrain.data.order import Order
from dltrain.data.shards import Shards
from dltrain.data.turns import Side

BLOCK = 1 << 20  # bytes of a raw read
SHUFFLED = 4096  # samples of which ours is asked at a time
CHUNK = 1024
CHUNK_BYTES = 1 << 25  # of the files that the other two write


def sides(shards: Shards, converted: Path) -> tuple[list[Side], dict[str, str]]:
    """Readers of all samples, over and over, and why others cannot take part. `converted`: where their formats go."""
    n = len(shards)

    def over_and_over(name: str, passes: Iterator[Iterable[Any]]) -> Side:
        return Side(name, itertools.chain.from_iterable(passes), chunk=CHUNK)

    def numbers() -> Iterator[np.ndarray]:
        order = Order(n, 0)
        return (order.at(np.arange(p, p + SHUFFLED))[1] for p in itertools.count(0, SHUFFLED))

    found = [
        Side("raw 1 MiB reads", _raw(shards.urls), units=n),
        over_and_over("webdataset", (_webdataset(shards.urls, False) for _ in itertools.count())),
        over_and_over("webdataset, shuffle(1000)", (_webdataset(shards.urls, True) for _ in itertools.count())),
        over_and_over("ours", (shards for _ in itertools.count())),
        Side("ours, shuffled", shards.stream(numbers()), chunk=CHUNK),
    ]
    absent = {}
    for name, make, read in (("mosaicml-streaming", _write_mds, _mds), ("litdata", _write_litdata, _litdata)):
        try:
            folder = built(converted / f"{name}-{shards.fingerprint[:16]}", partial(make, shards))
            for shuffled in (False, True):
                readers = partial(read, folder, shuffled)
                title = f"{name}, shuffled" if shuffled else name
                next(iter(readers()))
                found.append(over_and_over(title, (readers() for _ in itertools.count())))
        except Exception as error:  # theirs, of any kind: the table says so
            absent[name] = f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return found, absent


def _raw(urls: list[str]) -> Iterator[None]:
    """All files once, at each step."""
    block = bytearray(BLOCK)
    while True:
        for url in urls:
            with open(url, "rb", buffering=0) as file:
                while file.readinto(block):
                    pass
        yield


def _webdataset(urls: list[str], shuffled: bool) -> Iterable[Any]:
    from webdataset.compat import WebDataset

    source: Any = WebDataset(urls, shardshuffle=len(urls) if shuffled else False, seed=0)
    return source.shuffle(1000) if shuffled else source


def _write_mds(shards: Shards, folder: Path) -> None:
    streaming = _streaming()
    columns = {extension: "bytes" for extension in shards[0] if not extension.startswith("__")}
    with streaming.MDSWriter(out=str(folder / "mds"), columns=columns, size_limit=CHUNK_BYTES) as writer:
        for sample in shards:
            writer.write({extension: sample[extension] for extension in columns})


def _mds(folder: Path, shuffled: bool) -> Iterable[Any]:
    return _streaming().StreamingDataset(local=str(folder / "mds"), shuffle=shuffled, batch_size=256)


def _streaming() -> Any:
    """mosaicml-streaming; where torchvision is not installed, its name stands in for it while classes are defined."""
    if "streaming" in sys.modules or importlib.util.find_spec("torchvision"):
        return importlib.import_module("streaming")
    for name in ("transformers.feature_extraction_utils", "transformers.models.auto.tokenization_auto"):
        importlib.import_module(name)  # these look for torchvision, and must not find this
    names = ["torchvision", "torchvision.datasets", "torchvision.transforms", "torchvision.transforms.functional"]
    stand_in = {name: types.ModuleType(name) for name in names}
    stand_in["torchvision.datasets"].VisionDataset = object  # type: ignore[attr-defined]
    stand_in["torchvision.transforms.functional"].to_tensor = None  # type: ignore[attr-defined]
    sys.modules.update(stand_in)
    try:
        return importlib.import_module("streaming")
    finally:
        for name in names:
            del sys.modules[name]


def _write_litdata(shards: Shards, folder: Path) -> None:
    import litdata  # type: ignore[import-not-found]

    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
        litdata.optimize(
            fn=partial(_members, shards),
            inputs=list(range(len(shards))),
            output_dir=str(folder / "litdata"),
            chunk_bytes=CHUNK_BYTES,
            num_workers=1,
            start_method="spawn",
        )


def _members(shards: Shards, i: int) -> dict[str, bytes]:
    return {extension: content for extension, content in shards[i].items() if not extension.startswith("__")}


def _litdata(folder: Path, shuffled: bool) -> Iterable[Any]:
    import litdata  # type: ignore[import-not-found]

    return litdata.StreamingDataset(str(folder / "litdata"), shuffle=shuffled)
