import gc
import gzip
import io
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile

import numpy as np
import pytest
import toy
from commands import ROOT, environment

from dltrain.commands import data_check
from dltrain.commands.data import main
from dltrain.data import turns
from dltrain.data.mix import Mix
from dltrain.data.order import Order, Windowed
from dltrain.data.shards import Shards, write_shards
from dltrain.errors import UserError
from dltrain.loop import fit
from dltrain.optim import adamw
from dltrain.run import Run
from dltrain.schedules import linear
from dltrain.seeds import key


@pytest.fixture
def shards(tmp_path):
    samples = ({"__key__": f"s{i:03d}", "txt": f"wört {i}", "cls": str(i % 3)} for i in range(30))
    write_shards(samples, tmp_path / "shards", "part", 3)
    return tmp_path / "shards"


def exits(code, *argv):
    with pytest.raises(SystemExit) as found:
        main(list(map(str, argv)))
    assert found.value.code == code


def flip(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def test_verify_whole(shards, capsys):
    main(["verify", str(shards)])
    assert capsys.readouterr().out == "30 samples in 10 shards: whole\n"


def test_verify_names_shard_key_and_byte(shards, tmp_path, capsys):
    damaged = shards / "part-000004.tar"
    at = damaged.read_bytes().index("wört 13".encode())
    flip(damaged, at)
    exits(1, "verify", shards, "--json", tmp_path / "found.json")
    line, summary = capsys.readouterr().out.splitlines()
    assert line.startswith(f"{damaged}: sample 's013', byte {at}: ") and "CRC-32C" in line
    assert summary == "1 fault in 1 of 10 shards"
    found = json.loads((tmp_path / "found.json").read_text())
    assert (found["whole"], found["samples"], found["shards"]) == (False, 30, 10)
    assert [(d["shard"], d["key"], d["offset"]) for d in found["damage"]] == [(str(damaged), "s013", at)]


def test_several_processes_find_the_same(shards, capsys, monkeypatch):
    damaged = shards / "part-000004.tar"
    flip(damaged, damaged.read_bytes().index("wört 13".encode()))
    exits(1, "verify", shards)
    alone = capsys.readouterr().out
    monkeypatch.setattr(data_check, "WORK", 1)
    exits(1, "verify", shards)
    assert capsys.readouterr().out == alone


def test_verify_without_an_index_says_so_and_writes_none(shards, capsys):
    index = shards / "part-000000.tar.idx"
    index.unlink()
    main(["verify", str(shards)])
    note, summary = capsys.readouterr().out.splitlines()
    assert note == f"{shards}/part-000000.tar: no index: checked as a tar only"
    assert summary.endswith("whole, as far as can be told of 1 without an index")
    assert not index.exists()


@pytest.mark.parametrize("content", [b"", b"no tar" * 500])
def test_verify_what_is_no_tar(shards, capsys, content):
    (shards / "part-000009.tar").unlink()
    (shards / "part-000009.tar.idx").unlink()
    (shards / "part-000009.tar").write_bytes(content)
    exits(1, "verify", shards)
    assert re.match(r".*part-000009\.tar: no sample, byte 0: .*not an? (uncompressed )?tar", capsys.readouterr().out)


def test_verify_a_shard_restored_after_its_damage_was_indexed(shards, capsys):
    shard = shards / "part-000002.tar"
    whole = shard.read_bytes()
    flip(shard, 0)
    shard.with_name(shard.name + ".idx").unlink()
    exits(1, "index", shards)
    shard.write_bytes(whole)
    main(["verify", str(shard)])
    assert "3 samples in 1 shards: whole" in capsys.readouterr().out


def test_index_makes_what_is_missing(shards, capsys):
    before = {path: path.read_bytes() for path in shards.glob("*.idx")}
    missing = shards / "part-000007.tar.idx"
    missing.unlink()
    main(["index", str(shards)])
    lines = capsys.readouterr().out.splitlines()
    assert [line.rpartition(", ")[2] for line in lines] == ["had its index"] * 7 + ["indexed"] + ["had its index"] * 2
    assert {path: path.read_bytes() for path in shards.glob("*.idx")} == before


def test_index_keeps_to_what_it_knows_until_forced(shards, capsys):
    shard = shards / "part-000001.tar"
    flip(shard, shard.read_bytes().index("wört 5".encode()))
    exits(1, "index", shards)
    assert "not what its index says" in capsys.readouterr().out
    main(["index", str(shards), "--force"])
    main(["verify", str(shards)])
    assert capsys.readouterr().out.endswith("whole\n")


def test_a_compressed_shard_and_a_pipe(shards, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))
    content = (shards / "part-000003.tar").read_bytes()
    (tmp_path / "part.tar.gz").write_bytes(gzip.compress(content))
    main(["index", str(tmp_path / "part.tar.gz")])
    main(["verify", str(tmp_path / "part.tar.gz")])
    out = capsys.readouterr().out
    assert "part.tar.gz: 3 samples, indexed, in the cache\n" in out and "no index: checked as a tar only" in out
    (tmp_path / "part.tar.gz.idx").write_bytes((shards / "part-000003.tar.idx").read_bytes())
    main(["verify", str(tmp_path / "part.tar.gz")])
    assert capsys.readouterr().out == "3 samples in 1 shards: whole\n"
    main(["verify", f"pipe:cat {shards}/part-000003.tar", "--pipe"])
    with pytest.raises(UserError, match="pipe"):
        main(["verify", f"pipe:cat {shards}/part-000004.tar"])
    with pytest.raises(UserError, match="--force is for"):
        main(["index", str(tmp_path / "part.tar.gz"), "--force"])


