import gzip
import struct

import numpy as np
import pytest

from dltrain.convert.ready import ready
from dltrain.data.shards import Shards
from dltrain.errors import UserError


def test_mnist_is_made_once_and_told_apart_by_split(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_DATA", str(tmp_path))
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "mnist").mkdir()
    for split, n in (("train", 7), ("t10k", 3)):
        for kind, shape, value in (("images-idx3", (n, 4, 4), 16 * n), ("labels-idx1", (n,), n)):
            head = struct.pack(f">4B{len(shape)}i", 0, 0, 8, len(shape), *shape)
            data = gzip.compress(head + np.arange(value, dtype=np.uint8).tobytes())
            (tmp_path / "mnist" / f"{split}-{kind}-ubyte.gz").write_bytes(data)
    assert len(Shards(ready("mnist/train"))) == 7 and len(Shards(ready("mnist/test"))) == 3
    before = [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*.tar"))]
    assert ready("mnist/train") == ready("mnist/train")
    assert before == [path.stat().st_mtime_ns for path in sorted((tmp_path / "cache").rglob("*.tar"))]


def test_what_is_missing_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"cifar10/train\.zip does not exist: set DLTRAIN_DATA"):
        ready("cifar10/train")
    for name in ("svhn/train", "mnist", "mnist/valid"):
        with pytest.raises(UserError, match=f"no published data '{name}'"):
            ready(name)
