"""Shards: webdataset reads what we write, we read what others write, and every damage is named."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest

from dltrain.data import shards as shards_module
from dltrain.data.order import split
from dltrain.data.shards import Shards, write_shards
from dltrain.data.urls import expand
from dltrain.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))


def samples(n: int, start: int = 0):
    return [
        {"__key__": f"s/{i:05d}", "txt": f"text {i} " * (i % 7), "cls": i % 10, "seg.png": bytes([i % 256]) * i}
        for i in range(start, start + n)
    ]


def tar(path: Path, names: list[str], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(name.encode())
            archive.addfile(member, io.BytesIO(name.encode()))
    return path


def test_round_trip_bytes_and_pickle(tmp_path):
    paths = write_shards(samples(25), tmp_path / "a", "x", 10)
    assert [path.name for path in paths] == ["x-000000.tar", "x-000001.tar", "x-000002.tar"]
    again = write_shards(samples(25), tmp_path / "b", "x", 10)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in again]
    shards = Shards(str(tmp_path / "a"))
    assert len(shards) == 25
    want = {"__key__": "s/00013", "__url__": str(paths[1]), "txt": b"text 13 " * 6, "cls": b"3"}
    assert shards[13] == want | {"seg.png": bytes([13]) * 13}
    copy = pickle.loads(pickle.dumps(shards))
    assert [copy[i] for i in range(25)] == [shards[i] for i in range(25)]
    assert shards.fingerprint == Shards(str(tmp_path / "b" / "x-00000{0..2}.tar")).fingerprint
    assert shards.fingerprint != Shards(str(tmp_path / "b" / "x-00000{0..1}.tar")).fingerprint
    with pytest.raises(IndexError):
        shards[25]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_reads_ours(tmp_path):
    from webdataset.compat import WebDataset

    paths = write_shards(samples(12), tmp_path, "x", 5)
    theirs = list(WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False))
    ours = Shards(str(tmp_path))
    assert [{k: v for k, v in sample.items() if k != "__local_path__"} for sample in theirs] == list(ours)


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_reads_what_tarfile_writes(tmp_path, format):
    long = "" if format == tarfile.USTAR_FORMAT else "d" * 90 + "/" + "é" * 120 + "/" + "k" * 150
    names = ["a.JPG", "a.txt", "b.txt", "__meta__/c.json", "no_extension"] + ([f"{long}.txt"] if long else [])
    shards = Shards(str(tar(tmp_path / "x.tar", names, format)))
    url = {"__url__": shards.urls[0]}
    assert [shards[i] for i in range(2)] == [
        {"__key__": "a", "jpg": b"a.JPG", "txt": b"a.txt"} | url,
        {"__key__": "b", "txt": b"b.txt"} | url,
    ]
    if long:
        assert shards[2] == {"__key__": long, "txt": f"{long}.txt".encode()} | url
    assert len(shards) == 2 + bool(long)


def test_extensions_of_any_letters(tmp_path):
    """Names of members become part of a compiled loop."""
    odd = ["x{0}", "it's", 'a"b', "b\\n", "{bounds}", "é"]
    tar(tmp_path / "x.tar", [f"{key}.{extension}" for key in "ab" for extension in odd])
    shards = Shards(str(tmp_path / "x.tar"))
    want = [{extension: f"{key}.{extension}".encode() for extension in odd} for key in "ab"]
    for found in (list(shards), shards.read(np.array([1, 0]))[::-1]):
        assert [{k: v for k, v in sample.items() if k[:2] != "__"} for sample in found] == want


def test_many_shards_with_few_descriptors(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN", 2)
    write_shards(samples(6), tmp_path, "x", 1)
    shards = Shards(str(tmp_path))
    assert [shards[i]["__key__"] for i in (0, 1, 2, 3, 4, 5, 0, 3)] == [f"s/{i:05d}" for i in (0, 1, 2, 3, 4, 5, 0, 3)]
    assert len(shards._open) == 2


def test_a_shard_that_is_still_read_outlives_its_place_among_the_open(tmp_path, monkeypatch):
    monkeypatch.setattr(shards_module, "OPEN", 2)
    write_shards(samples(9), tmp_path, "x", 3)
    shards = Shards(str(tmp_path))
    want = [shards[i] for i in range(9)]  # leaves the last two open
    assert shards.read(np.array([3, 0, 4])) == [want[i] for i in (3, 0, 4)]  # opening the first pushes the second out
    begun = iter(shards)
    first = next(begun)
    shards.read(np.array([8, 5])), shards.read(np.array([7, 4]))
    assert [first, *begun] == want


def test_empty_and_uneven_shards(tmp_path):
    tar(tmp_path / "0.tar", [])
    write_shards(samples(3), tmp_path, "1", 3)
    tar(tmp_path / "2.tar", [])
    write_shards(samples(1, 3), tmp_path, "3", 3)
    assert list(Shards(str(tmp_path)).keys()) == [f"s/{i:05d}" for i in range(4)]
    assert len(Shards(str(tmp_path / "0.tar"))) == 0


def test_expand(tmp_path):
    for name in ("a-0", "a-1", "b"):
        tar(tmp_path / f"{name}.tar", [])
    a0, a1, b = (str(tmp_path / f"{name}.tar") for name in ("a-0", "a-1", "b"))
    assert expand(f"{tmp_path}/a-{{0..1}}.tar") == [a0, a1]
    assert expand(f"{b},{tmp_path}/a-{{0..1}}.tar") == [b, a0, a1]
    assert expand(f"{tmp_path}/a-{{1,0}}.tar") == [a1, a0]
    odd = tar(tmp_path / "c,{1}[2].tar", [])
    assert expand(str(odd)) == [str(odd)]
    odd.unlink()
    assert expand([b, f"{tmp_path}/a-*.tar"]) == [b, a0, a1]
    assert expand(f"{tmp_path}/*.tar") == expand(str(tmp_path)) == [a0, a1, b]
    (tmp_path / "none").mkdir()
    for pattern, word in (
        ("", "names no file"),
        (f"{tmp_path}/a-{{0..2}}.tar", "a-2.tar does not exist"),
        (f"{tmp_path}/z*.tar", "z*.tar matches nothing"),
        (f"{tmp_path}/none", "holds no .tar"),
        (f"{tmp_path}/a-{{0..1.tar", "close every brace"),
        (f"{a0},{tmp_path}/a*.tar", "twice"),
    ):
        with pytest.raises(UserError) as error:
            expand(pattern)
        assert word in str(error.value) and repr(pattern) in str(error.value) and "\n" not in str(error.value)


def test_an_index_that_is_torn_is_made_again(tmp_path):
    (path,) = write_shards(samples(4), tmp_path, "x", 9)
    first = Shards(str(path)).fingerprint
    index = path.with_name("x-000000.tar.idx")
    made = index.read_bytes()
    for torn in (made[: len(made) // 2], made[:-1] + b"?", b"", b"dltidx01" + made[8:]):
        index.write_bytes(torn)
        assert Shards(str(path)).fingerprint == first and index.read_bytes() == made


def test_an_index_is_believed_and_a_shard_that_has_changed_is_not(tmp_path):
    (path,) = write_shards(samples(4), tmp_path, "x", 9)
    first = Shards(str(path)).fingerprint
    os.utime(path, ns=(0, 0))  # touched, or copied
    assert Shards(str(path)).fingerprint == first
    write_shards(samples(5), tmp_path / "other", "x", 9)[0].rename(path)
    with pytest.raises(UserError, match=r"x-000000.tar: .*delete x-000000.tar.idx"):
        Shards(str(path))
    path.with_name("x-000000.tar.idx").unlink()
    assert len(Shards(str(path))) == 5


def test_index_goes_to_the_cache_where_the_folder_is_read_only(tmp_path):
    path = tar(tmp_path / "x.tar", ["a.txt"])
    path.with_name("x.tar.idx").mkdir()  # no file can be put there, even by root
    assert len(Shards(str(path))) == 1
    (cached,) = (tmp_path / "cache" / "index").iterdir()
    written = cached.stat().st_mtime_ns
    assert len(Shards(str(path))) == 1 and cached.stat().st_mtime_ns == written


def damaged(path: Path, edit) -> UserError:
    blob = bytearray(path.read_bytes())
    edit(blob)
    path.write_bytes(blob)
    path.with_name(path.name + ".idx").unlink()
    with pytest.raises(UserError) as error:
        Shards(str(path))
    assert path.name in str(error.value) and "\n" not in str(error.value)
    return error.value


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda blob: blob.__setitem__(1536 + 3, blob[1536 + 3] ^ 4),
            "byte 1536: damaged tar header",
        ),  # the second sample's
        (lambda blob: blob.__setitem__(3, blob[3] ^ 4), "byte 0: damaged tar header"),
        (lambda blob: blob.__setitem__(slice(1536, 2048), bytes(512)), "byte 1536: damaged tar header"),
        (lambda blob: blob.__delitem__(slice(2048 + 100, None)), "truncated"),
        (lambda blob: blob.__delitem__(slice(1536, None)), "byte 1536: truncated"),  # at a member's border
        (lambda blob: blob.clear(), "empty file"),
        (lambda blob: blob.__setitem__(slice(None), b"not a tar" * 300), "not an uncompressed tar"),
    ],
    ids=["header", "first header", "hole", "truncated", "truncated at a border", "empty", "not a tar"],
)
def test_damage_is_named(tmp_path, edit, words):
    (path,) = write_shards([{"__key__": f"k{i}", "txt": bytes([65 + i]) * 600} for i in range(5)], tmp_path, "x", 9)
    assert words in str(damaged(path, edit))


def test_split_and_duplicate_samples_are_refused(tmp_path):
    for name, names, words in (
        ("split", ["a.txt", "b.txt", "a.cls"], "sample 'a', byte 0: the key occurs twice"),
        ("duplicate", ["a.txt", "a.TXT"], "two .txt"),
        ("outside", ["a.txt", "../b.txt"], "leaves the folder"),
        ("root", ["a.txt", "/b.txt"], "leaves the folder"),
    ):
        with pytest.raises(UserError, match=words):
            Shards(str(tar(tmp_path / f"{name}.tar", names)))
    for key in ("a.b/dot.ted", ""):
        with pytest.raises(UserError, match="sample key"):
            write_shards([{"__key__": key, "txt": "x"}], tmp_path, "y", 9)
    with pytest.raises(UserError, match=r"two .txt"):
        write_shards([{"__key__": "a", "txt": "x"}] * 2, tmp_path, "y", 9)
    assert not [path for path in tmp_path.iterdir() if "y-" in path.name]


def test_every_flipped_bit_of_a_payload_is_caught(tmp_path):
    (path,) = write_shards(samples(20), tmp_path, "x", 20)
    whole, stat = path.read_bytes(), path.stat()
    offset = whole.index(bytes([19]) * 19) + 7
    flipped = bytearray(whole)
    flipped[offset] ^= 1
    path.write_bytes(flipped)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a failing disk does it: nothing else changes
    shards = Shards(str(path))
    assert shards[18]["seg.png"] == bytes([18]) * 18
    with pytest.raises(UserError, match=f"'s/00019', byte {offset - 7}: payload of .seg.png") as error:
        shards[19]
    assert str(path) in str(error.value)


def test_a_shard_that_shrinks_or_goes_while_in_use(tmp_path):
    (path,) = write_shards(samples(20), tmp_path, "x", 20)
    shards, late = Shards(str(path)), Shards(str(path))
    shards[0]
    os.truncate(path, 1024)
    with pytest.raises(UserError, match=r"x-000000.tar: sample 's/00019'"):
        shards[19]
    path.unlink()
    with pytest.raises(UserError, match="restore the shard"):
        late[0]


def test_split_depends_on_keys_alone(tmp_path):
    write_shards(samples(200), tmp_path / "a", "x", 50)
    write_shards(reversed(samples(200)), tmp_path / "b", "x", 30)
    held = []
    for folder in "ab":
        shards = Shards(str(tmp_path / folder))
        keys = list(shards.keys())
        training, out = split(shards.key_hashes(), 0.1)
        assert sorted([*training, *out]) == list(range(200)) and 8 <= len(out) <= 35
        held.append({keys[i] for i in out})
    assert held[0] == held[1]
    for n in (2, 3):
        training, out = split(shards.key_hashes()[:n], 0.01)
        assert len(out) == 1 and len(training) == n - 1
    with pytest.raises(UserError, match="at least 2"):
        split(shards.key_hashes()[:1])


def test_what_could_not_be_indexed_is_told_when_it_is_left_out(tmp_path, capsys):
    path = tar(tmp_path / "x.tar", [f"{letter}.txt" for letter in "abcdef"])
    blob = bytearray(path.read_bytes())
    blob[1024 + 3] ^= 4  # the header of b
    path.write_bytes(blob)
    shards = Shards(str(path), on_error="skip")
    assert [sample["__key__"] for sample in shards] == list("acdef")
    assert capsys.readouterr().err.count("byte 1024: damaged tar header") == 1
