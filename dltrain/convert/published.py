"""Data sets as they are published, as sources of shards: MNIST (PNG), CIFAR-10 (PNG) and ImageNet (its own bytes)."""

import io
import pickle
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.convert.archive import Bad, Files, Span, contents, plain, tar_files
from dltrain.convert.engine import Entry, Source, keys
from dltrain.convert.images import class_folders, class_numbers, image_source, pillow, png, some
from dltrain.errors import UserError
from dltrain.progress import track

CIFAR10 = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
CIFAR10_FILES = {"train": [f"data_batch_{i}" for i in range(1, 6)], "test": ["test_batch"]}
# MNIST and its relatives.


def idx(source: Path, found: Files, work: Path, *, split: str = "") -> Source:
    """Pairs of `SPLIT-images-idx3-ubyte` and `SPLIT-labels-idx1-ubyte`, with or without .gz, in a folder or archive.

    The format: LeCun, Cortes and Burges, "The MNIST database of handwritten digits", 1998, "File formats": two zero
    bytes, a type (8: unsigned byte), the number of dimensions, each of them as a big-endian int32, the values.
    """
    listed = contents(source, found, work)
    names = {name.removesuffix(".gz"): name for name in listed}
    pairs = {}  # split -> names of its images and labels
    for name in names:
        labels = name.replace("images", "labels").replace("idx3", "idx1")
        if "idx3" in name and labels in names:
            pairs[Path(name).name.partition("images")[0].rstrip("-.")] = names[name], names[labels]
    if not pairs:
        raise UserError(f"{source}: no pair of ...-images-idx3-ubyte and ...-labels-idx1-ubyte(.gz); see --help")
    split = split or next(iter(pairs)) if len(pairs) == 1 else {"test": "t10k"}.get(split, split)
    if split not in pairs:
        raise UserError(f"{source} holds {some(sorted(pairs))}; choose one with --split")
    name, labels = pairs[split]
    pixels, (n, height, width) = _idx_values(name, plain(name, listed[name], work), 3)
    numbers, (n_labels,) = _idx_values(labels, plain(labels, listed[labels], work), 1)
    if n != n_labels:
        raise UserError(f"{source}: {name} has {n} images and {labels} {n_labels} labels; fetch both again")
    label_N = np.frombuffer(numbers.read(), np.uint8)
    size = height * width
    made = [
        Entry(f"{split}/{i:06d}", f"{name}, image {i}", Span(pixels.path, pixels.start + i * size, size), int(label))
        for i, label in enumerate(label_N)
    ]
    classes = [str(i) for i in range(int(label_N.max(initial=0)) + 1)]
    return Source(split, made, partial(_idx_image, height=height), classes, encoder=f"PNG by {pillow()}")


def _idx_values(name: str, span: Span, dimensions: int) -> tuple[Span, tuple[int, ...]]:
    """Where the values are, and their shape."""
    start = 4 + 4 * dimensions
    head = Span(span.path, span.start, min(start, span.size)).read()
    if head[:4] != bytes([0, 0, 8, dimensions]):
        raise UserError(f"{name} is no idx file of bytes with {dimensions} dimensions; fetch it again")
    shape = tuple(int(side) for side in np.frombuffer(head[4:], ">i4"))
    if len(head) < start or start + int(np.prod(shape, dtype=np.int64)) != span.size:
        raise UserError(f"{name} has {span.size} bytes, not those of the shape {shape} in its header; fetch it again")
    return Span(span.path, span.start + start, span.size - start), shape


def _idx_image(entry: Entry, height: int) -> dict[str, Any]:
    return {"png": png(np.frombuffer(entry.span.read(), np.uint8).reshape(height, -1)), "cls": str(entry.cls)}


# CIFAR-10.


