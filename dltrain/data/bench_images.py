"""How fast image batches are made, in one process: ours, a bare loop of the same decoder and resizer, and webdataset's
own way. The three take turns, and what counts is the time of the processor, so that a busy machine slows all alike."""

import io
import time
from collections import deque
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch.nn import functional

from dltrain.data.crops import RandomResizedCrop
from dltrain.data.draws import row_keys, uniform
from dltrain.data.images import EXTENSIONS, ImageRows, empty, resize
from dltrain.data.order import Order
from dltrain.data.pictures import FORMATS, LARGEST, Picture
from dltrain.data.shards import Shards

BATCH = 256


def image_speed(pattern: str, size: int, turns: int = 40) -> dict[str, Any]:
    """Images per second of random-resized-crops to `size`, mirrored half of the time, in shuffled batches of 256.

    ours        `ImageRows` on the shards: read, CRC, decode, crop, mirror, resize, label, batch
    bare        a loop of the same decoder and resizer on bytes in memory, with boxes that are known, our buffer and
                our resizing into place
    plain       the same loop with public calls alone: decode_jpeg, F.interpolate, torch.cat
    webdataset  `WebDataset(...).shuffle(1000).decode("pil").to_tuple(...)`, Pillow's crop and resize, np.stack

    All shards have been read once before. A turn is one batch of each; seconds are the processor's. Returns the median
    rates, and the ratios' lower quartile, median and upper quartile.
    """
    shards = Shards(pattern)
    rows = ImageRows(shards, size, RandomResizedCrop(), flip=0.5)
    order = Order(len(rows), 0)
    theirs = _webdataset_batches(shards.urls, size)
    next(theirs)  # fills the shuffle buffer
    buffer = np.empty(3 * LARGEST, np.uint8)  # of which only what is written becomes real
    deque(shards, maxlen=0)  # a file's first touch costs, and is paid once in a run
    seconds: dict[str, list[float]] = {"ours": [], "bare": [], "plain": [], "webdataset": []}
    for turn in range(turns):
        place = order.at(np.arange(turn * BATCH, (turn + 1) * BATCH))
        work = _work(rows, *order.at(np.arange((turn + turns) * BATCH, (turn + turns + 1) * BATCH)))
        sides = [
            ("ours", lambda place=place: rows.batch(*place)),
            ("bare", lambda work=work: _bare(work, size, buffer)),
            ("plain", lambda work=work: _plain(work, size)),
            ("webdataset", lambda: next(theirs)),
        ]
        for name, side in sides if turn % 2 else reversed(sides):
            start = time.process_time()
            side()
            seconds[name].append(time.process_time() - start)
    return {
        "what": f"images/s decoded, random-resized-cropped to {size}, batches of {BATCH}, {rows.decoder}, 1 process",
        **{f"{name}_per_second": BATCH / float(np.median(of)) for name, of in seconds.items()},
        "ours_over_bare": _ratio(seconds["bare"], seconds["ours"]),
        "ours_over_plain": _ratio(seconds["plain"], seconds["ours"]),
        "ours_over_webdataset": _ratio(seconds["webdataset"], seconds["ours"]),
        "turns": turns,
    }


def _ratio(theirs: list[float], ours: list[float]) -> list[float]:
    """Lower quartile, median, upper quartile of the turns' ratios."""
    return [float(q) for q in np.quantile(np.array(theirs) / np.array(ours), [0.25, 0.5, 0.75])]


def _work(rows: ImageRows, epoch_M: np.ndarray, index_M: np.ndarray) -> list[tuple[bytes, list[int], bool]]:
    """Encoded image, box and whether mirrored, as `rows` has them."""
    samples = rows.shards.read(rows.samples[index_M])
    data = [next(sample[extension] for extension in EXTENSIONS if extension in sample) for sample in samples]
    pictures = [Picture(blob, rows.decoder) for blob in data]
    height_M, width_M = np.array([p.height for p in pictures]), np.array([p.width for p in pictures])
    key_M = row_keys(rows.seed, epoch_M, index_M)
    mirrored = uniform(key_M, "flip", 1)[:, 0] < rows.flip
    return list(zip(data, rows.crop.boxes(key_M, height_M, width_M).tolist(), mirrored.tolist()))


def _bare(work: list[tuple[bytes, list[int], bool]], size: int, buffer: np.ndarray) -> torch.Tensor:
    """Decoded to where `ImageRows` does (`buffer`), and resized as it does."""
    from PIL import Image

    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        decode_jpeg = None
    batch_MCHW = empty(len(work), size)
    for (data, (top, left, height, width), mirrored), place_1CHW in zip(work, batch_MCHW.split(1)):
        if decode_jpeg and data[:2] == b"\xff\xd8":
            pixels_HWC = decode_jpeg(data, buffer=buffer)
        else:
            image = Image.open(io.BytesIO(data), formats=FORMATS)
            pixels_HWC = np.array(image if image.mode == "RGB" else image.convert("RGB"))
        resize(pixels_HWC[top : top + height, left : left + width], size, mirrored, place_1CHW)
    return batch_MCHW


def _plain(work: list[tuple[bytes, list[int], bool]], size: int) -> torch.Tensor:
    from PIL import Image

    try:
        from simplejpeg import decode_jpeg
    except ImportError:
        decode_jpeg = None
    images = []
    for data, (top, left, height, width), mirrored in work:
        if decode_jpeg and data[:2] == b"\xff\xd8":
            pixels_HWC = decode_jpeg(data)
        else:
            pixels_HWC = np.array(Image.open(io.BytesIO(data), formats=FORMATS).convert("RGB"))
        part = torch.from_numpy(pixels_HWC[top : top + height, left : left + width])
        part_1CHW = (part.flip(1) if mirrored else part).permute(2, 0, 1)[None]
        images.append(functional.interpolate(part_1CHW, (size, size), mode="bilinear", antialias=True))
    return torch.cat(images)


def _webdataset_batches(urls: list[str], size: int) -> Iterator[Any]:
    import webdataset as wds
    from PIL import Image

    def crop(image: Any) -> np.ndarray:
        top, left, height, width = _random_box(rng, image.height, image.width)
        box = (left, top, left + width, top + height)
        image = image.resize((size, size), Image.Resampling.BILINEAR, box=box)
        return np.asarray(image if rng.random() < 0.5 else image.transpose(Image.Transpose.FLIP_LEFT_RIGHT))

    rng = np.random.default_rng(0)
    source = wds.WebDataset(urls, shardshuffle=False)  # type: ignore[attr-defined]
    samples = source.repeat().shuffle(1000).decode("pil").to_tuple(";".join(EXTENSIONS), "cls")
    images: list[np.ndarray] = []
    labels: list[int] = []
    for image, label in samples:
        images.append(crop(image))
        labels.append(label)
        if len(images) == BATCH:
            yield np.stack(images), np.array(labels)
            images, labels = [], []


def _random_box(rng: np.random.Generator, height: int, width: int) -> tuple[int, int, int, int]:
    """One box of a random-resized-crop, as one writes it for one image."""
    for _ in range(10):
        area, ratio = rng.uniform(0.08, 1.0) * height * width, np.exp(rng.uniform(np.log(3 / 4), np.log(4 / 3)))
        h, w = round((area / ratio) ** 0.5), round((area * ratio) ** 0.5)
        if h <= height and w <= width:
            return int(rng.integers(0, height - h + 1)), int(rng.integers(0, width - w + 1)), h, w
    return 0, 0, height, width