def test_stats(shards, capsys):
    (shards / "classes.txt").write_text("ant\nbee\ncat\n")
    main(["stats", str(shards)])
    out = capsys.readouterr().out
    size = sum(path.stat().st_size for path in shards.glob("*.tar"))
    payload = sum(len(sample[e]) for sample in Shards(str(shards)) for e in ("txt", "cls"))
    assert out.startswith("30 samples in 10 shards of 3 samples\n")
    assert f"headers and padding of the tars are {1 - payload / size:.1%}\n" in out
    assert re.search(r"\.cls +30 of 1 bytes, 30B\n", out) and re.search(r"\.txt +30 of 7 - 8 - 8 bytes, 230B\n", out)
    assert f".txt: {sum(len(f'wört {i}') for i in range(30))} characters\n" in out
    assert re.search(r"3 classes of 10 samples\n +0 ant +10 #{30}\n +1 bee", out)
    assert "dots" not in out


def test_stats_see_through_names_with_dots(tmp_path, capsys):
    with tarfile.open(tmp_path / "dots.tar", "w") as tar:
        for i in range(3):
            member = tarfile.TarInfo(f"image.{i}.jpg")
            member.size = 4
            tar.addfile(member, io.BytesIO(b"data"))
    main(["stats", str(tmp_path / "dots.tar")])
    out = capsys.readouterr().out
    assert "1 samples" in out and "NAME.0.jpg is .0.jpg of the sample NAME" in out


def test_show_text_and_tokens(tmp_path, capsys):
    samples = [
        {"__key__": "a", "txt": "\x1b[2J" + "word " * 300},
        {"__key__": "b", "npy": np.arange(7, dtype=np.uint16)},
    ]
    write_shards(samples, tmp_path, "part", 10)
    main(["show", str(tmp_path), "--out", str(tmp_path / "none.png")])
    out = capsys.readouterr().out
    assert "sample 'a'" in out and "(1,504 characters)" in out and "\x1b" not in out
    assert ".npy: 7 tokens, uint16, 0 ... 6" in out
    assert not (tmp_path / "none.png").exists()


def test_show_tokens_decoded(tmp_path, capsys):
    from dltrain.tokenizers import spm

    words = re.findall(r"\w+", "the quick brown fox jumps over the lazy dog and runs away from it")
    tokenizer = spm.train(
        [" ".join(words[i:] + words[:i]) for i in range(14)] * 3, tmp_path / "t.model", vocab=60, kind="bpe"
    )
    ids = np.array(tokenizer.encode(["the lazy fox"])[0], np.uint16)
    write_shards([{"__key__": "a", "npy": ids}], tmp_path / "good", "part", 10)
    write_shards([{"__key__": "a", "npy": ids + 60}], tmp_path / "bad", "part", 10)
    main(["show", str(tmp_path / "good"), "--tokenizer", str(tmp_path / "t.model")])
    assert ": the lazy fox\n" in capsys.readouterr().out
    with pytest.raises(UserError, match="--tokenizer 60; give the one"):
        main(["show", str(tmp_path / "bad"), "--tokenizer", str(tmp_path / "t.model")])


