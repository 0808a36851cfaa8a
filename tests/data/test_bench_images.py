"""The sides of the comparison do the same work."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dltrain.data import bench_images
from dltrain.data.crops import RandomResizedCrop
from dltrain.data.images import ImageRows
from dltrain.data.shards import Shards, write_shards


@pytest.fixture
def folder(tmp_path):
    random = np.random.default_rng(0)
    samples = []
    for i in range(30):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(file, "JPEG" if i % 2 else "PNG")
        samples.append({"__key__": f"{i:02d}", "jpg" if i % 2 else "png": file.getvalue(), "cls": str(i)})
    write_shards(samples, tmp_path, "x", 20)
    return tmp_path


def test_the_bare_loop_makes_the_same_images(folder):
    rows = ImageRows(Shards(str(folder)), 24, RandomResizedCrop(), flip=0.5)
    place = np.zeros(30, np.int64), np.arange(30)
    bare = bench_images._bare(bench_images._work(rows, *place), 24, np.empty(1 << 16, np.uint8))
    assert torch.equal(bare, rows.batch(*place)["images_BCHW"])


# webdataset leaves the shard open that it was reading when it is no longer asked
@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_what_is_reported(folder, monkeypatch):
    monkeypatch.setattr(bench_images, "BATCH", 8)
    found = bench_images.image_speed(str(folder), 24, turns=2)
    assert {"ours_per_second", "bare_per_second", "webdataset_per_second"} < found.keys()
    for name in ("ours_over_bare", "ours_over_webdataset"):
        low, middle, high = found[name]
        assert 0 < low <= middle <= high
