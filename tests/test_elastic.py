"""Eight lanes, and any number of processes at each launch: the bits of one process throughout."""

import dataclasses
import json

import pytest
import toy
import worlds

LAUNCHES = [
    (4, "ddp", 2),
    (2, "fsdp", 4),
    (1, "single", 5),
    (3, "fsdp", 8),
    (8, "ddp", 10),
]  # processes, how, up to step


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_four_then_two_one_three_and_eight_processes(tmp_path, precision):
    """In the midst of an epoch (100 rows, 24 a step), with dropout."""
    cfg = toy.Config(out=str(tmp_path / "one"), lanes=8, precision=precision, eval_every=100)
    worlds.launch(1, toy.train, dataclasses.replace(cfg, strategy="single"))
    for world, strategy, steps in LAUNCHES:
        how = dataclasses.replace(cfg, out=str(tmp_path / "many"), strategy=strategy, steps=steps)  # type: ignore[arg-type]
        worlds.launch(world, toy.train, how)
    assert toy.outcome(tmp_path / "many")[0] == toy.outcome(tmp_path / "one")[0]
    rows = [[row for row in toy.rows_of(tmp_path / name) if "loss" in row] for name in ("one", "many")]
    assert rows[0] == rows[1]
    events = map(json.loads, (tmp_path / "many" / "events.jsonl").read_text().splitlines())
    assert [event["world"] for event in events if event["kind"] == "resume"] == [2, 1, 3, 8]
