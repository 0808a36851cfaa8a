"""Every shard that webdataset reads, we read to the same samples; and it reads what we write."""

import bz2
import gzip
import io
import json
import lzma
import pickle
import tarfile
from pathlib import Path

import chaos_shards
import numpy as np
import pytest
from chaos_shards import FORMATS, add, generator

from dltrain.data.shards import Shards, write_shards

pytestmark = pytest.mark.filterwarnings(  # webdataset leaves its files open
    "ignore::pytest.PytestUnraisableExceptionWarning", "ignore::ResourceWarning"
)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))


def theirs(*paths: Path) -> list[dict]:
    from webdataset.compat import WebDataset

    found = list(WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False))
    return [{name: value for name, value in sample.items() if name != "__local_path__"} for sample in found]


def archive(path: Path, names: list[str], format: str = "pax", folders: tuple[str, ...] = ()) -> Path:
    with tarfile.open(path, "w", format=FORMATS[format]) as tar:
        for name in folders:
            member = tarfile.TarInfo(name)
            member.type = tarfile.DIRTYPE
            tar.addfile(member)
        for name in names:
            add(tar, name, name.encode() * (len(name) % 5))
    return path


CORPUS = {
    "one member a sample": ["a.txt", "b.txt", "c.txt"],
    "several members": ["a.jpg", "a.cls", "a.json", "b.jpg", "b.cls", "b.json"],
    "dots in the extension": ["a.seg.png", "a.png", "b.left.jpg", "b.right.jpg"],
    "a version in the name": ["model.v1.txt", "model.v2.txt"],
    "upper case": ["a.JPG", "a.Txt", "b.TXT", "b.jPg"],
    "folders": ["x/a.txt", "x/b.txt", "y/a.txt", "y/z/a.txt"],
    "a dot in a folder": ["x.y/a.txt", "x.y/a.cls", "v1.0/b.txt"],
    "dot slash": ["./a.txt", "./a.cls", "./b.txt"],
    "no extension": ["README", "a.txt", "Makefile", "b.txt", "dir/LICENSE"],
    "an extension that is empty": ["a.", "b.txt"],
    "hidden files": [".hidden", "a.txt", "x/.hidden", "b.txt"],
    "metadata": ["__meta__.json", "__info__", "__meta__/x.json", "a.txt", "a__b__.txt", "b.__x__"],
    "members that differ": ["a.txt", "b.txt", "b.cls", "c.cls", "d.txt", "d.cls", "d.json"],
    "spaces and signs": ["a b.txt", "c+d=e.txt", "f%20g.txt", "h;i.txt", "j'k.txt"],
    "names that are numbers": ["0.txt", "1.txt", "10.txt", "2.txt"],
    "not sorted": ["c.txt", "a.txt", "b.txt"],
}
LONG = ["k" * 150 + ".txt", "d/" * 70 + "a.txt", "d/" * 70 + "a.cls", "é" * 80 + ".txt", "漢字/仮名.txt", "ü.txt"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("names", CORPUS.values(), ids=CORPUS)
def test_names(tmp_path, names, format):
    path = archive(tmp_path / "x.tar", names, format, ("x", "y/"))
    want = theirs(path)
    assert want and list(Shards(str(path))) == want


@pytest.mark.parametrize("format", ["gnu", "pax"])
def test_long_names_and_other_scripts(tmp_path, format):
    path = archive(tmp_path / "x.tar", LONG, format)
    want = theirs(path)
    assert len(want) == 5 and list(Shards(str(path))) == want


def test_ustar_splits_a_long_name(tmp_path):
    path = archive(tmp_path / "x.tar", ["p" * 90 + "/" + "k" * 90 + ".txt"], "ustar")
    want = theirs(path)
    assert len(want[0]["__key__"]) == 181 and list(Shards(str(path))) == want


def test_random_shards(tmp_path):
    for n in range(60):
        path = tmp_path / f"{n}.tar"
        chaos_shards.clean_shard(generator(8, n), path)
        assert list(Shards(str(path))) == theirs(path), n


def test_links_devices_and_global_headers_are_no_samples(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT, pax_headers={"comment": "x" * 600}) as tar:
        for i, kind in enumerate(
            [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE]
        ):
            add(tar, f"{i}.txt", b"text")
            member = tarfile.TarInfo(f"{i}-other.txt")
            member.type, member.linkname = kind, "0.txt"
            tar.addfile(member)
        member = tarfile.TarInfo("9.txt")
        member.type, member.size = tarfile.CONTTYPE, 3  # contiguous: a regular file to all
        tar.addfile(member, io.BytesIO(b"abc"))
        member = tarfile.TarInfo("99.txt")
        member.type = tarfile.AREGTYPE  # as before POSIX
        tar.addfile(member)
    want = theirs(tmp_path / "x.tar")
    assert len(want) == 7 and list(Shards(str(tmp_path / "x.tar"))) == want


def test_headers_of_other_writers(tmp_path):
    """Times in fractions, owners, and a header before 1988."""
    with tarfile.open(tmp_path / "x.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(3):
            member = tarfile.TarInfo(f"{i}.txt")
            member.size, member.mtime, member.uid, member.uname = 2, 1.5 * i, 1 << 40, "räuber"
            tar.addfile(member, io.BytesIO(b"ab"))
    blob = bytearray((archive(tmp_path / "old.tar", ["a.txt", "b.txt"], "ustar")).read_bytes())
    for at in [at for at in range(0, len(blob), 512) if blob[at + 257 : at + 262] == b"ustar"]:
        blob[at + 257 : at + 512] = bytes(255)
        blob[at + 148 : at + 156] = b" " * 8
        blob[at + 148 : at + 156] = b"%06o\0 " % sum(blob[at : at + 512])
    (tmp_path / "old.tar").write_bytes(blob)
    for name, samples in (("x.tar", 3), ("old.tar", 2)):
        want = theirs(tmp_path / name)
        assert len(want) == samples and list(Shards(str(tmp_path / name))) == want


def test_empty_shards(tmp_path):
    paths = [
        archive(tmp_path / f"{i}.tar", names) for i, names in enumerate([[], ["a.txt"], [], ["README"], ["b.txt"]])
    ]
    want = theirs(*paths)
    assert len(want) == 2 and list(Shards(str(tmp_path))) == want
    assert Shards(str(tmp_path)).counts_S.tolist() == [0, 1, 0, 0, 1]


def compressed(suffix: str, content: bytes) -> bytes:
    if suffix == "zst":
        return pytest.importorskip("zstandard").ZstdCompressor().compress(content)
    return {"gz": gzip, "tgz": gzip, "bz2": bz2, "xz": lzma}[suffix].compress(content)


@pytest.mark.parametrize("suffix", ["gz", "tgz", "bz2", "xz", "zst"])
def test_compressed(tmp_path, suffix):
    plain = archive(tmp_path / "x.tar", CORPUS["several members"] + LONG)
    path = tmp_path / ("x.tgz" if suffix == "tgz" else f"x.tar.{suffix}")
    path.write_bytes(compressed(suffix, plain.read_bytes()))
    want = theirs(plain if suffix == "zst" else path)  # webdataset runs `zstd` for those, where there is one
    ours = list(Shards(str(path)))
    for sample in [*want, *ours]:
        del sample["__url__"]
    assert len(want) == 7 and ours == want


def test_webdataset_decodes_what_we_write(tmp_path):
    from webdataset.compat import WebDataset

    array = np.arange(6, dtype=np.float32).reshape(2, 3)
    samples = [
        {
            "__key__": f"d/{i:03d}",
            "txt": f"ü {i}",
            "cls": i,
            "json": {"i": [i]},
            "npy": array * i,
            "pyd": {i},
            "bin": b"x",
        }
        for i in range(5)
    ]
    paths = write_shards(samples, tmp_path, "x", 2)
    assert theirs(*paths) == list(Shards(str(tmp_path)))
    decoded: list[dict] = list(WebDataset([str(path) for path in paths], shardshuffle=False).decode())  # type: ignore
    assert [sample["__key__"] for sample in decoded] == [sample["__key__"] for sample in samples]
    for got, sample in zip(decoded, samples):
        assert (got["txt"], got["cls"], got["json"], got["bin"]) == (sample["txt"], sample["cls"], sample["json"], b"x")
        assert np.array_equal(got["npy"], sample["npy"]) and got["pyd"] == sample["pyd"]
    first = Shards(str(paths[0]))[1]
    assert json.loads(first["json"]) == {"i": [1]} and pickle.loads(first["pyd"]) == {1} and first["cls"] == b"1"
