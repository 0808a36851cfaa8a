"""Poisoned steps: found, and stopped, skipped or rolled back, with the same bits under every strategy. 3 minutes."""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import faulty
import numpy as np
import pytest
import torch
import toy
import worlds
from torch import nn

from dltrain import optim, rundir
from dltrain.average import Average, averaging
from dltrain.commands.data_explain import Stream
from dltrain.config import conflicts
from dltrain.data.loader import Loader
from dltrain.data.order import Order
from dltrain.data.ramp import Ramp
from dltrain.errors import UserError
from dltrain.gate import Gate
from dltrain.guard import IN_A_ROW, LEAST, WINDOW, Guard
from dltrain.skipped import Skipped, Window

CPU = torch.device("cpu")
WORLDS = [(1, "single"), (2, "ddp"), (2, "fsdp")]


def run(out: Path, world: int = 1, strategy: str = "single", env: dict | None = None, **changes: Any):
    cfg = dataclasses.replace(faulty.Config(out=str(out), strategy=strategy), **changes)  # type: ignore[arg-type]
    worlds.launch(world, faulty.train, cfg, env={"DIE_AFTER": -1, **(env or {})})
    return toy.outcome(out)


def events(out: Path, kind: str) -> list[dict]:
    return [e for e in rundir.read_rows(out / "events.jsonl") if e["kind"] == kind]


def steps_of(out: Path) -> list[int]:
    return [row["step"] for row in toy.rows_of(out) if "loss" in row]


# ---- the judge ----


def guard(tmp_path: Path, **changes: Any) -> Guard:
    return Guard(dataclasses.replace(toy.Config(), on_bad="skip", **changes), CPU, Skipped(tmp_path, {}))


def judged(guard: Guard, step: int, loss: float, norm: float = 1.0, sums: tuple[float, ...] = ()) -> bool:
    values = [torch.tensor(v, dtype=torch.float64) for v in (loss, norm, sums)]
    return bool(guard.judge(step, *values))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_bad(tmp_path, bad):
    judge = guard(tmp_path)
    for loss, norm, sums, why in (
        (bad, 1.0, (), r"the loss \((nan|-?inf)\) is not finite"),
        (1.0, bad, (), r"the gradient \(of norm .*\) is not finite"),
        (1.0, 1.0, (2.0, bad), "a batch norm is not finite"),
    ):
        assert not judged(judge, 1, loss, norm, sums)
        found = judge.look()
        assert found and found.step == 1 and re.search(why, found.why)
        assert judge.look() is None  # once
        assert judged(judge, 2, 1.0)
        assert judge.look() is None


def test_a_spike_is_told_from_the_good_steps_before(tmp_path):
    judge = guard(tmp_path, spike=3.0)
    noise = torch.Generator().manual_seed(0)
    losses = (5.0 + 0.1 * torch.randn(LEAST + 20, generator=noise, dtype=torch.float64)).tolist()
    assert judged(judge, 1, 50.0)  # before there are enough to compare with, nothing is a spike
    judge = guard(tmp_path, spike=3.0)
    for step, loss in enumerate(losses[:LEAST]):
        assert judged(judge, step, loss)
    for _ in range(3):  # a bad step is none of those that the next are compared with
        assert not judged(judge, 99, 5.5)
        found = judge.look()
        assert found and "is a spike (over 5." in found.why
    known = torch.tensor(losses[:LEAST], dtype=torch.float64)
    limit = float(known.mean() + 3.0 * known.std(correction=0))
    assert judged(judge, 100, limit - 1e-6)
    assert judged(judge, 101, 1.0)  # below is no spike
    judge.look()
    again = guard(tmp_path, spike=3.0)
    again.restore(json.loads(json.dumps(judge.state())))
    assert torch.equal(again.losses_W.nan_to_num(-1.0), judge.losses_W.nan_to_num(-1.0))
    full = guard(tmp_path, spike=3.0)
    assert all(judged(full, step, 100.0 - step) for step in range(2 * WINDOW))
    assert full.losses_W.tolist() == [100.0 - step for step in range(WINDOW, 2 * WINDOW)]  # the last ones