def cifar10(source: Path, found: Files, work: Path, *, split: str = "") -> Source:
    """The published archive, packed or unpacked, in its version for Python or for C; or else class folders.

    The formats: Krizhevsky, "The CIFAR-10 dataset", https://www.cs.toronto.edu/~kriz/cifar.html, "Dataset layout".
    """
    listed = {Path(name).name: (name, span) for name, span in contents(source, found, work).items()}
    binary = "data_batch_1.bin" in listed or "test_batch.bin" in listed
    if not binary and "data_batch_1" not in listed and "test_batch" not in listed:
        return class_folders(source, found, work, split=split, prefix="cifar10")
    if split not in CIFAR10_FILES:
        raise UserError(f"{source} holds the splits train and test; choose one with --split")
    made = []
    for batch in CIFAR10_FILES[split]:
        name = f"{batch}.bin" if binary else batch
        if name not in listed:
            raise UserError(f"{source} has no {name}; fetch it again")
        name, span = listed[name]
        if binary:
            span = plain(name, span, work)
        else:
            span = _unpickled(name, span, work / f"{batch}.bin")
        if not span.size or span.size % 3073:
            raise UserError(f"{source}: {name} has {span.size} bytes, no multiple of an image's 3073; fetch it again")
        made += [
            Entry(f"{batch}/{i:05d}", f"{name}, image {i}", Span(span.path, span.start + 3073 * i, 3073))
            for i in range(span.size // 3073)
        ]
    return Source(split, made, _cifar_image, CIFAR10, encoder=f"PNG by {pillow()}")


class _Arrays(pickle.Unpickler):
    """Builds what the published files hold, NumPy arrays, and nothing else: a pickle could run anything."""

    def find_class(self, module: str, name: str) -> Any:
        if (module.replace("numpy._core", "numpy.core"), name) in {
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy.core.numeric", "_frombuffer"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        }:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def _unpickled(name: str, span: Span, target: Path) -> Span:
    """A batch of the Python version in the layout of the other: a byte of class and 3,072 of pixels an image."""
    try:
        batch = _Arrays(io.BytesIO(span.read()), encoding="bytes").load()
        label_N, pixel_NP = np.array(batch[b"labels"], np.uint8), np.asarray(batch[b"data"], np.uint8)
        record_NP = np.concatenate([label_N[:, None], pixel_NP], axis=1)
    except UserError:
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise UserError(f"{name} is not a batch of CIFAR-10 ({error}); fetch it again") from error
    target.write_bytes(record_NP.tobytes())
    return Span(str(target), 0, record_NP.nbytes)


def _cifar_image(entry: Entry) -> dict[str, Any]:
    record = np.frombuffer(entry.span.read(), np.uint8)
    if record[0] >= 10:
        raise Bad(f"{entry.name}: its class is {record[0]}, not one of 0 ... 9")
    return {"png": png(record[1:].reshape(3, 32, 32).transpose(1, 2, 0).copy()), "cls": str(record[0])}


# ImageNet.


def imagenet(
    source: Path,
    found: Files,
    work: Path,
    *,
    split: str = "",
    size: int = 0,
    classes: Sequence[str] = (),
    labels: str = "",
) -> Source:
    """ILSVRC2012_img_train.tar (a tar of each class), ILSVRC2012_img_val.tar, a folder with them, or class folders.

    The classes of validation images are in `labels`: ILSVRC2012_devkit_t12.tar.gz (the default, beside the images),
    or a text file with the synset of each image a line. Classes are numbered in the order of synset ids, as in
    torchvision and timm. Russakovsky et al. 2015, https://arxiv.org/abs/1409.0575.
    """
    if source.is_dir() and any(name.startswith("ILSVRC2012_img_") for name in found):
        name = f"ILSVRC2012_img_{split}.tar"
        if name not in found:
            raise UserError(f"{source}: choose --split train or --split val, of which ILSVRC2012_img_SPLIT.tar is here")
        source, found = Path(found[name].path), {name: found[name]}
    listed = {} if source.is_dir() else contents(source, found, work)
    if listed and all(name.endswith(".tar") for name in listed):
        members = [
            (f"{Path(tar).stem}/{name}", span, Path(tar).stem)
            for tar, inner in track(listed.items(), f"listing {source.name}")
            for name, span in sorted(tar_files(inner, f"{source.name}, {tar}"))
        ]
        return _synsets(source, "train", members, sorted({wnid for *_, wnid in members}), size, classes)
    if listed and not any("/" in name for name in listed):
        wnids = _validation_labels(Path(labels or source.with_name("ILSVRC2012_devkit_t12.tar.gz")), work)
        if len(wnids) != len(listed):
            raise UserError(f"{source} has {len(listed)} images, and there are {len(wnids)} labels; fetch them again")
        members = [(name, span, wnid) for (name, span), wnid in zip(listed.items(), wnids)]
        return _synsets(source, "val", members, sorted(set(wnids)), size, classes)
    return class_folders(source, found, work, split=split, size=size, classes=classes, prefix="imagenet")


def _synsets(
    source: Path, prefix: str, members: list[tuple[str, Span, str]], names: list[str], size: int, classes: Sequence[str]
) -> Source:
    number = class_numbers(names, classes, source)
    made = [
        Entry(key, f"{source.name}: {name}", span, number[wnid])
        for key, (name, span, wnid) in zip(keys(name for name, *_ in members), members)
    ]
    return image_source(prefix, made, list(number), size)


def _validation_labels(path: Path, work: Path) -> list[str]:
    """The synset of each validation image, in the order of their numbers."""
    if not path.is_file():
        raise UserError(f"{path} does not exist; give the devkit, or a list of synsets, with --labels")
    if not path.name.endswith((".tar.gz", ".tgz", ".tar")):
        return path.read_text().split()
    listed = {Path(name).name: span for name, span in contents(path, _alone(path), work).items()}
    try:
        from scipy.io import loadmat  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"{path.name} holds MATLAB's meta.mat: pip install scipy, or give a text file with the synset of each "
            "image a line as --labels"
        ) from error
    try:
        synsets = loadmat(io.BytesIO(listed["meta.mat"].read()), squeeze_me=True)["synsets"]
        wnid = {int(number): str(name) for number, name in zip(synsets["ILSVRC2012_ID"], synsets["WNID"])}
        truth = listed["ILSVRC2012_validation_ground_truth.txt"].read().split()
        return [wnid[int(number)] for number in truth]
    except (KeyError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not the devkit of ILSVRC2012 ({error!r}); fetch it again") from error


def _alone(path: Path) -> Files:
    return {path.name: Span(str(path), 0, path.stat().st_size)}
