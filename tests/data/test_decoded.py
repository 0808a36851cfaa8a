import numpy as np
import pytest
import torch

from dltrain.data.crops import PadAndCrop
from dltrain.data.decoded import DecodedRows
from dltrain.data.digits import digits
from dltrain.data.images import ImageRows
from dltrain.data.shards import Shards

EPOCH_M, INDEX_M = np.array([0, 1, 2, 3, 0, 0]), np.array([5, 7, 9, -1, 11, 150])


@pytest.fixture(scope="module")
def shards() -> Shards:
    return Shards(digits("test"))


@pytest.mark.parametrize("pad", [0, 3])
def test_as_images_that_are_decoded_for_every_row(shards, pad):
    kept = DecodedRows(shards, 32, pad=pad, flip=0.5, seed=3).batch(EPOCH_M, INDEX_M)
    read = ImageRows(shards, 32, PadAndCrop(pad), flip=0.5, seed=3).batch(EPOCH_M, INDEX_M)
    assert kept.keys() == read.keys()
    for name in kept:
        assert torch.equal(kept[name], read[name]) and kept[name].dtype == read[name].dtype, name
    assert kept["images_BCHW"].is_contiguous(memory_format=torch.channels_last)


def test_mirrored_in_every_second_epoch_and_as_many_in_the_first(shards):
    rows, index_M = DecodedRows(shards, 32, alternate=True), np.arange(200)
    plain = DecodedRows(shards, 32).batch(np.zeros_like(index_M), index_M)["images_BCHW"]
    flipped_EM = []
    for epoch in range(4):
        images = rows.batch(np.full_like(index_M, epoch), index_M)["images_BCHW"]
        flipped_EM.append((images != plain).flatten(1).any(1))
        assert torch.equal(torch.where(flipped_EM[-1][:, None, None, None], images.flip(3), images), plain)
    assert 60 < int(flipped_EM[0].sum()) < 140
    assert torch.equal(flipped_EM[0], ~flipped_EM[1]) and torch.equal(flipped_EM[0], flipped_EM[2])


def test_some_of_the_images(shards):
    rows, few = DecodedRows(shards, 16), DecodedRows(shards, 16, samples=np.array([8, 3, 11]))
    assert len(few) == 3 and few.fingerprint != rows.fingerprint
    got, want = few.batch(np.zeros(3, int), np.arange(3)), rows.batch(np.zeros(3, int), np.array([8, 3, 11]))
    assert torch.equal(got["images_BCHW"], want["images_BCHW"]) and got["labels_B"].tolist() == [8, 3, 1]


def test_digits_are_whole_and_differ_by_class(shards):
    batch = DecodedRows(shards, 32).batch(np.zeros(200, int), np.arange(200))
    assert batch["labels_B"].tolist() == [i % 10 for i in range(200)]
    grey_BHW = batch["images_BCHW"].float().mean(1)
    low_B11, high_B11 = grey_BHW.amin((1, 2), keepdim=True), grey_BHW.amax((1, 2), keepdim=True)
    ink_BHW = (grey_BHW - low_B11) / (high_B11 - low_B11)
    height_B, width_B = (ink_BHW > 0.5).any(2).sum(1), (ink_BHW > 0.5).any(1).sum(1)
    assert set(height_B.tolist()) == {15}
    for k in range(10):
        assert len(set(width_B[k::10].tolist())) == 1
    shares = [round(float(ink_BHW[k::10].mean()), 3) for k in range(10)]  # of the pixels
    assert min(shares) == shares[1] and len(set(shares)) >= 6