def test_skipping_and_going_back_end(tmp_path):
    judge = guard(tmp_path)
    for step in range(1, IN_A_ROW):
        judged(judge, step, float("nan"))
        assert judge.look()
    judged(judge, 8, float("nan"))
    with pytest.raises(UserError, match=r"step 8: not saved.* so were the 7 steps before"):
        judge.look()
    judge = Guard(dataclasses.replace(toy.Config(), on_bad="rollback", rollbacks=1), CPU, Skipped(tmp_path, {}))
    judged(judge, 1, float("nan"))
    assert judge.look()
    judge.skipped.windows.append(Window(0, 10, "why"))
    judged(judge, 1, float("nan"))
    with pytest.raises(UserError, match="it went back 1 times"):
        judge.look()


def test_what_cannot_be_is_refused():
    for changes, why in (
        ({"strategy": "zero2", "on_bad": "skip"}, "on_bad skip is not offered under zero2"),
        ({"precision": "fp16", "on_bad": "skip"}, "fp16 skips what overflows by itself"),
        ({"on_bad": "rollback", "save_every": 0}, "give --save_every"),
    ):
        cfg = dataclasses.replace(toy.Config(lanes=1), **changes)
        assert [c for c in conflicts(cfg, 1, 1) if why in c]


# ---- the gate ----

BUILDERS = {
    "adamw": optim.adamw(0.1),
    "lamb": optim.lamb(0.1),
    "sgd": optim.sgd(0.1, momentum=0.9),
    "lars": optim.lars(0.1),
    "adam": lambda module: torch.optim.Adam(module.parameters(), 0.1),
    "rmsprop": lambda module: torch.optim.RMSprop(module.parameters(), 0.1, momentum=0.5),
}


@pytest.mark.parametrize("name", [*BUILDERS, "average"])
@pytest.mark.parametrize("first", [True, False])
def test_a_step_that_is_not_good_leaves_all_bits(name, first):
    """The first step of all too, at which moments are made."""

    def trained(faults: set[int]) -> list[torch.Tensor]:
        torch.manual_seed(0)
        module = nn.ModuleDict({"net": nn.Linear(5, 3), "average": Average(nn.Linear(5, 3), 0.9)})
        build = BUILDERS.get(name) or averaging(BUILDERS["adamw"], lambda m: (m["net"], m["average"]))
        optimizer: Any = build(module["net"] if name != "average" else module)
        gate = Gate(module, optimizer)
        for step in range(6):
            bad = step in faults
            for p in module["net"].parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
                if bad:
                    p.grad[0] = torch.nan
            if bad and -1 in faults:  # left out altogether
                continue

            def update(good: torch.Tensor | None = None) -> None:
                optimizer.step() if good is None else optimizer.step(good=good)

            gate.through(update, torch.tensor(not bad))
            if bad:
                gate.take_back()
        states = [t for s in optimizer.state.values() for t in s.values()]
        return [t.detach().clone() for t in (*module.parameters(), *module.buffers(), *states)]

    faults = {0, 3} if first else {2, 3}
    got, want = trained(faults), trained(faults | {-1})
    assert len(got) == len(want) > 2
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


# ---- skip ----


@pytest.fixture(scope="module")
def left_out(tmp_path_factory):
    """A run in which step 6 (from 0) was computed and not taken, by other means."""
    out = tmp_path_factory.mktemp("left_out") / "run"
    worlds.launch(1, faulty.train_leaving_out, faulty.Config(out=str(out), strategy="single", on_bad="skip"), 6)
    return toy.outcome(out)[0], [row for row in toy.rows_of(out) if row["step"] != 7]


@pytest.mark.parametrize("kind", ["loss", "gradient", "sample"])
def test_a_skipped_step_is_a_step_that_did_not_count(tmp_path, left_out, kind):
    got = [run(tmp_path / f"{s}{w}", w, s, on_bad="skip", faults=f"{kind}@6") for w, s in WORLDS]
    assert got[0] == got[1] == got[2]
    assert got[0][0] == left_out[0]
    rows = [row for row in toy.rows_of(tmp_path / "fsdp2") if row["step"] != 7 and "loss" in row]
    assert rows == left_out[1]
    (event,) = events(tmp_path / "ddp2", "skip")
    assert event["step"] == 7 and "not finite" in event["why"]
    assert list(rundir.read_json(tmp_path / "ddp2" / "skipped.json")["steps"]) == ["7"]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_host_that_learns_of_it_one_step_late_has_the_same_bits(tmp_path, optimizer):
    """As it is on a GPU. Two bad steps in a row, one of them at a save."""
    how: dict[str, Any] = {"on_bad": "skip", "faults": "loss@6 gradient@7", "optimizer": optimizer}
    got = run(tmp_path / "late", env={"LATE": "1"}, **how)
    assert got == run(tmp_path / "at-once", **how)
    assert [e["step"] for e in events(tmp_path / "late", "skip")] == [7, 8]