def test_show_images(tmp_path, capsys):
    Image = pytest.importorskip("PIL.Image")

    def encoded(width, height):
        Image.new("RGB", (width, height), (200, 0, 0)).save(file := io.BytesIO(), "JPEG")
        return file.getvalue()

    sizes = [(32, 32), (900, 500), (100, 2100), (150, 150)]
    samples = [{"__key__": f"i{i}", "jpg": encoded(*size), "cls": "0"} for i, size in enumerate(sizes)]
    write_shards([*samples, {"__key__": "torn", "jpg": encoded(9, 9)[:200]}], tmp_path, "part", 10)
    main(["show", str(tmp_path), "--out", str(tmp_path / "sheet.png")])
    told = capsys.readouterr()
    assert told.out == f"{tmp_path}/sheet.png: 4 images\n" and "sample 'torn'" in told.err
    sheet = np.asarray(Image.open(tmp_path / "sheet.png").convert("RGB"))
    assert max(sheet.shape) < 2 * 300
    red = int((sheet[..., 0] > 150).sum() - (sheet[..., 1] > 150).sum())
    assert red == 96 * 96 + 256 * 142 + 256 * 13 + 150 * 150


def test_show_refuses(shards, tmp_path):
    with pytest.raises(UserError, match="0 samples"):
        main(["show", str(shards), "--n", "0"])


def test_explain_shards_as_a_run_reads_them(shards, capsys):
    source = Shards(str(shards))
    position = np.arange(3 * 8 + 4, 3 * 8 + 8)  # step 4, the second of two lanes
    epoch, index = Order(30, key("order", 5)).at(position)
    main(["explain", str(shards), "--step", "4", "--rank", "1", "--world", "2", "--batch", "8", "--micro-batch", "2",
          "--seed", "5"])  # fmt: skip
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "step 4, rank 1 of 2, 2 lanes, 8 rows"
    wanted = [
        ["1", str(m // 2), str(p), str(e), str(i), f"{source.name(i)}"]
        for m, (p, e, i) in enumerate(zip(position.tolist(), epoch.tolist(), index.tolist()))
    ]
    assert [line.split(maxsplit=5) for line in lines[2:]] == wanted


def test_explain_deals_lanes_as_the_strategy_does(shards, capsys):
    def lanes(*more):
        main(["explain", str(shards), "--step", "1", "--world", "2", "--lanes", "4", "--batch", "4", *more])
        return [line.split()[0] for line in capsys.readouterr().out.splitlines()[2:]]

    assert lanes() == ["0", "1"]
    assert lanes("--strategy", "fsdp") == ["0", "2"]
    assert lanes("--world", "8", "--rank", "0") == ["no"]  # its rows: none


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (("--step", "0", "--batch", "8"), "steps count from 1"),
        (("--step", "1", "--batch", "8", "--rank", "1"), "ranks from 0 to 0"),
        (("--step", "1"), "give --batch"),
        (("--step", "1", "--batch", "8", "--lanes", "3"), "must be a multiple"),
        (("--step", "1", "--batch", "8", "--window", "0"), "window of 0 shards"),
        (("--step", "1", "--batch", "8", "--shards", "x"), "--shards is for a run"),
    ],
)
def test_explain_refuses(shards, argv, message):
    with pytest.raises(UserError, match=message):
        main(["explain", str(shards), *argv])


