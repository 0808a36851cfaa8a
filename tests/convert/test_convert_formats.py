"""Every format that `dltrain shards` reads, from small archives as they are published, and what is broken in them."""

import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import re
import shutil
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from test_convert import class_folders, convert, image, refused

from dltrain.data.shards import Shards
from dltrain.data.tokens import TokenShards, write_tokens
from dltrain.errors import UserError
from dltrain.tokenizers import spm


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))


def converted(kind: str, source: Path, *options: object) -> list[dict]:
    """Every sample, without its url."""
    out = source.parent / f"shards-of-{source.name}"
    convert(kind, source, out, *options)
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    return [{name: value for name, value in sample.items() if name != "__url__"} for sample in Shards(str(out))]


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


def tar_of(files: dict[str, bytes], mode: str = "w") -> bytes:
    with tarfile.open(fileobj=(out := io.BytesIO()), mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out.getvalue()


def zip_of(files: dict[str, bytes], compression: int = zipfile.ZIP_DEFLATED) -> bytes:
    with zipfile.ZipFile(out := io.BytesIO(), "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def zst(data: bytes) -> bytes:
    return pytest.importorskip("zstandard").compress(data)


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


# Images.


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.zip", zip_of),
        ("x.ZIP", lambda files: zip_of(files, zipfile.ZIP_STORED)),
        ("x.tar", tar_of),
        ("x.tar.gz", lambda files: tar_of(files, "w:gz")),
        ("x.tgz", lambda files: tar_of(files, "w:gz")),
        ("x.tar.bz2", lambda files: tar_of(files, "w:bz2")),
        ("x.tar.xz", lambda files: tar_of(files, "w:xz")),
        ("x.tar.zst", lambda files: zst(tar_of(files))),
    ],
)
def test_an_archive_gives_what_its_folder_gives(tmp_path, name, pack: Callable):
    folder = class_folders(tmp_path / "folder", 2, "ab")
    files = {f"./top/{key}": data for key, data in files_below(folder).items()}
    others = {"__MACOSX/top/a/._000.png": b"", "top/.DS_Store": b"", "../top/a/up.png": image(5)}
    (tmp_path / name).write_bytes(pack(files | others))
    got = converted("images", tmp_path / name, "--shuffle", "no")
    plain = converted("images", folder, "--shuffle", "no")
    extra = {"__key__": "top/a/up", "cls": b"0", "png": image(5)}
    assert got == [*({**sample, "__key__": f"top/{sample['__key__']}"} for sample in plain[:2]), extra, *(
        {**sample, "__key__": f"top/{sample['__key__']}"} for sample in plain[2:]
    )]  # fmt: skip


def test_splits_have_the_same_class_numbers(tmp_path):
    class_folders(tmp_path / "s" / "train", 1, "abc")
    class_folders(tmp_path / "s" / "val", 1, "bc")  # no a
    message = refused("images", tmp_path / "s", tmp_path / "out")
    assert "several splits" in message and "--split train, val" in message
    assert [sample["cls"] for sample in converted("images", tmp_path / "s", "--split", "val", "--shuffle", "no")] == [
        b"1",
        b"2",
    ]
    assert {path.name for path in (tmp_path / "shards-of-s").glob("*.tar")} == {"val-000000.tar"}
    # A split on its own counts its own classes, unless it is told those of the training shards.
    classes = tmp_path / "shards-of-s" / "classes.txt"
    assert [s["cls"] for s in converted("images", tmp_path / "s" / "val", "--shuffle", "no")] == [b"0", b"1"]
    shutil.rmtree(tmp_path / "s" / "shards-of-val")
    told = converted("images", tmp_path / "s" / "val", "--shuffle", "no", "--classes", classes)
    assert [s["cls"] for s in told] == [b"1", b"2"]
    classes.write_text("a\nb\n")
    assert "the class c is not one of the 2" in refused(
        "images", tmp_path / "s" / "val", tmp_path / "out", "--classes", classes
    )