def test_a_skip_that_nobody_can_see_again_is_kept(tmp_path):
    """A fault of the machine: killed after it and resumed before it, the run skips the step all the same."""
    how: dict[str, Any] = {"on_bad": "skip", "transient": "loss@5"}
    whole = run(tmp_path / "whole", **how)
    with pytest.raises(worlds.Died, match="-9"):
        run(tmp_path / "killed", 2, "ddp", env={"DIE_AFTER": "7"}, **how)
    assert run(tmp_path / "killed", 2, "fsdp", **how) == whole
    (tmp_path / "told").mkdir()
    (tmp_path / "told" / "skipped.json").write_bytes((tmp_path / "whole" / "skipped.json").read_bytes())
    assert run(tmp_path / "told", on_bad="stop") == whole


def test_skipping_ends_where_it_does_not_help(tmp_path):
    with pytest.raises(worlds.Died, match=r"not finite at step 11: not saved; .* so were the 7 steps before"):
        run(tmp_path / "run", 2, "fsdp", env={"POISON_AT": "2"}, on_bad="skip")
    assert [e["step"] for e in events(tmp_path / "run", "skip")] == [*range(4, 11)]


# ---- rollback ----


@pytest.fixture(scope="module")
def rolled_back(tmp_path_factory):
    """A sample is NaN at step 6 (from 0): back to 4, on with what step 7 would have read."""
    out = tmp_path_factory.mktemp("rolled_back") / "run"
    return out, run(out, on_bad="rollback", faults="sample@6")


def test_a_rollback_leaves_out_the_window_and_rewinds_the_metrics(rolled_back):
    out, _ = rolled_back
    assert steps_of(out) == list(range(1, 13))
    assert all(float(v) == float(v) for row in toy.rows_of(out) for v in row.values())
    (event,) = events(out, "rollback")
    assert (event["step"], event["to"], event["rows"]) == (7, 4, 3 * 24)
    assert rundir.read_json(out / "skipped.json")["windows"][0][:2] == [4, 72]
    data = rundir.read_json(out / "checkpoints" / "step-00000012" / "state.json")["data"]
    assert (data["position"], data["skipped"]) == (12 * 24 + 72, 72)


@pytest.mark.parametrize(("world", "strategy"), WORLDS[1:])
def test_a_rollback_has_the_same_bits_everywhere(tmp_path, rolled_back, world, strategy):
    assert run(tmp_path / "run", world, strategy, on_bad="rollback", faults="sample@6") == rolled_back[1]
    late = run(tmp_path / "late", world, strategy, env={"LATE": "1"}, on_bad="rollback", faults="sample@6")
    assert late == rolled_back[1]


def test_a_run_that_is_told_what_to_leave_out_has_the_same_bits(tmp_path, rolled_back):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "skipped.json").write_bytes((rolled_back[0] / "skipped.json").read_bytes())
    assert run(tmp_path / "run", 2, "fsdp") == rolled_back[1]
    assert events(tmp_path / "run", "rollback") == []


def test_killed_after_a_rollback_and_resumed_is_the_rollback_undisturbed(tmp_path):
    """Of a fault that does not come again."""
    how: dict[str, Any] = {"on_bad": "rollback", "transient": "gradient@6"}
    whole = run(tmp_path / "whole", **how)
    with pytest.raises(worlds.Died, match="-9"):
        run(tmp_path / "killed", 2, "fsdp", env={"DIE_AFTER": "7"}, **how)
    assert len(events(tmp_path / "killed", "rollback")) == 1
    assert run(tmp_path / "killed", 2, "ddp", **how) == whole


def test_rollbacks_in_a_row_widen_the_window_and_end(tmp_path):
    """The second fault lies in what is read instead: step 6 then reads what was step 9's."""
    how: dict[str, Any] = {"on_bad": "rollback", "faults": "loss@6 gradient@9 loss@20"}
    one = run(tmp_path / "one", **how)
    windows = rundir.read_json(tmp_path / "one" / "skipped.json")["windows"]
    assert [window[:2] for window in windows] == [[4, 72], [4, 72]]
    assert run(tmp_path / "two", 2, "fsdp", workers=1, **how) == one
    with pytest.raises(worlds.Died, match=r"gradient .* at step 7: .* it went back 1 times"):
        run(tmp_path / "once", rollbacks=1, **how)
    assert run(tmp_path / "once", **how) == one  # more of them were allowed in the next launch


