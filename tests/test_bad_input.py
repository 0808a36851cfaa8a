"""A user's mistake or a machine's failure: exit code 2, one line that names it and says what to do, nothing lost."""

import dataclasses
import os
import shutil
import subprocess
import time
from pathlib import Path

import commands
import pytest
import toy
import worlds
from commands import finish, refused

from dltrain import checkpoint
from dltrain.data.shards import Shards, write_shards
from dltrain.errors import UserError

STEPS = ("debug", "--lanes", 2, "--steps", 2, "--save-every", 1, "--eval-every", 0)


def content(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A run that is done, which no mistake may touch."""
    out = tmp_path_factory.mktemp("finished") / "run"
    commands.run(*STEPS, "--out", out)
    return out


@pytest.fixture
def shards(tmp_path) -> list[Path]:
    """Two shards of twenty documents."""
    words = ["alpha", *(chr(97 + i) * (1 + i % 3) + chr(122 - i) for i in range(18))]
    texts = [". ".join(f"{words[i % 19]} {words[(i * 7 + j) % 19]} {i * j}" for j in range(30)) for i in range(40)]
    return write_shards(
        ({"__key__": f"{i:03d}", "txt": text} for i, text in enumerate(texts)), tmp_path / "text", "t", 20
    )


def asked(shards: list[Path], out: Path) -> tuple[object, ...]:
    return (*STEPS, "--shards", shards[0].parent, "--vocab", 100, "--out", out)


def test_these_shards_are_good(shards, tmp_path):
    """Or the refusals below might be of something else."""
    commands.run(*asked(shards, tmp_path / "run"))


def test_missing_shards(tmp_path):
    err = refused(*STEPS, "--shards", tmp_path / "wiki-{000..003}.tar", "--out", tmp_path / "run")
    assert "wiki-000.tar does not exist; correct the pattern or restore the file" in err
    assert not (tmp_path / "run").exists()


def test_a_folder_without_shards(tmp_path):
    (tmp_path / "empty").mkdir()
    assert "holds no .tar file; correct the pattern" in refused(
        *STEPS, "--shards", tmp_path / "empty", "--out", tmp_path / "r"
    )


def as_a_user() -> tuple[object, ...]:
    """Python as one whom permissions bind: root is not, unless it gives that up."""
    if os.geteuid() != 0:
        return commands.PYTHON
    if shutil.which("setpriv") is None:
        pytest.skip("root reads everything, and there is no setpriv to give that up")
    return ("setpriv", "--bounding-set=-dac_override,-dac_read_search", *commands.PYTHON)


def test_unreadable_shards(shards, tmp_path):
    shards[1].chmod(0)
    err = refused(*asked(shards, tmp_path / "run"), by=as_a_user())
    assert f"{shards[1]} is not readable; correct its permissions" in err


def test_an_unwritable_run_directory(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    err = refused(*STEPS, "--out", tmp_path / "locked" / "run", by=as_a_user())
    assert f"{tmp_path}/locked/run cannot be written (Permission denied): choose another --out" in err


def test_a_run_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("mine")
    err = refused(*STEPS, "--out", tmp_path / "file")
    assert f"{tmp_path}/file" in err and "choose another --out" in err
    assert (tmp_path / "file").read_text() == "mine"


def damaged_header(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[data.rindex(b"ustar") - 200] ^= 0x40  # in the last member's header
    path.write_bytes(data)


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def damaged_text(path: Path) -> None:
    """A flipped bit in a payload, as a failing disk has it: size and time are the indexed ones."""
    stat, data = path.stat(), bytearray(path.read_bytes())
    data[data.index(b"alpha")] ^= 1
    path.write_bytes(data)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize(
    ("harm", "what"),
    [(damaged_header, "damaged"), (truncated, "truncated"), (damaged_text, "payload of .txt has changed")],
)
def test_a_corrupt_tar(shards, tmp_path, harm, what):
    Shards(str(shards[1]))  # its index is there
    harm(shards[1])
    err = refused(*asked(shards, tmp_path / "run"), DLTRAIN_CACHE=tmp_path / "cache")  # where no tokens are kept yet
    assert str(shards[1]) in err and what in err and "restore the shard" in err
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_of_another_vocabulary(finished, tmp_path):
    (model,) = Path(os.environ["DLTRAIN_CACHE"]).glob("tokenizer-unigram-512-*/tokenizer.model")
    err = refused(*STEPS, "--tokenizer", model, "--vocab", 600, "--out", tmp_path / "run")
    assert f"{model} has 512 tokens, --vocab is 600" in err
    assert not (tmp_path / "run").exists()


def test_a_missing_tokenizer(tmp_path):
    err = refused(*STEPS, "--tokenizer", tmp_path / "absent.model", "--out", tmp_path / "run")
    assert f"{tmp_path}/absent.model" in err and "No such file" in err


def test_a_batch_that_does_not_divide(tmp_path):
    err = refused(*STEPS, "--batch", 25, "--micro-batch", 5, "--keep", 0, "--out", tmp_path / "run")
    assert "batch (25 rows) must be a multiple of lanes (2)" in err
    assert "keep (0) must be at least 1" in err  # all at once
    assert not (tmp_path / "run").exists()


def test_an_unknown_preset():
    said = refused("hugh")
    assert "no preset 'hugh' in bert_pretrain: choose one of tiny, debug, claim, gpu, paper, base, large" in said


def test_heads_that_do_not_divide(tmp_path):
    err = refused(*STEPS, "--heads", 3, "--out", tmp_path / "run")
    assert "32" in err and "3" in err


def test_a_run_directory_of_another_configuration(finished):
    before = content(finished)
    err = refused(*STEPS, "--steps", 3, "--seed", 1, "--width", 64, "--out", finished)
    assert f"{finished} is a run of another configuration" in err
    assert "seed is 0 there, 1 now" in err and "width is 32 there, 64 now" in err and "use another --out" in err
    assert content(finished) == before


def test_a_torn_config(finished, tmp_path):
    out = shutil.copytree(finished, tmp_path / "run")
    (out / "config.json").write_text('{"recipe": "bert')
    assert f"{out}/config.json: not whole JSON" in refused(*STEPS, "--steps", 3, "--out", out)


def test_other_shards_behind_the_same_name(shards, tmp_path):
    """A run whose data was replaced must not go on as if nothing had happened."""
    commands.run(*asked(shards, tmp_path / "run"))
    before = content(tmp_path / "run/checkpoints")
    write_shards(
        ({"__key__": f"x{i}", "txt": "other words of other kinds. " * 20} for i in range(20)), shards[0].parent, "t", 20
    )
    err = refused(*asked(shards, tmp_path / "run"), "--steps", 4)
    assert "changed" in err or "vocabulary" in err, err
    assert content(tmp_path / "run/checkpoints") == before


@pytest.fixture
def small_disk(tmp_path):
    """A file system of its own: resize(KiB)."""
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(*args: object) -> bool:
        return subprocess.run(["mount", *map(str, args)], capture_output=True).returncode == 0

    if (
        os.geteuid() != 0
        or shutil.which("mount") is None
        or not mount("-t", "tmpfs", "-o", "size=64m", "dltrain", disk)
    ):
        pytest.skip("a small file system needs root and the right to mount")
    yield disk, lambda kib: mount("-o", f"remount,size={kib}k", disk)
    subprocess.run(["umount", "-l", str(disk)], check=True)


def test_a_full_disk(small_disk, tmp_path):
    """The first checkpoint fits, the next does not: that is said, the first stays whole, and with room it goes on."""
    disk, resize = small_disk
    command = ("debug", "--lanes", 2, "--steps", 4, "--save-every", 2, "--eval-every", 0)
    commands.run(*command, "--out", tmp_path / "undisturbed")
    commands.run(*command, "--steps", 2, "--out", disk / "run")
    first = content(disk / "run/checkpoints")
    used = shutil.disk_usage(disk).used // 1024
    assert resize(used + 200)
    err = refused(*command, "--out", disk / "run")
    assert "step 4 could not be saved" in err and "No space left on device" in err
    assert "the newest checkpoint is step-00000002; free some space" in err
    assert content(disk / "run/checkpoints") == first
    assert checkpoint.damage(disk / "run/checkpoints/step-00000002") == ""
    assert resize(64 * 1024)
    commands.run(*command, "--out", disk / "run")
    got, want = ((out / "metrics.jsonl").read_text() for out in (disk / "run", tmp_path / "undisturbed"))
    assert [r for r in got.splitlines() if "eval" not in r] == [r for r in want.splitlines() if "eval" not in r]


def test_no_room_even_to_begin(small_disk, tmp_path):
    disk, resize = small_disk
    assert resize(4)
    err = refused(*STEPS, "--out", disk / "run")
    assert str(disk / "run") in err and "space" in err.lower()


# --- ranks that disagree --------------------------------------------------------------------------------------------


def disagree(seeds: list[int]) -> tuple[float, str]:
    """Seconds until this rank stopped, and what it said."""
    began = time.monotonic()
    try:
        toy.train(dataclasses.replace(toy.Config(out="never-made"), seed=seeds[int(os.environ["RANK"])]))
    except UserError as error:
        return time.monotonic() - began, str(error)
    return time.monotonic() - began, ""


def test_ranks_that_disagree_stop_within_five_seconds():
    answers = worlds.launch(3, disagree, [0, 0, 7])
    for rank, (seconds, said) in enumerate(answers):
        assert seconds < 5
        other = 2 if rank < 2 else 0
        mine, theirs = (0, 7) if rank < 2 else (7, 0)
        assert f"ranks disagree on seed: seed is {mine} on rank {rank} and {theirs} on rank {other}" in said
    assert not Path("never-made").exists()


def test_ranks_that_disagree_exit_with_2(tmp_path):
    port = worlds.free_port()
    processes = [
        commands.start(*STEPS, "--lr", lr, "--out", tmp_path / "run", **commands.slurm(2, rank, port))
        for rank, lr in enumerate([0.001, 0.002])
    ]
    for code, _, err in map(finish, processes):
        assert code == 2
        assert err.startswith("bert_pretrain: ranks disagree on lr: ") and err.count("\n") == 1
    assert not (tmp_path / "run").exists()