def test_kinds_by_content_and_images_without_class(tmp_path):
    (tmp_path / "flat").mkdir()
    kinds = {"a.jpg": "JPEG", "b.JPEG": "PNG", "c.png": "WEBP", "d.ppm": "PPM"}
    for i, (name, kind) in enumerate(kinds.items()):
        (tmp_path / "flat" / name).write_bytes(image(i, kind))
    got = converted("images", tmp_path / "flat", "--shuffle", "no")
    assert [set(sample) - {"__key__"} for sample in got] == [{"jpg"}, {"png"}, {"webp"}, {"ppm"}]
    assert not (tmp_path / "shards-of-flat" / "classes.txt").exists()
    (tmp_path / "flat" / "x").mkdir()
    shutil.copy(tmp_path / "flat" / "a.jpg", tmp_path / "flat" / "x")
    assert "4 images lie beside the class folders, such as a.jpg" in refused(
        "images", tmp_path / "flat", tmp_path / "o"
    )


@pytest.mark.parametrize("size", [0, 4])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_a_broken_image_is_named(tmp_path, kind, size):
    folder = class_folders(tmp_path / "s", 1, "ab")
    whole = image(1, kind, 64)
    for data in (whole[: len(whole) // 2], b"", b"GIF89a" + bytes(50)):
        (folder / "b" / "000.png").write_bytes(data)
        assert "s: b/000.png" in refused("images", folder, tmp_path / "out", "--size", size)
        shutil.rmtree(tmp_path / "out")
    convert("images", folder, tmp_path / "out", "--size", size, "--skip-bad")
    assert len(Shards(str(tmp_path / "out"))) == 1


def test_a_zip_with_a_flipped_bit_is_noticed(tmp_path):
    files = {"a/x.png": image(1), "a/y.png": image(2)}
    damaged = bytearray(zip_of(files, zipfile.ZIP_STORED))
    damaged[damaged.index(image(2)) + 60] ^= 1
    (tmp_path / "x.zip").write_bytes(damaged)
    assert "a/y.png: Bad CRC-32" in refused("images", tmp_path / "x.zip", tmp_path / "out")
    convert("images", tmp_path / "x.zip", tmp_path / "out", "--skip-bad")
    assert [sample["__key__"] for sample in Shards(str(tmp_path / "out"))] == ["a/x"]


@pytest.mark.parametrize("cut", [700, 1536, 2048])
def test_a_truncated_tar_is_noticed(tmp_path, cut):
    data = tar_of({"a/x.png": image(1), "a/y.png": image(2)})
    for name, pack in (("x.tar", bytes), ("x.tar.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(data[:cut]))
        message = refused("images", tmp_path / name, tmp_path / "out")
        assert name in message and ("truncated" in message or "damaged" in message)
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(data)[:-20])
    assert "too early" in refused("images", tmp_path / "x.tar.gz", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_resizing_shrinks_the_shorter_side_and_nothing_grows(tmp_path):
    folder = class_folders(tmp_path / "s", 1, "a")  # 8 x 8
    tall = Image.radial_gradient("L").resize((40, 100)).convert("RGB")
    tall.save(folder / "a" / "tall.png")
    small, large = converted("images", folder, "--size", 20, "--shuffle", "no")
    assert small["png"] == image(0)
    assert pixels(large["jpg"]).shape == (50, 20, 3)
    expected = np.asarray(tall.resize((20, 50), Image.Resampling.BICUBIC), np.int64)
    assert np.abs(pixels(large["jpg"]) - expected).mean() < 2


# MNIST.


def idx(values: np.ndarray) -> bytes:
    return bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes() + values.tobytes()


def test_idx(tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    images = np.random.Generator(np.random.Philox(key=1)).integers(0, 256, (5, 7, 6), np.uint8)
    labels = np.array([3, 0, 1, 2, 3], np.uint8)
    for split, n in (("train", 5), ("t10k", 2)):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(gzip.compress(idx(images[:n])))
        (folder / f"{split}-labels-idx1-ubyte").write_bytes(idx(labels[:n]))
    assert "choose one with --split" in refused("idx", folder, tmp_path / "out")
    assert len(converted("idx", folder, "--split", "test")) == 2
    shutil.rmtree(tmp_path / "shards-of-mnist")
    got = converted("idx", folder, "--split", "train", "--shuffle", "no")
    assert [sample["cls"] for sample in got] == [b"3", b"0", b"1", b"2", b"3"]
    assert (np.array([pixels(sample["png"]) for sample in got]) == images).all()
    for name, data, words in (
        ("labels-idx1-ubyte", idx(labels[:4]), "5 images and .* 4 labels"),
        ("labels-idx1-ubyte", idx(labels)[:-1], "bytes, not those of the shape"),
        ("labels-idx1-ubyte", b"\0\0", "no idx file"),
        ("images-idx3-ubyte.gz", gzip.compress(idx(images))[:-3], "too early"),
    ):
        other = tmp_path / "broken"
        shutil.copytree(folder, other)
        (other / f"train-{name}").write_bytes(data)
        assert re.search(words, refused("idx", other, tmp_path / "out", "--split", "train"))
        shutil.rmtree(other)


# CIFAR-10.


def cifar_batches() -> dict[str, tuple[np.ndarray, list[int]]]:
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    random = np.random.Generator(np.random.Philox(key=2))
    return {name: (random.integers(0, 256, (3, 3072), np.uint8), [i, 9 - i, 4]) for i, name in enumerate(names)}


@pytest.mark.parametrize("form", ["python", "binary"])
def test_cifar10_as_published(tmp_path, form):
    batches = cifar_batches()
    if form == "python":
        # Protocol 2 and bytes as keys, as Python 2 wrote it.
        files = {
            f"cifar-10-batches-py/{name}": pickle.dumps({b"labels": y, b"data": x}, protocol=2)
            for name, (x, y) in batches.items()
        }
    else:
        files = {
            f"cifar-10-batches-bin/{name}.bin": b"".join(bytes([c]) + row.tobytes() for c, row in zip(y, x))
            for name, (x, y) in batches.items()
        }
    source = tmp_path / f"cifar-10-{form}.tar.gz"
    source.write_bytes(tar_of(files, "w:gz"))
    assert "train and test; choose one" in refused("cifar10", source, tmp_path / "out")
    got = converted("cifar10", source, "--split", "train", "--shuffle", "no")
    assert [int(sample["cls"]) for sample in got] == [c for i in range(5) for c in (i, 9 - i, 4)]
    x = batches["data_batch_2"][0][1].reshape(3, 32, 32)
    assert (pixels(got[4]["png"]).transpose(2, 0, 1) == x).all() and got[4]["__key__"] == "data_batch_2/00001"
    assert (tmp_path / f"shards-of-{source.name}" / "classes.txt").read_text().split()[3] == "cat"
    folder = tmp_path / "unpacked"
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    assert [s["png"] for s in converted("cifar10", folder, "--split", "train", "--shuffle", "no")] == [
        s["png"] for s in got
    ]
    (folder / next(iter(files))).write_bytes(next(iter(files.values()))[:-5])
    assert "data_batch_1" in refused("cifar10", folder, tmp_path / "out", "--split", "train")


def test_a_pickle_that_would_run_something_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "evil"),)

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "test_batch").write_bytes(pickle.dumps({b"labels": [1], b"data": Evil()}, protocol=2))
    assert "asks for posix.mkdir" in refused("cifar10", tmp_path / "c", tmp_path / "out", "--split", "test")
    assert not (tmp_path / "evil").exists()


# ImageNet.

WNIDS = ("n02000002", "n01000001", "n03000003")


def imagenet(folder: Path) -> Path:
    folder.mkdir()
    inner = {
        f"{wnid}.tar": tar_of({f"{wnid}_{i}.JPEG": image(10 * c + i, "JPEG") for i in range(2)})
        for c, wnid in enumerate(WNIDS)
    }
    (folder / "ILSVRC2012_img_train.tar").write_bytes(tar_of(inner))
    images = {f"ILSVRC2012_val_{i:08d}.JPEG": image(50 + i, "JPEG") for i in (3, 1, 2, 4)}
    (folder / "ILSVRC2012_img_val.tar").write_bytes(tar_of(images))
    return folder


def test_imagenet_train(tmp_path):
    folder = imagenet(tmp_path / "imagenet")
    expected = [("n01000001", b"0", 10), ("n02000002", b"1", 0), ("n03000003", b"2", 20)]
    for source in (folder / "ILSVRC2012_img_train.tar", folder):
        got = converted("imagenet", source, "--shuffle", "no", "--split", "train")
        assert got == [
            {"__key__": f"{wnid}/{wnid}_{i}", "cls": cls, "jpg": image(first + i, "JPEG")}
            for wnid, cls, first in expected
            for i in range(2)
        ]
    assert "--split train or --split val" in refused("imagenet", folder, tmp_path / "out")
    broken = tmp_path / "broken.tar"
    data = (folder / "ILSVRC2012_img_train.tar").read_bytes()
    at = data.index(b"n01000001_1.JPEG")
    broken.write_bytes(data[:at] + b"?" + data[at + 1 :])  # a header inside an inner tar
    assert "broken.tar, n01000001.tar: damaged" in refused("imagenet", broken, tmp_path / "out")


def test_imagenet_val_with_a_list_of_synsets(tmp_path):
    folder = imagenet(tmp_path / "imagenet")
    labels = tmp_path / "labels.txt"
    labels.write_text("\n".join([WNIDS[2], WNIDS[0], WNIDS[1], WNIDS[0]]))
    got = converted("imagenet", folder, "--split", "val", "--labels", labels, "--shuffle", "no")
    assert [(s["__key__"], s["cls"]) for s in got] == [
        (f"ILSVRC2012_val_{i:08d}", cls) for i, cls in ((1, b"2"), (2, b"1"), (3, b"0"), (4, b"1"))
    ]
    assert [s["jpg"] for s in got] == [image(50 + i, "JPEG") for i in (1, 2, 3, 4)]
    labels.write_text(WNIDS[0])
    out = tmp_path / "out"
    assert "4 images, and there are 1 labels" in refused("imagenet", folder, out, "--split", "val", "--labels", labels)
    assert "devkit_t12.tar.gz does not exist" in refused("imagenet", folder, out, "--split", "val")


def test_imagenet_val_with_the_devkit(tmp_path):
    scipy_io = pytest.importorskip("scipy.io")
    folder = imagenet(tmp_path / "imagenet")
    synsets = np.array(
        [(i + 1, wnid) for i, wnid in enumerate([*WNIDS, "n04000004"])], [("ILSVRC2012_ID", "O"), ("WNID", "O")]
    )
    scipy_io.savemat(mat := io.BytesIO(), {"synsets": synsets})
    files = {"meta.mat": mat.getvalue(), "ILSVRC2012_validation_ground_truth.txt": b"3\n1\n2\n1\n"}
    files = {f"ILSVRC2012_devkit_t12/data/{name}": data for name, data in files.items()}
    (folder / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(tar_of(files, "w:gz"))
    got = converted("imagenet", folder, "--split", "val", "--shuffle", "no")
    assert [s["cls"] for s in got] == [b"2", b"1", b"0", b"1"]


# Text.


def test_text_per_file_line_and_paragraph(tmp_path):
    folder = tmp_path / "text"
    (folder / "a").mkdir(parents=True)
    (folder / "a" / "one.v2.txt").write_text(" \n\nfirst é\r\n second\n \t\nthird\n\n\nfourth")
    (folder / "two.txt.gz").write_bytes(gzip.compress(b"fifth\n"))
    (folder / "empty.txt").write_bytes(b"")
    (folder / "x.csv").write_bytes(b"")

    def got(*options: str) -> list[tuple[str, str]]:
        found = [(s["__key__"], s["txt"].decode()) for s in converted("text", folder, *options)]
        shutil.rmtree(tmp_path / "shards-of-text")
        return found

    assert got() == [("a/one_v2", (folder / "a" / "one.v2.txt").read_bytes().decode()), ("two", "fifth\n")]
    assert got("--per-line") == [
        ("a/one_v2/00000003", "first é"),
        ("a/one_v2/00000004", " second"),
        ("a/one_v2/00000006", "third"),
        ("a/one_v2/00000009", "fourth"),
        ("two/00000001", "fifth"),
    ]
    assert got("--per-paragraph") == [
        ("a/one_v2/00000003", "first é\r\n second"),
        ("a/one_v2/00000006", "third"),
        ("a/one_v2/00000009", "fourth"),
        ("two/00000001", "fifth"),
    ]
    (folder / "two.txt.gz").write_bytes(gzip.compress(b"fifth\n\xff"))
    assert "two.txt.gz, line 2: it is not UTF-8 at byte 0" in refused("text", folder, tmp_path / "out", "--per-line")


def test_tokens_instead_of_text(tmp_path):
    texts = ["alpha beta gamma " * 5, "beta gamma delta", "gamma alpha " * 3]
    source, model = tmp_path / "x.jsonl", tmp_path / "a.model"
    tokenizer = spm.train(texts, model, vocab=25, kind="bpe")
    source.write_text("not JSON\n" + "\n".join(json.dumps({"text": text}) for text in texts))
    convert("jsonl", source, tmp_path / "out", "--tokenizer", model, "--samples-per-shard", 2, "--skip-bad")
    shards = Shards(str(tmp_path / "out"))
    tokens = TokenShards(shards, tokenizer)
    assert list(shards.counts_S) == [1, 2] and tokens.lengths().tolist() == [len(e) for e in tokenizer.encode(texts)]
    documents = [(shards.key(i), text) for i, text in enumerate(texts)]
    ours = [shards[i] for i in (1, 2)]
    write_tokens(documents[1:], tokenizer, tmp_path / "theirs", "t")
    assert [{**s, "__url__": ""} for s in Shards(str(tmp_path / "theirs"))] == [{**s, "__url__": ""} for s in ours]
    other = spm.train(texts[1:], tmp_path / "b.model", vocab=20, kind="bpe")
    with pytest.raises(UserError, match="tokenised by"):
        TokenShards(shards, other)
    assert "made with another tokenizer" in refused(
        "jsonl", source, tmp_path / "out", "--tokenizer", tmp_path / "b.model", "--samples-per-shard", 2
    )
    assert "none.model" in refused("text", source, tmp_path / "none", "--tokenizer", tmp_path / "none.model")


@pytest.mark.parametrize("block", [1, 7, 1000])
def test_lines_across_blocks(tmp_path, monkeypatch, block):
    from dltrain.convert import text as convert_text

    monkeypatch.setattr(convert_text, "BLOCK", block)
    lines = ["", "a", "bb" * 20, "  ", "c", "", "", "d\r"]
    (tmp_path / "x.txt").write_text("\n".join(lines))
    got = converted("text", tmp_path / "x.txt", "--per-line")
    assert [(int(s["__key__"].split("/")[1]), s["txt"].decode()) for s in got] == [
        (i + 1, line.rstrip("\r")) for i, line in enumerate(lines) if line.strip()
    ]


@pytest.mark.parametrize(
    ("name", "pack"),
    [
        ("x.jsonl", bytes),
        ("x.jsonl.gz", gzip.compress),
        ("x.jsonl.bz2", bz2.compress),
        ("x.jsonl.xz", lzma.compress),
        ("x.jsonl.zst", zst),
        ("x.zip", lambda data: zip_of({"in/x.jsonl": data})),
        ("x.tar", lambda data: tar_of({"in/x.jsonl.gz": gzip.compress(data)})),
    ],
)
def test_jsonl(tmp_path, name, pack: Callable):
    rows = [{"id": f"k.{i}", "body": f"text {i} é"} for i in range(5)]
    data = ("\n".join(json.dumps(row) for row in rows[:3]) + "\n\n").encode()
    data2 = "\n".join(json.dumps(row) for row in rows[3:]).encode()
    packed = pack(data) + pack(data2) if name.endswith((".gz", ".bz2", ".xz", ".zst")) else pack(data + data2)
    (tmp_path / name).write_bytes(packed)  # compressed files may be written one after the other
    got = converted("jsonl", tmp_path / name, "--field", "body", "--key", "id")
    assert got == [{"__key__": f"k_{i}", "txt": f"text {i} é".encode()} for i in range(5)]
    shutil.rmtree(tmp_path / f"shards-of-{name}")
    got = converted("jsonl", tmp_path / name, "--field", "body")
    assert [s["__key__"].split("/")[-1] for s in got] == [f"{i:08d}" for i in (1, 2, 3, 5, 6)]


def test_a_bad_line_of_json_is_named_and_can_be_skipped(tmp_path):
    source = tmp_path / "x.jsonl"
    bad = ['{"text": "cut', '{"other": 1}', '{"text": 3}', "[1]", '{"text": "no key"}']
    for line in bad:
        source.write_text('{"text": "a", "id": 1}\n' + line + '\n{"text": "b", "id": 2}\n')
        assert "x.jsonl, line 2: " in refused("jsonl", source, tmp_path / "out", "--key", "id")
        shutil.rmtree(tmp_path / "out")
    got = converted("jsonl", source, "--key", "id", "--skip-bad")
    assert [(s["__key__"], s["txt"]) for s in got] == [("1", b"a"), ("2", b"b")]
    source.write_text('{"text": "a", "id": 1}\n{"text": "b", "id": 1}\n')
    assert "'1'" in refused("jsonl", source, tmp_path / "out", "--key", "id")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet  # type: ignore[import-not-found]

    (tmp_path / "p").mkdir()
    table = pyarrow.table(
        {
            "text": [f"é{i}" for i in range(5)],
            "image": [{"bytes": image(i), "path": "x"} for i in range(5)],
            "label": [4, 3, 2, 1, None],
            "tags": [["a", "b"]] * 5,
        }
    )
    parquet.write_table(table, tmp_path / "p" / "part-0.parquet", row_group_size=2)
    parquet.write_table(table.slice(0, 1), tmp_path / "p" / "part-1.parquet")
    assert [s["txt"].decode() for s in converted("parquet", tmp_path / "p")] == [f"é{i}" for i in (0, 1, 2, 3, 4, 0)]
    shutil.rmtree(tmp_path / "shards-of-p")
    columns = "image.bytes=png,label=cls,tags=json"
    message = refused("parquet", tmp_path / "p", tmp_path / "out", "--columns", columns)
    assert "part-0.parquet, row group 2, row 0: label is null" in message
    got = converted("parquet", tmp_path / "p", "--columns", columns, "--skip-bad")
    assert [(s["__key__"], s["cls"], s["json"]) for s in got] == [
        ("part-0/00000/000000", b"4", b'["a", "b"]'),
        ("part-0/00000/000001", b"3", b'["a", "b"]'),
        ("part-0/00001/000000", b"2", b'["a", "b"]'),
        ("part-0/00001/000001", b"1", b'["a", "b"]'),
        ("part-1/00000/000000", b"4", b'["a", "b"]'),
    ]
    assert got[1]["png"] == image(1)
    for columns, words in (("body=txt", "no column body, only"), ("text", "give COLUMN=EXTENSION")):
        assert words in refused("parquet", tmp_path / "p", tmp_path / "none", "--columns", columns)
    (tmp_path / "p" / "part-1.parquet").write_bytes(b"PAR1 torn")
    assert "part-1.parquet: not a Parquet file" in refused("parquet", tmp_path / "p", tmp_path / "none")


# Real data.


@pytest.fixture
def data() -> Path:
    folder = Path(os.environ.get("DLTRAIN_DATA", ""))
    if not (folder / "mnist").is_dir():
        pytest.skip("DLTRAIN_DATA names no folder with mnist")
    return folder


def test_real_mnist_and_text(data, tmp_path):
    convert("idx", data / "mnist", tmp_path / "mnist", "--split", "t10k")
    labels = np.bincount([int(sample["cls"]) for sample in Shards(str(tmp_path / "mnist"))])
    assert labels.tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]  # of the published test set
    convert("jsonl", data / "gutenberg-en" / "valid.jsonl.gz", tmp_path / "books", "--key", "id")
    with gzip.open(data / "gutenberg-en" / "valid.jsonl.gz", "rt") as file:
        books = {row["id"]: row["text"] for row in map(json.loads, file)}
    assert {s["__key__"]: s["txt"].decode() for s in Shards(str(tmp_path / "books"))} == books
    convert("text", data / "wikitext-2" / "valid.txt", tmp_path / "wiki", "--per-paragraph")
    lines = [line.rstrip("\n") for line in (data / "wikitext-2" / "valid.txt").read_text().split("\n") if line.strip()]
    assert "\n".join(s["txt"].decode() for s in Shards(str(tmp_path / "wiki"))).split("\n") == lines