def test_bench_refuses(tmp_path, monkeypatch):
    monkeypatch.delenv("DLTRAIN_DATA", raising=False)
    with pytest.raises(UserError, match="none given"):
        main(["bench"])
    with pytest.raises(UserError, match="has none of"):
        main(["bench", "--data", str(tmp_path)])
    with pytest.raises(UserError, match="the parts are"):
        main(["bench", "--data", str(tmp_path), "--only", "video"])


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of samples: 30 rows, read in windows of 2 shards, 8 and then 12 a step, on 4 lanes."""
    folder = tmp_path_factory.mktemp("run")
    write_shards(({"__key__": f"s{i:03d}", "txt": "x"} for i in range(30)), folder / "shards", "part", 7)
    shards = Shards(str(folder / "shards"))
    cfg = toy.Config(out=str(folder / "out"), steps=6, batch=8, lanes=4, micro_batch=1, save_every=0)
    with Run(cfg) as run:
        task, optimizer = run.prepare(lambda: toy.Toy(0.0), adamw(1e-2))
        data = run.batches(toy.ToyRows(30), Windowed(shards.counts_S, 3, 2), ramp=[(0, 8), (20, 12)])
        fit(run, task, optimizer, linear(2, 20), data, evals={})
    return folder


def explained(capsys, *argv):
    main(["explain", *map(str, argv)])
    return capsys.readouterr().out.splitlines()


def test_explain_run(run, capsys):
    shards = Shards(str(run / "shards"))
    lines = explained(capsys, run / "out", "--step", 5, "--world", 2, "--rank", 1, "--shards", run / "shards")
    position = np.arange(8 + 8 + 8 + 12 + 6, 8 + 8 + 8 + 12 + 12)  # lanes 2 and 3 of the fifth step
    epoch, index = Windowed(shards.counts_S, 3, 2).at(position)
    assert lines[0] == "step 5, rank 1 of 2, 4 lanes, 12 rows"
    wanted = [
        [str(2 + m // 3), str(m % 3), str(p), str(e), str(i), shards.name(i)]
        for m, (p, e, i) in enumerate(zip(position.tolist(), epoch.tolist(), index.tolist()))
    ]
    assert [line.split(maxsplit=5) for line in lines[2:-1]] == wanted
    assert lines[-1] == f"the 30 rows are taken for the samples of {run}/shards, which are as many"


def test_explain_run_reads_no_sample(run, tmp_path, capsys):
    shutil.copytree(run / "shards", tmp_path / "shards")
    argv = [run / "out", "--step", 2, "--shards", tmp_path / "shards"]
    whole = explained(capsys, *argv)
    for shard in (tmp_path / "shards").glob("*.tar"):
        size = shard.stat().st_size
        os.truncate(shard, 512)
        os.truncate(shard, size)  # nothing is left of it but zeros
    assert explained(capsys, *argv) == whole


def test_explain_run_whose_rows_are_no_samples(run, tmp_path, capsys):
    write_shards(({"__key__": f"s{i}", "txt": "x"} for i in range(9)), tmp_path, "part", 9)
    with pytest.raises(UserError, match="windows of 2 shards; give the shards"):
        main(["explain", str(run / "out"), "--step", "2", "--shards", str(tmp_path)])
    change_order(run / "out", tmp_path / "out", {"rows": 30, "seed": 1, "shuffle": True})
    lines = explained(capsys, tmp_path / "out", "--step", 1, "--shards", tmp_path)
    assert len(lines) == 2 + 8 + 1 and "are not samples, but made of them: no keys" in lines[-1]
    assert [line.split()[4] for line in lines[2:-1]] == [str(i) for i in Order(30, 1).at(np.arange(8))[1]]


def test_explain_run_of_a_mix(run, tmp_path, capsys):
    shards = Shards(str(run / "shards"))
    mix = Mix([Windowed(shards.counts_S, 9, 3), 5], [(0, (2, 1)), (9, ("1/3", "2/3"))], seed=4)
    change_order(run / "out", tmp_path / "out", mix.state())
    lines = explained(capsys, tmp_path / "out", "--step", 2, "--shards", run / "shards")
    position = np.arange(8, 16)
    epoch, index = mix.at(position)
    wanted = [position, epoch, mix.deal(position)[0], index]
    assert [line.split()[2:] for line in lines[2:-1]] == [[str(x) for x in row] for row in zip(*wanted)]


def change_order(run, copy, order):
    shutil.copytree(run, copy)
    [path] = copy.glob("checkpoints/*/state.json")
    state = json.loads(path.read_text())
    state["data"] |= {"order": order, "rows": 35 if "sources" in order else 30}
    path.write_text(json.dumps(state))


def test_explain_run_refuses(run, tmp_path):
    with pytest.raises(UserError, match=r"--micro-batch, --seed: .* is a run, which has its own"):
        main(["explain", str(run / "out"), "--step", "1", "--seed", "1", "--micro-batch", "2"])
    change_order(run / "out", tmp_path / "out", {"drawn": "at random"})
    with pytest.raises(UserError, match="an order with the entries drawn cannot be made again"):
        main(["explain", str(tmp_path / "out"), "--step", "1"])
    shutil.rmtree(tmp_path / "out/checkpoints")
    with pytest.raises(UserError, match="no checkpoint yet"):
        main(["explain", str(tmp_path / "out"), "--step", "1"])


@pytest.mark.filterwarnings("ignore::ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
def test_bench_of_bytes(tmp_path, monkeypatch, capsys):
    Image = pytest.importorskip("PIL.Image")
    monkeypatch.setattr(turns, "SECONDS", 0.01)
    monkeypatch.setenv("DLTRAIN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(sys.modules, "litdata", None)
    monkeypatch.setitem(sys.modules, "streaming", None)
    (tmp_path / "cifar10").mkdir()
    with zipfile.ZipFile(tmp_path / "cifar10/train.zip", "w") as archive:
        for i in range(12):
            Image.new("RGB", (9, 9), (20 * i, 0, 0)).save(file := io.BytesIO(), "PNG")
            archive.writestr(f"train/{'ab'[i % 2]}/{i}.png", file.getvalue())
    main(["bench", "--data", str(tmp_path), "--only", "bytes", "--turns", "2", "--json", str(tmp_path / "found.json")])
    gc.collect()  # webdataset leaves files open, of which this test alone need not hear
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "found.json").read_text())
    [table] = found["tables"]
    lines = {line["what"]: line for line in table["lines"]}
    assert list(lines) == ["raw 1 MiB reads", "webdataset", "webdataset, shuffle(1000)", "ours", "ours, shuffled"]
    ours, theirs, raw = lines["ours"], lines["webdataset"], lines["raw 1 MiB reads"]
    assert ours["over_webdataset"] == ours["cpu"] / theirs["cpu"] > 1
    assert ours["of_limit"] == ours["cpu"] / raw["cpu"] and raw["of_limit"] == 1
    assert ours["reached"] == (ours["over_webdataset"] >= 50 and ours["of_limit"] >= 0.2)
    assert all(0 < line["least"] <= line["median"] <= line["best"] for line in lines.values())
    assert f"| ours                      | {ours['median']:,.0f}" in out
    assert "litdata: cannot be imported or used here" in out and "mosaicml-streaming: cannot" in out
    assert found["measured"]["cpu"] and found["measured"]["versions"]["webdataset"]


def test_turns_interleave(monkeypatch):
    monkeypatch.setattr(turns, "SECONDS", 0.1)
    taken = []

    def items(name, seconds):
        while True:
            time.sleep(seconds)
            taken.append(name)
            yield

    found = turns.rates([turns.Side("a", items("a", 0.03), units=2), turns.Side("b", items("b", 0.06), chunk=3)], 2)
    assert [name for name, _ in itertools.groupby(taken)] == ["b", "a", "b", "a"]
    assert all(len(rate.per_second) == 2 for rate in found.values())
    assert 0 < max(found["a"].per_second) < 2 / 0.03 and 0 < max(found["b"].per_second) < 1 / 0.06
    assert taken.count("b") % 3 == 0
    assert found["a"].cpu > 2 / 0.03  # sleeping costs none


def process(*argv):
    code = "import sys; from dltrain.commands.data import main; main(sys.argv[1:])"
    command = [sys.executable, "-c", code, *map(str, argv)]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=60)


def test_a_real_process(shards):
    flip(shards / "part-000000.tar", 600)
    torn = process("verify", shards)
    assert torn.returncode == 1 and "part-000000.tar: sample 's000', byte " in torn.stdout and not torn.stderr


def test_help_needs_no_torch():
    code = "import sys; sys.modules['torch'] = None; from dltrain.commands.data import main; main(['index', '--help'])"
    shown = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), capture_output=True, text=True)
    assert shown.returncode == 0 and "PATTERN" in shown.stdout, shown.stderr
