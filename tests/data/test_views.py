"""Colours equal Pillow's or colorsys's arithmetic of one image, and an enlarged box is what torch resizes."""

import colorsys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.data.draws import fork, row_keys, uniform
from dltrain.data.views import blur, brightness, colour_jitter, contrast, enlarge, greyscale, hue, saturation

N, S = 12, 40


def keys(n: int = N) -> Tensor:
    return torch.from_numpy(row_keys(0, np.zeros(n, np.int64), np.arange(n)).view(np.int64))


def images(n: int = N) -> Tensor:
    return torch.rand(n, 3, S, S, generator=torch.Generator().manual_seed(0))


def amounts(value: float) -> Tensor:
    return torch.full((N, 1, 1, 1), value)


@pytest.mark.parametrize("turn", [-1.0, -0.3, 0.0, 0.5, 1.0])
def test_hue(turn):
    x = images()
    x[0] = 0.25  # grey has no hue
    found = hue(x, amounts(turn))
    for n, i in [(0, 0), (1, 3), (5, 7), (9, 11)]:
        h, s, v = colorsys.rgb_to_hsv(*x[n, :, i, i].tolist())
        assert found[n, :, i, i].tolist() == pytest.approx(colorsys.hsv_to_rgb((h + 0.2 * turn) % 1, s, v), abs=1e-5)


def test_brightness_contrast_saturation():
    x, factor = images(), 1 + 0.8 * 0.5
    grey = (torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1) * x).sum(1, keepdim=True)
    mean = grey.mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(brightness(x, amounts(0.5)), (factor * x).clamp(0, 1))
    torch.testing.assert_close(contrast(x, amounts(0.5)), (mean + factor * (x - mean)).clamp(0, 1))
    torch.testing.assert_close(saturation(x, amounts(0.5)), (grey + factor * (x - grey)).clamp(0, 1))
    assert not brightness(x, amounts(-2.0)).any()  # a factor is never negative


def test_jitter_is_in_the_rows_own_order_and_of_chosen_rows():
    x, key_N = images(), fork(keys().numpy(), "jitter")
    order = uniform(key_N, "order", 4).argsort(1)
    amount = torch.from_numpy(2 * uniform(key_N, "amount", 4) - 1).float() * 0.5
    chosen = uniform(key_N, "whether", 1)[:, 0] < 0.8
    assert 0 < chosen.sum() < N and len({tuple(o) for o in order}) > 3
    found = colour_jitter(x, keys(), 0.5)
    for n in range(N):
        expected = x[n : n + 1]
        for o in order[n] if chosen[n] else []:
            expected = (brightness, contrast, saturation, hue)[o](expected, amount[n, o].view(1, 1, 1, 1))
        torch.testing.assert_close(found[n : n + 1], expected)


def test_greyscale_and_blur_of_chosen_rows():
    x = images()
    grey = greyscale(x, keys(), chance=0.5)
    chosen = torch.from_numpy(uniform(keys().numpy(), "greyscale", 1)[:, 0] < 0.5)
    assert 0 < chosen.sum() < N
    assert torch.equal(grey[~chosen], x[~chosen])
    luma = 0.299 * x[:, 0] + 0.587 * x[:, 1] + 0.114 * x[:, 2]
    for channel in range(3):
        torch.testing.assert_close(grey[chosen, channel], luma[chosen])


def test_blur_is_a_gaussian_of_the_rows_own_width():
    point = torch.zeros(N, 3, S, S)
    point[:, :, 20, 20] = 1
    found = blur(point, keys(), chance=1.0)
    sigma = torch.from_numpy(0.1 + 1.9 * uniform(keys().numpy(), "sigma", 1)[:, 0]).float()
    kernel = torch.exp(-0.5 * (torch.arange(-2, 3) / sigma[:, None]) ** 2)  # a tenth of 40 pixels, and one
    kernel = kernel / kernel.sum(1, keepdim=True)
    torch.testing.assert_close(found[:, 1, 18:23, 18:23], kernel[:, :, None] * kernel[:, None, :])
    some = torch.from_numpy(uniform(keys().numpy(), "blur", 1)[:, 0] < 0.5)
    assert torch.equal(blur(images(), keys())[~some], images()[~some])
    torch.testing.assert_close(blur(torch.full((N, 3, S, S), 0.3), keys(), 1.0), torch.full((N, 3, S, S), 0.3))


def test_enlarge():
    x = (images(3) * 255).byte()
    box = torch.tensor([[0, 0, S, S], [5, 9, 20, 12], [30, 0, 7, 40]])
    found = enlarge(x, box)
    assert torch.equal(found[0], x[0])
    for n, (top, left, height, width) in enumerate(box.tolist()):
        cut = x[n : n + 1, :, top : top + height, left : left + width].float()
        plain = F.interpolate(cut, (S, S), mode="bilinear", align_corners=False)[0]
        inside = (slice(None), slice(4, -4), slice(4, -4))  # at its edge a box sees the pixel beyond
        assert (found[n].float() - plain)[inside].abs().max() <= 0.5 + 1e-3
