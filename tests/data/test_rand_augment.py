"""The operations are Pillow's, and a row's are its own."""

import numpy as np
import pytest
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from dltrain.data import rand_augment as ra
from dltrain.data.draws import row_keys

R, H, W = 6, 37, 50


def images(seed: int = 0) -> Tensor:
    """uint8 [R, 3, H, W]: noise, two narrow ranges, flat, two colours, and a ramp."""
    random = np.random.default_rng(seed)
    x = random.integers(0, 256, (R, H, W, 3))
    x[1], x[2], x[3] = 90 + x[1] // 8, 250 + x[2] // 64, 77
    x[4] = np.where(x[4] < 100, 20, 200)
    x[5] = np.linspace(0, 255, W).astype(int)[:, None]
    return torch.from_numpy(x.astype(np.uint8)).permute(0, 3, 1, 2)


def pillow(x_RCHW: Tensor, op) -> np.ndarray:
    """`op(image, row)` on each row: int [R, H, W, 3]."""
    arrays = x_RCHW.permute(0, 2, 3, 1).numpy()
    return np.stack([np.asarray(op(Image.fromarray(array), i)) for i, array in enumerate(arrays)]).astype(int)


def ours(op, x_RCHW: Tensor, level: float, sign_R: np.ndarray) -> np.ndarray:
    before = x_RCHW.clone()
    y = op(x_RCHW, level, sign_R, 128)
    assert y.dtype == torch.uint8 and y.shape == x_RCHW.shape and torch.equal(before, x_RCHW)
    return y.permute(0, 2, 3, 1).numpy().astype(int)


SIGN_R = np.array([1.0, -1.0, 1.0, -1.0, -1.0, 1.0])
GREY = (128, 128, 128)


def moved(matrix):
    def op(image, i):
        return image.transform(image.size, Image.Transform.AFFINE, matrix(i), fillcolor=GREY)

    return op


def reference(name: str, level: float):
    """What Pillow does for one image."""
    enhance = {
        "color": ImageEnhance.Color,
        "contrast": ImageEnhance.Contrast,
        "brightness": ImageEnhance.Brightness,
        "sharpness": ImageEnhance.Sharpness,
    }
    if name in enhance:
        return lambda image, i: enhance[name](image).enhance(1 + 0.9 * level * SIGN_R[i])
    shift = 150 / 331 * level
    return {
        "identity": lambda image, i: image,
        "autocontrast": lambda image, i: ImageOps.autocontrast(image),
        "equalize": lambda image, i: ImageOps.equalize(image),
        "solarize": lambda image, i: image.point(lambda v: v if v < 256 * (1 - level) else 255 - v),
        "posterize": lambda image, i: ImageOps.posterize(image, 8 - round(4 * level)),
        "rotate": lambda image, i: image.rotate(30 * level * SIGN_R[i], fillcolor=GREY),
        "shear_x": moved(lambda i: (1, 0.3 * level * SIGN_R[i], 0, 0, 1, 0)),
        "shear_y": moved(lambda i: (1, 0, 0, 0.3 * level * SIGN_R[i], 1, 0)),
        "translate_x": moved(lambda i: (1, 0, shift * W * SIGN_R[i], 0, 1, 0)),
        "translate_y": moved(lambda i: (1, 0, 0, 0, 1, shift * H * SIGN_R[i])),
    }[name]


@pytest.mark.parametrize("level", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("op", ra.OPS, ids=lambda op: op.__name__)
def test_as_pillow(op, level):
    found = ours(op, images(), level, SIGN_R)
    np.testing.assert_array_equal(found, pillow(images(), reference(op.__name__, level)))


@pytest.mark.parametrize("op", ra.OPS, ids=lambda op: op.__name__)
def test_level_0_changes_nothing_but_what_has_no_level(op):
    same = np.array_equal(ours(op, images(), 0.0, SIGN_R), images().permute(0, 2, 3, 1))
    assert same == (op not in (ra.autocontrast, ra.equalize))


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (1, 9)])
def test_tiny_images(shape):
    x = images()[..., : shape[0], : shape[1]]
    for op in ra.OPS:
        assert op(x, 0.9, SIGN_R, 128).shape == x.shape


def test_any_split_gives_the_same_rows():
    x = torch.cat([images(seed) for seed in range(10)])
    keys = torch.from_numpy(row_keys(0, np.zeros(60, np.int64), np.arange(60)).view(np.int64))
    whole = ra.rand_augment(x, keys)
    for size in (1, 7):
        parts = [ra.rand_augment(x[i : i + size], keys[i : i + size]) for i in range(0, 60, size)]
        assert torch.equal(torch.cat(parts), whole)
    last = ra.rand_augment(x.contiguous(memory_format=torch.channels_last), keys)
    assert torch.equal(last, whole)
    assert sum(not torch.equal(a, b) for a, b in zip(whole, x)) > 40


def test_every_operation_is_drawn_equally_often(monkeypatch):
    n, seen = 14_000, []
    monkeypatch.setattr(ra, "OPS", tuple(_counter(op, seen) for op in ra.OPS))
    keys = torch.from_numpy(row_keys(0, np.zeros(n, np.int64), np.arange(n)).view(np.int64))
    ra.rand_augment(torch.zeros(n, 1, 1, 1, dtype=torch.uint8), keys, n=1)
    counts, signs = zip(*seen)
    assert len(counts) == 14 and sum(counts) == n and min(counts) > 880 and max(counts) < 1120
    assert abs(sum(signs)) < 500


def _counter(op, seen):
    def count(x, level, sign_R, fill):
        assert level == 0.9
        seen.append((len(x), sign_R.sum()))
        return x

    return count
