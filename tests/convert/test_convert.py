"""`dltrain shards`: whatever happens, a folder has all shards or none, and their bytes are always the same."""

import io
import json
import os
import resource
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dltrain.commands.shards import main
from dltrain.convert.engine import WORK, cuts, keys
from dltrain.data.shards import Shards
from dltrain.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))


def image(i: int, kind: str = "PNG", side: int = 8) -> bytes:
    pixels = np.random.Generator(np.random.Philox(key=i)).integers(0, 256, (side, side, 3), np.uint8)
    Image.fromarray(pixels).save(out := io.BytesIO(), kind)
    return out.getvalue()


def class_folders(folder: Path, per_class: int = 10, classes: str = "abc") -> Path:
    for c, name in enumerate(classes):
        (folder / name).mkdir(parents=True)
        for i in range(per_class):
            (folder / name / f"{i:03d}.png").write_bytes(image(100 * c + i))
    return folder


def convert(*args: object) -> None:
    main([*map(str, args), *([] if "--workers" in args else ["--workers", "1"])])


def content(folder: Path) -> dict[str, bytes]:
    """All but the indexes, which hold the time of their shard."""
    return {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.suffix != ".idx"}


def refused(*args: object) -> str:
    with pytest.raises(UserError) as error:
        convert(*args)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_image_once_in_shuffled_shards_with_a_description(tmp_path, capsys):
    source = class_folders(tmp_path / "source")
    (source / "a" / "notes.md").write_text("no image")
    convert("images", source, tmp_path / "out", "--samples-per-shard", 7)
    shards = Shards(str(tmp_path / "out"))
    found = {shards[i]["__key__"]: (shards[i]["png"], shards[i]["cls"]) for i in range(len(shards))}
    assert found == {
        f"{name}/{i:03d}": (image(100 * c + i), str(c).encode()) for c, name in enumerate("abc") for i in range(10)
    }
    of_shards = np.split([int(sample["cls"]) for sample in shards], [7, 14, 21, 28])[:4]
    assert min(len(set(classes)) for classes in of_shards) >= 2  # not sorted by class
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    tars = [f"images-{i:06d}.tar" for i in range(5)]
    assert names == sorted(["classes.txt", "dltrain-shards.json", *tars, *(f"{tar}.idx" for tar in tars)])
    assert (tmp_path / "out" / "classes.txt").read_text() == "a\nb\nc\n"
    said = json.loads((tmp_path / "out" / "dltrain-shards.json").read_text())
    assert (said["samples"], said["shards"], said["ignored"], said["classes"]) == (30, 5, 1, ["a", "b", "c"])
    assert (said["source"]["name"], said["source"]["files"]) == ("source", 31)
    assert str(tmp_path) not in json.dumps(said)
    assert "30 samples, 5 shards, 3 classes\nleft out as of other kinds: 1" in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_webdataset_reads_and_decodes_it(tmp_path):
    from webdataset.compat import WebDataset

    convert("images", class_folders(tmp_path / "source", 2), tmp_path / "out", "--shuffle", "no")
    (path,) = (tmp_path / "out").glob("*.tar")
    stages: Any = WebDataset([str(path)], shardshuffle=False, empty_check=False).decode("rgb8").to_tuple("png", "cls")
    theirs = list(stages)
    assert [label for _, label in theirs] == [0, 0, 1, 1, 2, 2]
    expected = np.asarray(Image.open(io.BytesIO(image(101))))
    assert (theirs[3][0] == expected).all()


def test_a_killed_conversion_goes_on_and_processes_do_not_change_the_bytes(tmp_path):
    source, out = class_folders(tmp_path / "source", 60), tmp_path / "out"
    arguments = ["images", str(source), str(out), "--samples-per-shard", "3"]
    convert("images", source, tmp_path / "whole", "--samples-per-shard", 3)
    code = f"from dltrain.commands.shards import main; main({[*arguments, '--workers', '2']!r})"
    process = subprocess.Popen([sys.executable, "-c", code], start_new_session=True)
    try:
        deadline = time.monotonic() + 100
        while len(list((out / WORK).glob("images-*.json"))) < 4:
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.002)
    finally:
        process.kill()
        process.wait()
    assert not list(out.glob("*.tar"))
    deadline = time.monotonic() + 20
    while subprocess.run(["pgrep", "-s", str(process.pid)], capture_output=True).returncode == 0:  # its workers end too
        assert time.monotonic() < deadline
        time.sleep(0.05)
    finished = {path.stem: path.with_suffix(".tar").stat().st_ino for path in (out / WORK).glob("images-*.json")}
    assert 4 <= len(finished) < 60
    convert(*arguments)
    assert content(out) == content(tmp_path / "whole")
    assert {name: (out / f"{name}.tar").stat().st_ino for name in finished} == finished  # kept, not made again


