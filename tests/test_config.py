"""The command line: presets, fields, and every conflict at once with its numbers."""

import dataclasses
import json
from dataclasses import dataclass

import pytest

import dltrain
from dltrain.config import conflicts, digest, dress, numbers, parse, settle
from dltrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    width: int = 128  # of the model
    betas: tuple[float, float] = (0.9, 0.999)


PRESETS = {"tiny": Config(), "debug": Config(steps=3, width=8), "placed": Config(out="elsewhere")}


def read(*argv: str) -> Config:
    return parse(Config, PRESETS, "toy_train", list(argv))


def settled(cfg: Config, world: int = 1, before: dict | None = None, env: dict | None = None) -> tuple[Config, int]:
    return settle(cfg, world, world, before or {}, env or {})


def test_the_first_preset_is_the_default():
    assert read() == dataclasses.replace(Config(), out="runs/toy_train-tiny")
    assert read("debug") == dataclasses.replace(PRESETS["debug"], out="runs/toy_train-debug")
    assert read("placed").out == "elsewhere"


def test_fields_change_a_preset():
    cfg = read("debug", "--width", "16", "--micro_batch", "4", "--log-every", "5", "--debug", "--out", "x")
    assert cfg == dataclasses.replace(PRESETS["debug"], width=16, micro_batch=4, log_every=5, debug=True, out="x")
    assert read("--betas", "0.8", "0.9").betas == (0.8, 0.9)


def test_an_unknown_preset_is_named_with_those_there_are():
    with pytest.raises(UserError, match="no preset 'huge' in toy_train: choose one of tiny, debug, placed"):
        read("huge", "--width", "16")


@pytest.mark.parametrize("argv", [["--widht", "16"], ["--width", "many"], ["--strategy", "zero4"]])
def test_what_is_no_field_or_value_ends_with_code_2(argv, capsys):
    with pytest.raises(SystemExit) as exit:
        read(*argv)
    assert exit.value.code == 2
    assert argv[0].strip("-") in capsys.readouterr().err


def test_help_has_comments_presets_and_values(capsys):
    with pytest.raises(SystemExit) as exit:
        read("debug", "--help")
    assert exit.value.code == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert "of the model" in text
    assert "rows per optimizer step, over all ranks" in text
    assert "Presets: tiny, debug, placed (now: debug)" in text
    assert "(default: 8)" in text


def test_auto_becomes_what_will_be_used():
    cfg, threads = settled(Config(out="x"), world=1)
    assert (cfg.strategy, cfg.precision, cfg.lanes, threads) == ("single", "fp32", 1, 1)
    cfg, _ = settled(Config(out="x"), world=4)
    assert (cfg.strategy, cfg.lanes) == ("ddp", 4)


def test_the_number_of_threads_belongs_to_the_run():
    assert settled(Config(out="x"), env={"DLTRAIN_THREADS": "3"})[1] == 3
    assert settled(Config(out="x"), before={"threads": 3})[1] == 3
    with pytest.raises(UserError, match="threads is 3 there, 2 now"):
        settled(Config(out="x"), before={"threads": 3}, env={"DLTRAIN_THREADS": "2"})


def test_lanes_belong_to_the_run_and_grow_only_with_the_processes():
    before = json.loads(json.dumps(numbers(settled(Config())[0]))) | {"lanes": 4}
    assert settled(Config(), 2, before)[0].lanes == 4
    assert settled(Config(), 8, before)[0].lanes == 8
    assert settled(Config(), 5, before)[0].lanes == 8  # the next divisor of 32 rows
    with pytest.raises(UserError, match="lanes is 4 there, 2 now"):
        settled(Config(lanes=2), 1, before)


def test_a_run_goes_on_only_with_its_own_numbers():
    cfg, threads = settled(Config(out="runs/a"))
    before = json.loads(json.dumps(dataclasses.asdict(cfg) | {"threads": threads}))
    free = Config(out="runs/b", steps=9, workers=2, log_every=1, save_every=1, eval_every=1, keep=5, remat="full")
    settled(free, before=before)
    with pytest.raises(UserError) as error:
        settled(Config(out="runs/a", seed=5, width=64), before=before)
    assert "runs/a is a run of another configuration" in str(error.value)
    assert "seed is 0 there, 5 now" in str(error.value)
    assert "width is 128 there, 64 now" in str(error.value)
    assert "use another --out" in str(error.value)
    assert "\n" not in str(error.value)


def test_all_conflicts_come_at_once():
    bad = Config(steps=0, batch=30, lanes=4, micro_batch=-1, keep=0, clip=-1.0, strategy="single")
    with pytest.raises(UserError) as error:
        settled(bad, world=2)
    for part in (
        "steps (0) must be at least 1",
        "micro_batch (-1) must be at least 0",
        "keep (0) must be at least 1",
        "clip (-1.0) must be at least 0",
        "batch (30 rows) must be a multiple of lanes (4)",
        "strategy single is one process, and 2 were started",
    ):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("cfg", "world", "local", "message"),
    [
        ({"batch": 32, "lanes": 4, "micro_batch": 3}, 1, 1, "(32 / 4 lanes = 8) must be a multiple of micro_batch (3)"),
        ({"batch": 32, "lanes": 0, "strategy": "ddp"}, 3, 3, "batch (32 rows) must be a multiple of lanes (3)"),
        ({"strategy": "zero2", "remat": "selective", "lanes": 1}, 1, 1, "remat selective is not offered under zero2"),
        ({"strategy": "zero3", "precision": "fp16", "lanes": 1}, 1, 1, "fp16 is not offered under zero3"),
        ({"strategy": "zero1", "lanes": 4, "batch": 36}, 3, 3, "zero1 needs lanes (4) to be a multiple of the"),
        ({"strategy": "hybrid", "lanes": 4}, 4, 1, "hybrid shards within a node"),
        ({"strategy": "hybrid", "lanes": 8}, 8, 3, "here 3 of 8"),
        ({"debug": True, "strategy": "ddp", "lanes": 2}, 2, 2, "--debug is one process, and 2 were started"),
    ],
)
def test_each_conflict_has_its_numbers(cfg, world, local, message):
    found = conflicts(Config(**cfg), world, local)
    assert len(found) == 1 and message in found[0], found


@pytest.mark.parametrize(
    ("cfg", "world", "local"),
    [
        ({"lanes": 4, "micro_batch": 2}, 1, 1),
        ({"lanes": 4, "strategy": "ddp", "batch": 36}, 3, 3),
        ({"lanes": 4, "strategy": "hybrid"}, 4, 2),
        ({"lanes": 4, "strategy": "zero3", "precision": "bf16", "remat": "full"}, 2, 2),
        ({"lanes": 0, "strategy": "fsdp"}, 2, 2),
    ],
)
def test_what_can_be_is_not_refused(cfg, world, local):
    assert conflicts(Config(**cfg), world, local) == []


def test_a_written_config_reads_back():
    cfg = Config(width=3, betas=(0.5, 0.25), clip=0.1 + 0.2)
    written = json.loads(json.dumps(dataclasses.asdict(cfg) | {"threads": 1, "of_a_later_version": 0}))
    assert dress(Config, written) == cfg


def test_the_digest_is_of_the_fields_not_of_their_order():
    assert digest({"a": 1, "b": 2.5}) == digest({"b": 2.5, "a": 1}) != digest({"a": 1, "b": 2})