def test_the_first_steps_too(tmp_path):
    """There is nothing to go back to but the beginning; and an average beside the weights begins as it would have."""
    got = run(tmp_path / "run", on_bad="rollback", faults="loss@1")
    assert [window[:2] for window in rundir.read_json(tmp_path / "run" / "skipped.json")["windows"]] == [[0, 48]]
    assert run(tmp_path / "two", 2, "fsdp", on_bad="rollback", faults="loss@1") == got


# ---- spikes, stop, none ----


def test_a_spike_is_recovered_under_each_policy(tmp_path):
    how: dict[str, Any] = {
        "steps": 48,
        "save_every": 10,
        "eval_every": 0,
        "spike": 8.0,
        "faults": "spike@43",
        "dropout": 0.0,
    }
    with pytest.raises(worlds.Died, match=r"is a spike .* at step 44: not saved"):
        run(tmp_path / "stop", 2, "ddp", **how)
    for policy in ("skip", "rollback"):
        got = run(tmp_path / policy, on_bad=policy, **how)
        assert run(tmp_path / f"{policy}-2", 2, "fsdp", on_bad=policy, **how) == got
        assert steps_of(tmp_path / policy) == list(range(1, 49))
        assert [e["step"] for e in events(tmp_path / policy, policy)] == [44]


def test_the_detector_goes_on_where_it_was(tmp_path):
    how: dict[str, Any] = {
        "steps": 48,
        "save_every": 10,
        "eval_every": 0,
        "spike": 8.0,
        "faults": "spike@43",
        "dropout": 0.0,
    }
    whole = run(tmp_path / "whole", on_bad="skip", **how)
    with pytest.raises(worlds.Died, match="-9"):
        run(tmp_path / "killed", on_bad="skip", env={"DIE_AFTER": "42"}, **how)
    assert run(tmp_path / "killed", on_bad="skip", **how) == whole


def test_stop_says_where_and_saves_nothing(tmp_path):
    with pytest.raises(worlds.Died, match=r"the gradient \(of norm nan\) is not finite at step 7: not saved"):
        run(tmp_path / "run", 2, "ddp", faults="gradient@6")
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["step-00000004"]
    got = run(tmp_path / "run", 2, "ddp", on_bad="skip", faults="gradient@6")  # the advice, taken
    assert got == run(tmp_path / "skip", on_bad="skip", faults="gradient@6")


def test_without_faults_the_policy_changes_no_bit(tmp_path):
    stop = run(tmp_path / "stop")
    for policy in ("skip", "rollback"):
        assert run(tmp_path / policy, on_bad=policy, spike=6.0) == stop


# ---- positions ----


def test_jumps_add_up_and_a_lost_record_is_noticed():
    def loader(*jumps: tuple[int, int]) -> Loader:
        ramp = Ramp(((0, 4), (16, 8)))
        return Loader(toy.ToyRows(), Order(100, 1), batch=ramp, lanes=2, micro_batch=2, workers=0, jumps=jumps)

    plain, jumped = loader(), loader((2, 8), (2, 4), (5, 8))
    assert [jumped.start(s) - plain.start(s) for s in range(7)] == [0, 0, 12, 12, 12, 20, 20]
    assert [jumped.end(s) - plain.end(s) for s in range(7)] == [0, 0, 0, 12, 12, 12, 20]
    (micros,) = jumped.steps(2, 3, [1])
    want = toy.ToyRows().batch(*Order(100, 1).at(np.array([8 + 12 + 2, 8 + 12 + 3])))
    assert torch.equal(micros[0].batch["ids_ML"], want["ids_ML"])
    stream = Stream(jumped.order, jumped.ramp, 2, 2, False, 1, None, skipped=jumped.jumps)
    assert [at.tolist() for _, _, at in stream.rows(2, 0)] == [[20, 21], [22, 23]]
    loader((2, 8), (2, 4), (5, 8)).check(jumped.state(6))
    loader((2, 8), (2, 4), (5, 8), (6, 8)).check(jumped.state(6))  # a window that begins at the checkpoint came later
    with pytest.raises(UserError, match=r"skipped.json tells of 0 rows .* the checkpoint of 20"):
        plain.check(jumped.state(6))