def test_what_is_done_is_not_done_again_and_other_options_are_refused(tmp_path):
    source, out = class_folders(tmp_path / "source"), tmp_path / "out"
    convert("images", source, out)
    before = {path: path.stat().st_ino for path in out.iterdir()}
    convert("images", source, out, "--workers", "2", "--skip-bad")
    assert {path: path.stat().st_ino for path in out.iterdir()} == before
    assert "made with another shuffle (0, now 1); choose another folder, or pass --overwrite" in refused(
        "images", source, out, "--shuffle", 1
    )
    assert "another size (0, now 4)" in refused("images", source, out, "--size", 4)
    assert "another format (images, now cifar10)" in refused("cifar10", source, out)
    (source / "a" / "new.png").write_bytes(image(1))
    assert "another source (or source has changed)" in refused("images", source, out)
    assert {path: path.stat().st_ino for path in out.iterdir()} == before
    convert("images", source, out, "--overwrite", "--samples-per-shard", 31)
    assert len(Shards(str(out))) == 31 and not (out / WORK).exists()
    convert(
        "text", class_folders(tmp_path / "source2") / "a" / "000.png", tmp_path / "bad", "--overwrite", "--skip-bad"
    )
    convert("images", source, tmp_path / "bad", "--overwrite", "--samples-per-shard", 20)
    convert("images", source, tmp_path / "good", "--samples-per-shard", 20)
    assert content(tmp_path / "bad") == content(tmp_path / "good")


def test_a_conversion_under_way_is_not_mixed_with_another(tmp_path):
    source, out = class_folders(tmp_path / "source"), tmp_path / "out"
    (source / "b" / "009.png").write_bytes(b"broken")
    message = refused("images", source, out, "--samples-per-shard", 10, "--shuffle", "no", "--workers", 2)
    assert "source: b/009.png" in message and "--skip-bad" in message
    assert [path.name for path in out.iterdir()] == [WORK]  # no shard is seen
    assert "samples_per_shard (10, now 9)" in refused(
        "images", source, out, "--samples-per-shard", 9, "--shuffle", "no"
    )
    kept = (out / WORK / "images-000000.tar").stat().st_ino
    convert("images", source, out, "--samples-per-shard", 10, "--shuffle", "no", "--skip-bad")
    assert (out / "images-000000.tar").stat().st_ino == kept
    assert list(Shards(str(out)).counts_S) == [10, 9, 10]
    said = json.loads((out / "dltrain-shards.json").read_text())
    assert said["samples"] == 29 and len(said["skipped"]) == 1 and "b/009.png" in said["skipped"][0]


@pytest.mark.parametrize("moves", [0, 3, 4])
def test_killed_while_shards_are_put_in_place_of_others(tmp_path, monkeypatch, moves):
    source, out = class_folders(tmp_path / "source"), tmp_path / "out"
    new = ("--samples-per-shard", 9, "--size", 5, "--overwrite")
    convert("images", source, tmp_path / "whole", *new)
    convert("images", source, out, "--samples-per-shard", 4)
    left = [moves]

    def move(path: Path, target: Path) -> None:
        if not left[0]:
            raise KeyboardInterrupt
        left[0] -= 1
        replace(path, target)

    replace = os.replace
    with monkeypatch.context() as patch:
        patch.setattr("dltrain.convert.engine.os", SimpleNamespace(**vars(os) | {"replace": move}))
        with pytest.raises(KeyboardInterrupt):
            convert("images", source, out, *new)
    assert "made with another size" in refused("images", source, out, *new[:-1])
    convert("images", source, out, *new)
    assert content(out) == content(tmp_path / "whole")
    assert len(list(out.glob("*.idx"))) == 4


