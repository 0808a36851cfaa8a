"""FLOPs counted without memory, against those that torch counts in a recipe's own training (20 s)."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from dltrain.flops import Work, count, parameters
from dltrain.recipes import (
    bert_pretrain,
    dqn_train,
    gan_train,
    gpt_pretrain,
    imagenet_train,
    simclr_pretrain,
)
from dltrain.run import Run

LANE = {"lanes": 1, "save_every": 0, "eval_every": 0}


class OneModule:
    """A tracker of modules that always sees the whole."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


def trained(monkeypatch: pytest.MonkeyPatch, recipe: Any, cfg: Any) -> tuple[float, float]:
    """FLOPs of a row by torch's counter around the steps of a run, from fetching the data to the update; and what the
    run told its meter."""
    counter, told, fetch, step = FlopCounterMode(display=False), [], Run.fetch, Run.step
    counter.mod_tracker = OneModule()  # type: ignore  # torch's own knows no torch.autograd.grad, as in a gradient penalty

    def begin(run: Run, data: Any) -> Any:
        counter.__enter__()
        return fetch(run, data)

    def end(run: Run) -> Any:
        counter.__exit__(None, None, None)
        total.append(counter.get_total_flops())
        return step(run)

    def measure(run: Run, work: Work) -> None:
        told.append(count(work, run.cfg.batch).full)

    total: list[float] = []
    monkeypatch.setattr(Run, "fetch", begin)
    monkeypatch.setattr(Run, "step", end)
    monkeypatch.setattr(Run, "measure", measure)
    with sdpa_kernel(SDPBackend.MATH):  # others make the scores again in backward
        recipe.main(cfg)
    return sum(total) / len(total) / cfg.batch, told[0]


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (bert_pretrain, {}),
        (gpt_pretrain, {}),
        (gpt_pretrain, {"pack": False, "post_norm": True}),
        (imagenet_train, {}),
        (imagenet_train, {"model": "alexnet", "size": 67, "width": 0, "zero_gamma": False}),
        (gan_train, {"steps": 12}),  # two rounds of five turns of the critic and one of the generator
        (gan_train, {"steps": 2, "objective": "gan", "critic_steps": 1}),
        (simclr_pretrain, {}),
        (dqn_train, {}),
    ],
    ids=lambda value: value if isinstance(value, dict) else getattr(value, "__name__", "").split(".")[-1],
)
def test_what_the_meter_is_told_is_what_torch_counts(
    recipe: Any, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    cfg = replace(recipe.PRESETS["debug"], **({"steps": 2} | LANE | changes), out=str(tmp_path / "run"))
    counted, told = trained(monkeypatch, recipe, cfg)
    assert told == pytest.approx(counted, rel=0.005)


def layer(cfg: Any) -> int:
    """Multiply-adds of a token: q, k, v; output; feed-forward; scores and weighted values."""
    D = cfg.width
    return 3 * D * D + D * D + 2 * D * 4 * D + 2 * cfg.row * D


@pytest.mark.parametrize("again", ["none", "selective", "full"])
def test_a_stack_is_drawn_out(again: str):
    """Of twelve layers two counts of few give what one of all does, and what the formula has."""
    cfg = replace(gpt_pretrain.PRESETS["gpt2"], layers=12, width=64, heads=2, row=32, vocab=211)
    work = gpt_pretrain.work(cfg)
    found = count(work, 3, again)
    each = [count(gpt_pretrain.work(replace(cfg, layers=n)), 3, again).run for n in (2, 3)]
    assert found.run == each[0] + 10 * (each[1] - each[0])
    assert found.full == 6 * cfg.row * (12 * layer(cfg) + cfg.width * cfg.vocab)
    whole = count(replace(work, task=lambda: Apart(work.task())), 3, again)
    assert whole == found
    assert found.run > found.full if again == "full" else found.run == found.full


class Apart(torch.nn.Module):
    """A task whose layers no one sees to be alike."""

    def __init__(self, task: torch.nn.Module):
        super().__init__()
        self.task = task
        for n, layer in enumerate(task.model.layers):  # type: ignore[union-attr, arg-type]
            layer.extra_repr = lambda n=n: str(n)

    def forward(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return self.task(batch)


def test_conventions():
    cfg = gpt_pretrain.PRESETS["gpt2"]
    found, L, D = count(work := gpt_pretrain.work(cfg), 1), cfg.row, cfg.width
    attention = 12 * cfg.layers * D * L * L
    assert found.by_parameters == 6 * parameters(work) * L + attention
    assert found.needed == found.full - attention / 2 == found.run - attention / 2
    look_ups = found.by_parameters - found.full  # positions, biases and norms; the tokens' table is the output layer
    assert 0 < look_ups < 0.01 * found.full


def test_bert_predicts_few_positions():
    cfg = bert_pretrain.PRESETS["paper"]
    predicted, D = max(1, round(cfg.row * cfg.masked)), cfg.width
    heads = predicted * (D * D + D * cfg.vocab) + D * D + 2 * D  # masked LM; the pooler and the next sentence's two
    formula = 6 * (cfg.row * cfg.layers * layer(cfg) + heads)
    found = count(bert_pretrain.work(cfg), 1)
    assert found.full == found.needed == formula
