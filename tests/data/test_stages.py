"""A user's webdataset stages give on our source what they give on webdataset's."""

import io
import random
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from dltrain.data.loader import Loader
from dltrain.data.order import Order
from dltrain.data.shards import Shards, write_shards
from dltrain.data.stages import StageRows, samples
from dltrain.errors import UserError


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))

    def png(i: int) -> bytes:
        file = io.BytesIO()
        Image.fromarray(np.full((4, 5, 3), i, np.uint8)).save(file, "png")
        return file.getvalue()

    write_shards(
        ({"__key__": f"{i:03d}", "png": png(i), "cls": i % 3, "json": {"i": i}} for i in range(20)),
        tmp_path / "x", "x", 7,
    )  # fmt: skip
    return tmp_path / "x"


def stages(source):
    return source.decode("rgb8").map(lambda sample: sample | {"i": sample["json"]["i"]}).to_tuple("png", "cls", "i")


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_stages_run_unchanged(folder):
    from webdataset.compat import WebDataset

    shards = Shards(str(folder))
    webdataset: Any = WebDataset(shards.urls, shardshuffle=False, empty_check=False)
    theirs = list(stages(webdataset))
    ours = list(stages(samples(shards)))
    assert len(ours) == len(theirs) == 20
    for (image, label, i), (image_, label_, i_) in zip(ours, theirs):
        assert (image == image_).all() and image.shape == (4, 5, 3) and (label, i) == (label_, i_)
    batches = list(samples(shards).decode().to_tuple("cls").batched(8))
    assert [len(batch[0]) for batch in batches] == [8, 8, 4]


def test_a_position_is_all_that_is_needed_to_go_on(folder):
    shards = Shards(str(folder))
    order = Order(20, 3)
    whole = [i for _, _, i in stages(samples(shards, order))]
    assert sorted(whole) == list(range(20)) and whole != sorted(whole)
    assert [i for _, _, i in stages(samples(shards, order, first=13))] == whole[13:]
    assert sorted(i for _, _, i in stages(samples(shards, order, first=20))) == list(range(20))


class Jitter:
    """Picklable, and draws from all that legacy code draws from."""

    def __call__(self, source):
        return source.decode("rgb8").map(self.draw).to_tuple("x", "cls")

    def draw(self, sample):
        return sample | {"x": torch.tensor([random.random(), np.random.rand(), torch.rand(()).item()])}


def test_rows_are_the_same_in_any_process_and_leave_generators_alone(folder):
    rows = StageRows(Shards(str(folder)), Jitter(), ("x_B3", "labels_B"), seed=5)

    def ledger(lanes, workers):
        loader = Loader(rows, Order(20, 1), batch=4, lanes=lanes, micro_batch=1, workers=workers)
        return torch.cat([m.batch["x_B3"] for step in loader.steps(0, 6, range(lanes)) for m in step])

    before = random.getstate(), torch.get_rng_state()
    first = ledger(1, 0)
    assert len(first.unique()) == first.numel()  # the second epoch draws anew
    assert torch.equal(first, ledger(4, 0)) and torch.equal(first, ledger(2, 1))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


def test_padding_and_damage_weigh_nothing(folder):
    path = folder / "x-000000.tar"
    blob = bytearray(path.read_bytes())
    at = blob.index(b"\x89PNG", blob.index(b"001.png"))
    blob[at + 20] ^= 1
    path.write_bytes(blob)
    rows = StageRows(Shards(str(folder), on_error="skip"), stages, ("images_BHWC", "labels_B", "i_B"), seed=0)
    batch = rows.batch(np.zeros(4, int), np.array([0, 1, 2, -1]))
    assert batch["weight_B"].tolist() == [1, 0, 1, 0] and int(batch["count"]) == 2
    assert batch["images_BHWC"].shape == (4, 4, 5, 3) and batch["i_B"].tolist()[::2] == [0, 2]
    assert [(damage.key, damage.offset) for damage in batch["damaged"]] == [("001", at)]
    assert [i for _, _, i in stages(samples(rows.shards))] == [0, *range(2, 20)]


def test_stages_that_do_not_fit_are_refused(folder):
    for bad in (
        lambda source: source.decode().to_tuple("cls"),
        lambda source: source.decode().select(lambda sample: False).to_tuple("cls", "json"),
        lambda source: source.decode().to_tuple("cls", "json").batched(2),
    ):
        with pytest.raises(UserError, match=r"not a tuple of 2 \(a, b\)"):
            StageRows(Shards(str(folder)), bad, ("a", "b"), seed=0).batch(np.zeros(4, int), np.arange(4))