def test_two_at_once_are_refused(tmp_path):
    import fcntl

    source, out = class_folders(tmp_path / "source"), tmp_path / "out"
    (out / WORK).mkdir(parents=True)
    with open(out / WORK / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another conversion is writing" in refused("images", source, out)
    convert("images", source, out)


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    source, out = class_folders(tmp_path / "source", 40), tmp_path / "out"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, limits[1]))
    try:
        message = refused("images", source, out)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in message and "File too large" in message
    assert not list(out.glob("*.tar"))
    convert("images", source, out)
    assert len(Shards(str(out))) == 120


def test_bad_input(tmp_path):
    source = class_folders(tmp_path / "source")
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "torn.zip").write_bytes(b"PK\3\4 no more")
    (tmp_path / "torn.tar").write_bytes(b"no tar" * 1000)
    (tmp_path / "tars").mkdir()
    (tmp_path / "tars" / "x.tar").touch()
    out = tmp_path / "out"
    for arguments, words in (
        (("images", tmp_path / "none", out), "none does not exist"),
        (("images", tmp_path / "empty", out), "empty is an empty folder"),
        (("images", source, tmp_path / "file"), "file is a file"),
        (("images", source, source / "a" / "out"), "lies inside"),
        (("images", source, source), "lies inside"),
        (("images", source, tmp_path / "file" / "out"), "Not a directory"),
        (("images", tmp_path / "file", out), "nothing in it is a sample"),
        (("images", tmp_path / "torn.zip", out), "not a zip"),
        (("images", tmp_path / "torn.tar", out), "not a tar"),
        (("images", source, tmp_path / "tars"), "not made by this command"),
        (("text", source, out), "files of other kinds: 30, such as a/000.png"),
        (("images", source, out, "--workers", "0"), "--workers 0 must be above 0"),
        (("images", source, out, "--shard-mb", "0"), "--shard-mb 0.0 must be above 0"),
        (("images", source, out, "--split", "test"), "no split test"),
        (("images", source, out, "--classes", tmp_path / "none"), "none: No such file"),
        (("images", source, out, "--size", "-1"), "--size -1"),
    ):
        assert words in refused(*arguments), arguments
    assert not out.exists()
    for arguments in (["pictures", str(source), str(out)], ["images", str(source)], ["images"], []):
        with pytest.raises(SystemExit) as exit_:
            main(arguments)
        assert exit_.value.code == 2


def test_help_comes_without_torch_or_numpy():
    for argument in ("['--help']", "['imagenet', '--help']"):
        code = f"import sys\nfrom dltrain.commands.shards import main\ntry: main({argument})\n"
        code += "except SystemExit: print('torch' in sys.modules, 'numpy' in sys.modules)"
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.startswith("usage: dltrain shards") and done.stdout.endswith("False False\n")


def test_cuts():
    assert cuts(np.array([5, 5, 5, 20, 1]), 2, 10).tolist() == [2, 3, 4, 5]
    assert cuts(np.full(10, 3), 100, 10).tolist() == [3, 6, 9, 10]
    assert cuts(np.full(10, 3), 4, 100).tolist() == [4, 8, 10]
    assert cuts(np.zeros(5), 2, 1).tolist() == [2, 4, 5]


def test_keys_are_unique_and_webdataset_reads_them_back():
    assert list(keys(["a/x.jpg", "a/x.png", "a/x.y.jpg", "a/x_y.jpg", "__a__/b.c/d", "e"])) == [
        "a/x", "a/x_", "a/x_y", "a/x_y_", "x__a__/b.c/d", "e",
    ]  # fmt: skip


def test_real_images(tmp_path):
    source = Path(os.environ.get("DLTRAIN_DATA", "")) / "imagenette128" / "val.zip"
    if not source.exists():
        pytest.skip("DLTRAIN_DATA has no imagenette128/val.zip")
    convert("images", source, tmp_path / "out", "--samples-per-shard", 2000)
    classes = (tmp_path / "out" / "classes.txt").read_text().split()
    assert len(classes) == 10 and classes[0] == "n01440764"
    with zipfile.ZipFile(source) as archive:
        found = {f"{sample['__key__']}.jpg": sample for sample in Shards(str(tmp_path / "out"))}
        assert found.keys() == {name for name in archive.namelist() if not name.endswith("/")}
        for name, sample in found.items():
            assert archive.read(name) == sample["jpg"] and classes[int(sample["cls"])] == name.split("/")[1]
