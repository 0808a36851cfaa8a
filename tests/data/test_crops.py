"""Boxes lie where the papers put them, and depend on the row alone."""

import numpy as np
import pytest

from dltrain.data.crops import CentreCrop, PadAndCrop, RandomResizedCrop
from dltrain.data.draws import fork, generator, row_keys, uniform


def keys(n: int) -> np.ndarray:
    return row_keys(0, np.zeros(n, np.int64), np.arange(n))


def test_draws_are_uniform_and_independent():
    u_MN = uniform(keys(20_000), "test", 4)
    assert u_MN.min() >= 0 and u_MN.max() < 1
    for n in range(4):
        bins = np.bincount((u_MN[:, n] * 20).astype(int), minlength=20)
        assert ((bins - 1000) ** 2 / 1000).sum() < 43.8  # chi-squared of 19 degrees, p = 0.001
    columns = np.concatenate([u_MN, uniform(keys(20_000), "other", 2), np.roll(u_MN[:, :1], 1)], 1)
    assert abs(np.corrcoef(columns.T) - np.eye(7)).max() < 0.03


def test_keys_differ_by_seed_epoch_and_row():
    epoch, index = np.divmod(np.arange(3000), 1000)
    found = np.concatenate([row_keys(seed, epoch, index) for seed in (0, 1)])
    assert len(np.unique(np.concatenate([found, fork(found, "x")]))) == 12_000


def test_the_generator_is_the_first_row_s():
    a, b = keys(8), keys(9)[1:]
    assert generator(a, "mixup").random() == generator(a[:2], "mixup").random()
    assert len({generator(a, "mixup").random(), generator(a, "cutmix").random(), generator(b, "mixup").random()}) == 3


@pytest.mark.parametrize("crop", [RandomResizedCrop(), CentreCrop(), PadAndCrop(4)])
def test_a_box_depends_on_its_row_alone(crop):
    random = np.random.default_rng(0)
    height_M, width_M = random.integers(1, 500, 64), random.integers(1, 500, 64)
    together = crop.boxes(keys(64), height_M, width_M)
    alone = [crop.boxes(keys(64)[i : i + 1], height_M[i : i + 1], width_M[i : i + 1])[0] for i in range(64)]
    assert together.dtype == np.int64
    np.testing.assert_array_equal(together, alone)
    assert crop.boxes(keys(0), height_M[:0], width_M[:0]).shape == (0, 4)


def test_random_resized_crop():
    n, H, W = 20_000, 300, 400
    top, left, height, width = RandomResizedCrop().boxes(keys(n), np.full(n, H), np.full(n, W)).T
    assert top.min() == left.min() == 0 and (top + height).max() == H and (left + width).max() == W
    part, ratio = height * width / (H * W), width / height
    assert 0.079 < part.min() < 0.085 and part.max() > 0.95
    assert 0.74 < ratio.min() < 0.76 and 1.32 < ratio.max() < 1.35
    small = part < 0.3  # where no box is refused, so that its distribution is the drawn one
    assert abs(np.median(part[small]) - 0.19) < 0.005 and abs(np.median(np.log(ratio[small]))) < 0.01
    free = H - height[small]
    assert abs((top[small] / free).mean() - 0.5) < 0.01


@pytest.mark.parametrize(("height", "width", "expected"), [(10, 1000, 13), (1000, 10, 13), (1, 1, 1), (1, 9, 1)])
def test_random_resized_crop_of_what_fits_no_box(height, width, expected):
    box = RandomResizedCrop((0.9, 1.0)).boxes(keys(50), np.full(50, height), np.full(50, width))
    assert (box[:, :2] >= 0).all()
    assert (box[:, 0] + box[:, 2] <= height).all() and (box[:, 1] + box[:, 3] <= width).all()
    assert (box[:, 2:].max(1) == expected).all()


def test_centre_crop():
    box = CentreCrop().boxes(keys(3), np.array([256, 300, 1]), np.array([256, 500, 1]))
    assert box.tolist() == [[16, 16, 224, 224], [19, 119, 262, 262], [0, 0, 1, 1]]


def test_pad_and_crop():
    box = PadAndCrop(4).boxes(keys(5000), np.full(5000, 32), np.full(5000, 32))
    assert (box[:, 2:] == 32).all()
    for side in (0, 1):
        bins = np.bincount(box[:, side] + 4, minlength=9)
        assert len(bins) == 9 and bins.min() > 450
