"""The contract: kill it anywhere, resume, same bytes; change the number of processes or the strategy, same bits."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import toy
import worlds

ALL = ["ddp", "fsdp", "zero1", "zero2", "zero3"]
needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed's CPU operator needs a C++ compiler")


def run(out: Path, world: int, strategy: str, **changes):
    local_world, die_after = changes.pop("local_world", 0), changes.pop("die_after", -1)
    cfg = dataclasses.replace(toy.Config(out=str(out), strategy=strategy), **changes)  # type: ignore[arg-type]
    worlds.launch(world, toy.train, cfg, local_world=local_world, env={"DIE_AFTER": die_after})
    return toy.outcome(out)


def losses(out: Path) -> list[float]:
    return [row["loss"] for row in toy.rows_of(out) if "loss" in row]


def strategies(names):
    return [
        pytest.param(n, marks=[needs_compiler, pytest.mark.compiler] if n.startswith("zero") else []) for n in names
    ]


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """One process, four lanes, ten steps, never disturbed."""
    return run(tmp_path_factory.mktemp("reference") / "run", 1, "single")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_four_lanes_give_the_same_bits_on_any_world(tmp_path, reference, strategy, world):
    assert run(tmp_path / "run", world, strategy) == reference


def test_the_world_may_change_at_every_resume(tmp_path, reference):
    out = tmp_path / "run"
    for world, strategy, steps in [(4, "fsdp", 3), (1, "single", 5), (3, "ddp", 8), (2, "fsdp", 10)]:
        got = run(out, world, strategy, steps=steps, eval_every=100)
    weights, _ = got
    assert weights == reference[0]
    rows = [row for row in toy.rows_of(out) if "loss" in row]
    assert [row["step"] for row in rows] == list(range(1, 11))
    assert rows == [row for row in map(json.loads, reference[1].splitlines()) if "loss" in row]


@pytest.mark.parametrize("strategy", strategies(ALL))
def test_killed_after_seven_steps_and_resumed_from_five_ends_in_the_same_bytes(tmp_path, strategy):
    undisturbed = run(tmp_path / "undisturbed", 2, strategy)
    with pytest.raises(worlds.Died, match="-9"):
        run(tmp_path / "killed", 2, strategy, die_after=7)
    assert [p.name for p in (tmp_path / "killed" / "checkpoints").iterdir()] == ["step-00000005"]
    assert len(toy.rows_of(tmp_path / "killed")) == 7  # two steps that will be rewound
    assert run(tmp_path / "killed", 2, strategy) == undisturbed


def test_poisoned_weights_are_not_saved(tmp_path):
    cfg = toy.Config(out=str(tmp_path / "run"), strategy="ddp", eval_every=100)
    with pytest.raises(worlds.Died, match="not finite at step 9"):
        worlds.launch(2, toy.train, cfg, env={"POISON_AT": 7})
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000005"]


def test_a_window_of_logged_steps_survives_a_resume(tmp_path):
    """A row is the mean over the steps since the last one; a checkpoint in between carries the sums."""
    whole = run(tmp_path / "whole", 2, "ddp", log_every=3)
    with pytest.raises(worlds.Died, match="-9"):
        run(tmp_path / "killed", 2, "ddp", log_every=3, die_after=7)
    assert run(tmp_path / "killed", 1, "single", log_every=3) == whole


@pytest.mark.parametrize("strategy", ["single", "fsdp"])
def test_hybrid_low_precision_remat_and_micro_batches_keep_the_bits(tmp_path, strategy):
    """bf16 with micro-batches: one process under one cast policy equals four in two nodes of two."""
    how = {"precision": "bf16", "micro_batch": 3, "steps": 4}
    one = run(tmp_path / "one", 1, strategy, **how)
    assert run(tmp_path / "ddp", 2, "ddp", **how) == one
    if strategy == "fsdp":
        assert run(tmp_path / "hybrid", 4, "hybrid", local_world=2, **how) == one
        assert run(tmp_path / "remat", 2, "fsdp", remat="full", **how) == one
        assert run(tmp_path / "selective", 2, "fsdp", remat="selective", **how) == one
        assert run(tmp_path / "async", 2, "fsdp", save_async=True, **how) == one


def test_fp16_keeps_its_scale_through_a_resume(tmp_path):
    how = {"precision": "fp16", "world": 2, "strategy": "fsdp"}
    whole = run(tmp_path / "whole", **how, clip=0.0)
    run(tmp_path / "halves", **how, clip=0.0, steps=5, eval_every=100)
    assert run(tmp_path / "halves", **how, clip=0.0)[0] == whole[0]


@needs_compiler
@pytest.mark.compiler
def test_zero_agrees_with_ddp_at_the_same_weights(tmp_path):
    """Loss and gradient norm of the first steps within 1e-6, on one process and on two; dropout off."""
    how = {"dropout": 0.0, "steps": 2, "lanes": 2}
    run(tmp_path / "ddp", 2, "ddp", **how)
    want = toy.rows_of(tmp_path / "ddp")
    for strategy in ("zero1", "zero2", "zero3"):
        for world in (1, 2):
            run(tmp_path / f"{strategy}-{world}", world, strategy, **how)
            got = toy.rows_of(tmp_path / f"{strategy}-{world}")
            assert got[0]["loss"] == pytest.approx(want[0]["loss"], rel=1e-6)
            assert got[0]["grad_norm"] == pytest.approx(want[0]["grad_norm"], rel=1e-6)
            assert got[1]["loss"] == pytest.approx(want[1]["loss"], rel=1e-5)  # after one update


@needs_compiler
@pytest.mark.compiler
def test_a_run_of_zero2_goes_on_under_fsdp_and_ddp(tmp_path):
    """zero2 on two processes -> fsdp on one -> ddp on three; beside it ddp throughout, equal to rounding."""
    how = {"dropout": 0.0, "lanes": 4, "eval_every": 100}
    out = tmp_path / "run"
    run(out, 2, "zero2", steps=4, **how)
    for path in (tmp_path / "fork", tmp_path / "zero3"):
        shutil.copytree(out, path)
    run(out, 1, "fsdp", steps=7, **how)
    run(out, 3, "ddp", steps=10, **how)
    run(tmp_path / "fork", 2, "ddp", steps=10, **how)
    assert toy.outcome(out)[0] == toy.outcome(tmp_path / "fork")[0]  # from one checkpoint on: the same bits
    run(tmp_path / "zero3", 2, "zero3", steps=10, **how)
    run(tmp_path / "ddp", 2, "ddp", steps=10, **how)
    for other in ("zero3", "ddp"):
        for a, b in zip(losses(out), losses(tmp_path / other), strict=True):
            assert a == pytest.approx(b, rel=2e-5), other


def test_more_processes_than_lanes_say_so(tmp_path):
    out = tmp_path / "run"
    run(out, 1, "single", lanes=2, steps=2, eval_every=100)
    run(out, 3, "ddp", lanes=-1, steps=4)
    assert '"kind": "lanes", "before": 2, "now": 3' in (out / "events.jsonl").read_text()
    assert [row["step"] for row in toy.rows_of(out)] == [1, 2, 2, 3, 4, 4]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_backends_own_reduction_agrees_to_rounding(tmp_path, strategy):
    run(tmp_path / "own", 2, strategy, lanes=0, dropout=0.0, steps=3)
    run(tmp_path / "tree", 2, strategy, lanes=2, dropout=0.0, steps=3)
    for a, b in zip(toy.rows_of(tmp_path / "own"), toy.rows_of(tmp_path / "tree"), strict=True):
        for k in a:
            assert a[k] == pytest.approx(b[k], rel=1e-4), k
