"""Images by name: data sets in the folder that $DLTRAIN_DATA names, as shards in the cache, made on first use.

There are `mnist` (four idx files, .gz), `cifar10` and `imagenette128` (train.zip and test.zip or val.zip, of class
folders). For data of one's own there is `dltrain shards`.
"""

import os
from functools import partial
from pathlib import Path

from dltrain.convert.archive import fingerprint, on_disk
from dltrain.convert.engine import Plan, convert
from dltrain.convert.images import class_folders
from dltrain.convert.published import cifar10, idx
from dltrain.data.cache import built, cache_dir
from dltrain.data.digits import digits
from dltrain.data.shards import Shards
from dltrain.errors import UserError

READERS = {"mnist": idx, "cifar10": cifar10, "imagenette128": class_folders}


def image_shards(pattern: str) -> Shards:
    """Shards of a webdataset pattern, of "published:cifar10/train" and the like, or of "embedded:digits/train".

    Raises:
        UserError: for a name or a file that there is not.
    """
    kind, _, name = pattern.partition(":")
    if kind == "embedded" and name in ("digits/train", "digits/test"):
        return Shards(digits(name.removeprefix("digits/")))
    return Shards(ready(name) if kind == "published" else pattern)


def ready(name: str) -> str:
    """Pattern of the shards of "DATASET/train" or "DATASET/test"; the samples are shuffled.

    Raises:
        UserError: for another name; if $DLTRAIN_DATA does not hold the data.
    """
    dataset, _, split = name.partition("/")
    if dataset not in READERS or split not in ("train", "test"):
        raise UserError(f"no published data {name!r}: give {', '.join(READERS)}, with /train or /test")
    root = Path(os.environ.get("DLTRAIN_DATA", "data")) / dataset
    archives = [root / f"{each}.zip" for each in {"train": ["train"], "test": ["test", "val"]}[split]]
    source = root if dataset == "mnist" else next((path for path in archives if path.exists()), archives[0])
    if not source.exists():
        raise UserError(f"{source} does not exist: set DLTRAIN_DATA to the folder that has {dataset} in it")
    read = partial(READERS[dataset], split="" if source.suffix else split)
    plan = Plan(samples_per_shard=10_000, shard_mb=256, shuffle=0)
    digest = fingerprint(source, on_disk(source))["sha256"]

    def build(folder: Path) -> None:
        convert(source, folder, dataset, {"split": split}, plan, read)

    return str(built(cache_dir() / f"{dataset}-{split}-{digest[:12]}", build))
