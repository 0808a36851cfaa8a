"""From shards to micro-batches: the right part of the right image, whatever the split, and damage that weighs
nothing."""

import io
import os
import pickle
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dltrain.data.crops import CentreCrop, PadAndCrop, RandomResizedCrop
from dltrain.data.images import ImageRows, cut, empty
from dltrain.data.pictures import Picture
from dltrain.data.shards import Shards, write_shards
from dltrain.errors import UserError


def photo(number: int, height: int = 40, width: int = 56) -> np.ndarray:
    y, x = np.mgrid[0:height, 0:width]
    planes = [(200 * y / height + 5 * number) % 256, 200 * x / width, 120 + 90 * np.sin(number + y / 9) * np.cos(x / 7)]
    return np.stack(planes, -1).astype(np.uint8)


def encoded(pixels: np.ndarray, kind: str = "PNG", **options) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **options)
    return file.getvalue()


def part(picture: Picture, box: list[int], size: int, mirrored: bool = False) -> np.ndarray:
    """What `cut` gives, uint8 [H, W, C]."""
    out = empty(1, size)
    cut(picture, box, size, mirrored, out)
    return out[0].permute(1, 2, 0).numpy()


KINDS = (("png", "PNG"), ("jpg", "JPEG"), ("webp", "WEBP"), ("jpeg", "JPEG"), ("ppm", "PPM"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """20 images of five formats in shards of 8; number i is of class i % 7."""
    folder = tmp_path_factory.mktemp("images")
    samples = []
    for i in range(20):
        extension, kind = KINDS[i % 5]
        samples.append({"__key__": f"{i:02d}", extension: encoded(photo(i), kind), "cls": str(i % 7)})
    write_shards(samples, folder, "images", 8)
    return folder


def rows_of(folder, size=24, crop=None, **options) -> ImageRows:
    return ImageRows(Shards(str(folder)), size, crop or RandomResizedCrop(), **options)


def test_a_batch(folder):
    batch = rows_of(folder, flip=0.5).batch(np.zeros(6, np.int64), np.array([3, 19, -1, 0, 7, 7]))
    assert batch["images_BCHW"].shape == (6, 3, 24, 24) and batch["images_BCHW"].dtype == torch.uint8
    assert batch["images_BCHW"].is_contiguous(memory_format=torch.channels_last)
    assert batch["labels_B"].tolist() == [3, 5, 0, 0, 0, 0] and batch["labels_B"].dtype == torch.int64
    assert batch["weights_B"].tolist() == [1, 1, 0, 1, 1, 1]
    assert batch["count"].item() == 5 and "damaged" not in batch
    assert not batch["images_BCHW"][2].any()
    assert torch.equal(batch["images_BCHW"][4], batch["images_BCHW"][5])
    assert len(set(batch["keys_B"].tolist())) == 5


def test_a_batch_of_padding_alone(folder):
    batch = rows_of(folder).batch(np.zeros(3, np.int64), np.full(3, -1))
    assert batch["count"].item() == 0 and batch["images_BCHW"].shape == (3, 3, 24, 24)


def test_any_split_gives_the_same_rows(folder):
    rows = rows_of(folder, flip=0.5)
    epoch, index = np.divmod(np.arange(60), 20)
    whole = rows.batch(epoch, index)
    for size in (1, 7, 30):
        parts = [rows.batch(epoch[i : i + size], index[i : i + size]) for i in range(0, 60, size)]
        for name in ("images_BCHW", "labels_B", "weights_B", "keys_B"):
            assert torch.equal(torch.cat([part[name] for part in parts]), whole[name]), (size, name)
    again = pickle.loads(pickle.dumps(rows)).batch(epoch, index)
    assert all(torch.equal(again[name], whole[name]) for name in whole)
    first, second = whole["images_BCHW"][:20], whole["images_BCHW"][20:40]
    assert sum(not torch.equal(a, b) for a, b in zip(first, second)) == 20  # another epoch, another crop


def test_crops_and_mirrors_are_pillow_s(folder):
    """Random boxes of the decoded image, resized by Pillow: within 2 of 255."""
    rows = rows_of(folder, flip=0.5)
    epoch, index = np.divmod(np.arange(40), 20)
    batch = rows.batch(epoch, index)
    boxes = rows.crop.boxes(batch["keys_B"].numpy(), np.full(40, 40), np.full(40, 56))
    mirrored = 0
    for i, (top, left, height, width) in enumerate(boxes.tolist()):
        extension, kind = KINDS[index[i] % 5]
        pixels = Picture(rows.shards[int(index[i])][extension], "pillow").decode()
        box = (left, top, left + width, top + height)
        expected = Image.fromarray(pixels).crop(box).resize((24, 24), Image.Resampling.BILINEAR)
        found = batch["images_BCHW"][i].permute(1, 2, 0).numpy().astype(int)
        plain, mirror = (
            abs(found - np.asarray(image)).max()
            for image in (expected, expected.transpose(Image.Transpose.FLIP_LEFT_RIGHT))
        )
        assert min(plain, mirror) <= 2, kind
        mirrored += mirror < plain
    assert 8 < mirrored < 32


def test_pad_and_crop_puts_black_around(folder):
    image = photo(0, 32, 32)
    picture = Picture(encoded(image), "pillow")
    padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
    for top, left in ((-4, -4), (0, 0), (4, -3), (1, 4)):
        found = part(picture, [top, left, 32, 32], 32)
        np.testing.assert_array_equal(found, padded[top + 4 : top + 36, left + 4 : left + 36])
        np.testing.assert_array_equal(part(picture, [top, left, 32, 32], 32, True), found[:, ::-1])
    assert not part(picture, [40, 0, 32, 32], 32).any() and not part(picture, [-40, 0, 32, 32], 32).any()


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (9, 1), (2, 24), (24, 2), (24, 24), (40, 56)])
def test_boxes_of_any_shape_are_resized_as_pillow_does(height, width):
    """And mirrored to the bit as the mirrored image is, and as the dense copy of the box."""
    data = encoded(photo(2))
    expected = Image.fromarray(photo(2)[:height, :width]).resize((24, 24), Image.Resampling.BILINEAR)
    found = part(Picture(data, "pillow"), [0, 0, height, width], 24)
    assert abs(found.astype(int) - np.asarray(expected)).max() <= 2
    alone = Picture(encoded(photo(2)[:height, :width]), "pillow")
    np.testing.assert_array_equal(part(alone, [0, 0, height, width], 24), found)
    turned = Picture(encoded(photo(2)[:height, :width][:, ::-1]), "pillow")
    np.testing.assert_array_equal(part(alone, [0, 0, height, width], 24, True), part(turned, [0, 0, height, width], 24))


