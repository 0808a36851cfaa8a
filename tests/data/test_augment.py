"""Batched augmentation equals the plain arithmetic of one image, and rows do not see each other but to mix."""

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from dltrain.data.augment import IMAGENET_MEAN, IMAGENET_STD, cutmix, flip, mixup, normalise, random_erasing
from dltrain.data.draws import generator, row_keys

B, H, W = 8, 24, 30


def keys(n: int = B) -> Tensor:
    return torch.from_numpy(row_keys(0, np.zeros(n, np.int64), np.arange(n)).view(np.int64))


def images() -> Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (B, 3, H, W), dtype=np.uint8))


def targets() -> Tensor:
    return F.one_hot(torch.arange(B) % 5, 5).float()


def test_normalise():
    x = images()
    expected = (x.permute(0, 2, 3, 1).numpy() / 255 - IMAGENET_MEAN) / IMAGENET_STD
    found = normalise(x)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.permute(0, 2, 3, 1).numpy(), expected, atol=2e-6)
    last = normalise(x.contiguous(memory_format=torch.channels_last))
    assert torch.equal(last, found) and last.is_contiguous(memory_format=torch.channels_last)


def test_flip():
    chosen = torch.arange(B) % 3 == 0
    found = flip(images(), chosen)
    for i in range(B):
        np.testing.assert_array_equal(found[i], images().numpy()[i, :, :, ::-1] if chosen[i] else images()[i])


def draw(what: str) -> np.random.Generator:
    return generator(keys().numpy(), what)


def test_mixup():
    x, weights = images().float(), torch.ones(B)
    mixed, labels = mixup(x, targets(), weights, 0.4, draw("mixup"))
    random = draw("mixup")
    part, partner = random.beta(0.4, 0.4), random.permutation(B)
    for i in range(B):
        torch.testing.assert_close(mixed[i], part * x[i] + (1 - part) * x[partner[i]])
        torch.testing.assert_close(labels[i], part * targets()[i] + (1 - part) * targets()[partner[i]])
    again = mixup(x, targets(), weights, 0.4, draw("mixup"))
    assert torch.equal(again[0], mixed) and torch.equal(again[1], labels)


@pytest.mark.parametrize("mix", [mixup, cutmix])
def test_rows_without_weight_are_in_no_other(mix):
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    x = torch.where(weights[:, None, None, None] > 0, images().float(), torch.nan)
    y = torch.where(weights[:, None] > 0, targets(), torch.nan)
    for seed in range(20):
        mixed, labels = mix(x, y, weights, 1.0, np.random.default_rng(seed))
        assert not mixed[weights > 0].isnan().any() and not labels[weights > 0].isnan().any()
        torch.testing.assert_close(labels[weights > 0].sum(1), torch.ones(6))


def test_cutmix():
    """Each pixel is the row's own or its partner's at the same place, as many as the targets say."""
    own, other = 0, 0.0
    for seed in range(200):
        x = torch.arange(B, dtype=torch.uint8)[:, None, None, None].expand(B, 3, H, W)
        mixed, labels = cutmix(x, torch.eye(B), torch.ones(B), 1.0, np.random.default_rng(seed))
        assert mixed.dtype == torch.uint8
        for i in range(B):
            share = torch.bincount(mixed[i, 0].flatten().long(), minlength=B) / (H * W)
            torch.testing.assert_close(share, labels[i])
            assert (share > 0).sum() <= 2 and torch.equal(mixed[i, 0], mixed[i, 2])
            taken = mixed[i, 0] != i
            rows, columns = taken.any(1).sum(), taken.any(0).sum()
            assert taken.sum() == rows * columns  # a box
        own += 1
        other += 1 - float(labels.diagonal().min())
    assert 0.25 < other / own < 0.5  # half of the area, less what is cut off at the edges


def test_random_erasing():
    x = torch.ones(400, 3, H, W)
    erased = random_erasing(x, keys(400), probability=0.25, area=(0.02, 0.3))
    part = 1 - erased.mean((1, 2, 3))
    assert 70 < (part > 0).sum() < 130
    assert part[part > 0].min() > 0.01 and part.max() < 0.33
    parts = [random_erasing(x[i : i + 50], keys(400)[i : i + 50], 0.25, (0.02, 0.3)) for i in range(0, 400, 50)]
    assert torch.equal(torch.cat(parts), erased)
    assert (random_erasing(x, keys(400), 1.0, fill=7.0).amax((1, 2, 3)) == 7).all()
