"""A run over damaged shards: what is left out is the same on any number of processes, told, counted, and remembered."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import chaos_run
import exactly_once
import numpy as np
import pytest
import toy
import worlds

from dltrain import checkpoint
from dltrain.data.index import Damage
from dltrain.data.shards import Shards

STEPS = 4
FIELDS = ("shard", "key", "offset", "reason")


def damage(folder: Path, extension: str) -> list[Damage]:
    """Flip one bit in a sample of each source, its time left as it is: how a disk fails."""
    found = []
    for source in (folder / "0", folder / "1"):
        shards = Shards(str(source))
        i = len(shards) // 2
        key, path = shards.key(i), Path(shards[i]["__url__"])
        content, when = bytearray(path.read_bytes()), path.stat().st_mtime_ns
        header = content.index(f"{key}.{extension}\0".encode())
        content[header + 512 + 20] ^= 4
        path.write_bytes(content)
        os.utime(path, ns=(when, when))
        reason = f"payload of .{extension} has changed (CRC-32C differs)"
        found.append(Damage(str(path), key, header + 512, reason))
    return found


def run(folder: Path, cfg: chaos_run.Config, worlds_: list[int]) -> Path:
    """Launches that each get two steps further, or to the end."""
    out = folder / "run"
    for number, world in enumerate(worlds_):
        steps = cfg.steps if number == len(worlds_) - 1 else 2 * (number + 1)
        changed = replace(cfg, out=str(out), steps=steps, strategy="ddp")
        (folder / "ledger").mkdir(parents=True, exist_ok=True)
        ledger = str(folder / "ledger" / f"{number:04d}")
        worlds.launch(world, chaos_run.train, changed, ledger, env={"DLTRAIN_DEVICE": "cpu"})
    return out


def left_out(out: Path) -> list:
    return json.loads((checkpoint.steps(out / "checkpoints")[-1] / "state.json").read_bytes())["left_out"]


@pytest.mark.parametrize("kind", ["text", "images"])
def test_losses_are_the_same_on_all_ranks_and_after_a_resume(tmp_path, kind):
    make, extension = {"text": (chaos_run.make_text, "npy"), "images": (chaos_run.make_images, "png")}[kind]
    wanted = make(tmp_path / "data", STEPS, np.random.Generator(np.random.Philox(key=7)))
    damaged = damage(tmp_path / "data", extension)
    cfg = chaos_run.Config(data=str(tmp_path / "data"), kind=kind, steps=STEPS, on_error="skip")
    one, many = run(tmp_path / "one", cfg, [1]), run(tmp_path / "many", cfg, [2, 3])
    assert toy.outcome(one) == toy.outcome(many)
    assert exactly_once.taken(tmp_path / "one")[0] == exactly_once.taken(tmp_path / "many")[0]
    assert left_out(one) == left_out(many)
    assert sorted(what for what, _ in left_out(one)) == sorted(list(asdict(each).values()) for each in damaged)
    times = sum(times for _, times in left_out(one))  # a long text is in several rows
    for out in (one, many):
        rows = toy.rows_of(out)
        assert sum(row.get("damaged", 0) for row in rows) == times >= 2
        events = [json.loads(line) for line in (out / "events.jsonl").read_text().splitlines()]
        told = [event for event in events if event["kind"] == "left_out"]
        assert len(told) == times and {row["step"] for row in rows if "damaged" in row} == {e["step"] for e in told}
        assert {Damage(*(event[name] for name in FIELDS)) for event in told} == set(damaged)
    numbers = {n for what, _ in exactly_once.taken(tmp_path / "one")[0].values() for n in what}
    missing = set(wanted.tolist()) - numbers
    assert missing and all(missing & set(lost.tolist()) for lost in lost_numbers(damaged, kind))
    assert missing <= set(np.concatenate(lost_numbers(damaged, kind)).tolist())


def lost_numbers(damaged: list[Damage], kind: str) -> list[np.ndarray]:
    """The numbers of what was in the damaged samples: between those of their neighbours."""
    found = []
    for each in damaged:
        shards = Shards(str(Path(each.shard).parent), on_error="skip")
        i = list(shards.keys()).index(each.key)
        if kind == "images":
            last = int(shards[i - 1]["cls"])
            found.append(np.array([last + 1]))
        else:
            last, following = (np.frombuffer(shards[j]["npy"][-4:], "<u4")[0] for j in (i - 1, i + 1))
            length = (len(shards[i + 1]["npy"]) - 128) // 4
            found.append(np.arange(int(last) + 1, int(following) - length + 1))
    return found