@pytest.mark.parametrize("decoder", ["pillow", "simplejpeg"])
def test_scaled_decoding_keeps_the_picture(decoder):
    """Box by box against the whole image cropped and resized by Pillow, where the decoder may do 1/2, 1/4 and 1/8."""
    if decoder == "simplejpeg":
        pytest.importorskip("simplejpeg")
    smooth = np.asarray(Image.fromarray(photo(3, 201, 301)).resize((1205, 803), Image.Resampling.BICUBIC))
    data = encoded(smooth, "JPEG", quality=95)
    whole = Image.open(io.BytesIO(data))
    for top, left, height, width in ((0, 0, 803, 1205), (101, 333, 702, 871), (5, 3, 99, 101), (0, 805, 400, 400)):
        for size, shrink in ((24, min(height, width) // 48), (96, min(height, width) // 192)):
            picture = Picture(data, decoder)
            found = part(picture, [top, left, height, width], size).astype(int)
            shrink = max(s for s in (1, 2, 4, 8) if s <= max(shrink, 1))
            box = [round(side / shrink) * shrink for side in (left, top, left + width, top + height)]
            box = [min(side, limit) for side, limit in zip(box, (1205, 803, 1205, 803))]
            expected = np.asarray(
                whole.crop((box[0], box[1], box[2], box[3])).resize((size, size), Image.Resampling.BILINEAR)
            )
            error = abs(found - expected)
            assert error.max() <= (2 if shrink == 1 else 14) and error.mean() < 1, (box, size)


def test_the_fingerprint_is_of_all_that_makes_a_row(folder):
    variants = [
        rows_of(folder),
        rows_of(folder, 25),
        rows_of(folder, crop=CentreCrop()),
        rows_of(folder, crop=PadAndCrop(4)),
        rows_of(folder, crop=PadAndCrop(3)),
        rows_of(folder, flip=0.5),
        rows_of(folder, seed=1),
        rows_of(folder, samples=np.arange(5)),
    ]
    assert len({rows.fingerprint for rows in variants}) == len(variants)
    assert rows_of(folder).fingerprint == rows_of(folder).fingerprint


def test_chosen_samples(folder):
    rows = rows_of(folder, samples=np.array([4, 11]))
    assert len(rows) == 2
    assert rows.batch(np.zeros(2, np.int64), np.arange(2))["labels_B"].tolist() == [4, 4]


BROKEN = {
    "noise": ({"png": b"no image", "cls": "1"}, "not an image"),
    "short": ({"jpg": encoded(photo(1), "JPEG")[:-200], "cls": "1"}, "truncated"),
    "unlabelled": ({"png": encoded(photo(1))}, "no label"),
    "named": ({"png": encoded(photo(1)), "cls": "cat"}, "b'cat', not a number"),
    "imageless": ({"cls": "1"}, "no image"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_used(what, tmp_path):
    sample, reason = BROKEN[what]
    whole = {"png": encoded(photo(1)), "cls": "6"}
    write_shards([{"__key__": "a", **whole}, {"__key__": "b", **sample}, {"__key__": "c", **whole}], tmp_path, "x", 9)
    where = (np.zeros(3, np.int64), np.arange(3))
    with pytest.raises(UserError, match=rf"(?s)x-000000.tar.*b.*{reason}"):
        ImageRows(Shards(str(tmp_path)), 24, CentreCrop()).batch(*where)
    batch = ImageRows(Shards(str(tmp_path), on_error="skip"), 24, CentreCrop()).batch(*where)
    assert batch["weights_B"].tolist() == [1, 0, 1] and batch["count"].item() == 2
    assert batch["labels_B"].tolist() == [6, 0, 6] and not batch["images_BCHW"][1].any()
    assert [(damage.key, reason in damage.reason) for damage in batch["damaged"]] == [("b", True)]


@pytest.mark.parametrize("on_error", ["skip", "substitute"])
def test_damaged_bytes(on_error, tmp_path):
    samples = [{"__key__": str(i), "ppm": encoded(photo(i), "PPM"), "cls": str(i)} for i in range(3)]
    (path,) = write_shards(samples, tmp_path, "x", 9)
    data = bytearray(path.read_bytes())
    data[data.index(photo(1).tobytes()[:64]) + 1000] ^= 255
    stat = path.stat()
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    batch = ImageRows(Shards(str(tmp_path), on_error=on_error), 24, CentreCrop()).batch(
        np.zeros(3, np.int64), np.arange(3)
    )
    assert [damage.key for damage in batch["damaged"]] == ["1"]
    if on_error == "skip":
        assert batch["weights_B"].tolist() == [1, 0, 1]
    else:
        assert batch["weights_B"].tolist() == [1, 1, 1] and batch["labels_B"].tolist() == [0, 2, 2]


@pytest.mark.data
@pytest.mark.parametrize(("archive", "extension"), [("imagenette128/train.zip", "jpg"), ("cifar10/test.zip", "webp")])
def test_real_images(archive, extension, tmp_path):
    if not (data := os.environ.get("DLTRAIN_DATA")):
        pytest.skip("DLTRAIN_DATA is not set")
    with zipfile.ZipFile(Path(data, archive)) as file:
        names = sorted(name for name in file.namelist() if name.endswith(extension))[::200]
        samples = [{"__key__": f"{i:03d}", extension: file.read(name), "cls": "0"} for i, name in enumerate(names)]
    write_shards(samples, tmp_path, "x", 1000)
    size = 32 if extension == "webp" else 112
    batch = ImageRows(Shards(str(tmp_path)), size, CentreCrop(1.0)).batch(
        np.zeros(len(names), np.int64), np.arange(len(names))
    )
    assert batch["count"].item() == len(names)
    for sample, found in zip(samples, batch["images_BCHW"].permute(0, 2, 3, 1).numpy().astype(int)):
        image = Image.open(io.BytesIO(sample[extension])).convert("RGB")
        assert abs(found - np.asarray(image.resize((size, size), Image.Resampling.BILINEAR))).max() <= 2
