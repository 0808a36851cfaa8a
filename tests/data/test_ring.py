"""Eight Gaussians, and what samples of them are measured by."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from dltrain.data.ring import CENTRES_82, SPREAD, RingRows, densities, modes, sliced_wasserstein

ROWS = RingRows(0)


def test_rows_are_of_eight_gaussians():
    distance_N8 = torch.cdist(ROWS.points_N2, torch.from_numpy(CENTRES_82).float())
    nearest_N = distance_N8.argmin(1)
    share_8 = torch.bincount(nearest_N, minlength=8) / len(ROWS)
    assert share_8.numpy() == pytest.approx(np.full(8, 1 / 8), abs=0.01)
    apart_N2 = ROWS.points_N2 - torch.from_numpy(CENTRES_82).float()[nearest_N]
    assert apart_N2.std(0).numpy() == pytest.approx([SPREAD] * 2, rel=0.02)
    assert not torch.equal(ROWS.points_N2, RingRows(1).points_N2) and ROWS.fingerprint != RingRows(1).fingerprint


def test_padding_weighs_nothing():
    batch = ROWS.batch(np.zeros(3, np.int64), np.array([7, -1, 9]))
    assert batch["weights_B"].tolist() == [1, 0, 1] and int(batch["count"]) == 2
    assert torch.equal(batch["points_B2"][0], ROWS.points_N2[7])


def test_modes():
    centres = torch.from_numpy(CENTRES_82).float()
    assert modes(ROWS.points_N2[:4000]) == 8
    assert modes(centres[:3].repeat(50, 1)) == 3
    assert modes(torch.cat([centres[:1].repeat(996, 1), centres[1:2].repeat(4, 1)])) == 1  # fewer than a hundredth
    assert modes(centres + 7 * SPREAD) == 0


def test_sliced_wasserstein_of_a_shift_is_its_projection():
    a = torch.randn(500, 2, generator=torch.Generator().manual_seed(0))
    assert sliced_wasserstein(a, a.flip(0)) == 0
    shifted = sliced_wasserstein(a, a + torch.tensor([3.0, 0.0]), slices=2000)
    assert shifted == pytest.approx(3 * 2 / np.pi, rel=0.03)  # the mean of |cos| is 2 / pi
    images = torch.rand(10, 3, 4, 4)
    assert sliced_wasserstein(images, images + 1) > sliced_wasserstein(images, images + 0.5) > 0


def test_densities_are_dark_where_the_points_are():
    png = densities(ROWS.points_N2[:1000], torch.zeros(10, 2))
    picture = np.asarray(Image.open(io.BytesIO(png)).convert("L"))
    left, right = np.hsplit(picture, 2)
    assert (left < 250).sum() > 20 > (right < 250).sum() > 0
