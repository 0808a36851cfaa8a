"""Where devices compute, hosts tell one another of signals beside them. Here the CPU stands for the device."""

import dataclasses
import json
import os
import signal
import time

import pytest
import torch.distributed as dist
import toy
import worlds

from dltrain.world import World

AT = 3  # steps before the signal


def train(cfg: toy.Config, where: str) -> None:
    """`toy.train` with notes aside. Rank 1 gets a signal while its fourth step is in "forward", or waits for "data"."""
    join, forward, batch, me = World.join, toy.Toy.forward, toy.ToyRows.batch, os.environ["RANK"]
    calls = {"forward": 0, "data": 0}

    def join_aside(self: World) -> None:
        join(self)
        self.aside = dist.new_group(backend="gloo")

    def here(place: str) -> bool:
        calls[place] += 1
        return (calls[place], place, me) == (AT * cfg.lanes // 2 + 1, where, "1")

    def signalled(self, inputs):
        if here("forward"):
            os.kill(os.getpid(), signal.SIGUSR1)
        return forward(self, inputs)

    def stalled(self, epoch_M, index_M):
        if here("data"):
            os.kill(os.getpid(), signal.SIGUSR1)
            time.sleep(30)
        return batch(self, epoch_M, index_M)

    World.join, toy.Toy.forward, toy.ToyRows.batch = join_aside, signalled, stalled  # type: ignore[method-assign]
    toy.train(cfg)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
@pytest.mark.parametrize("where", ["forward", "data"])
def test_a_signal_to_one_ends_all_after_the_same_step_and_costs_nothing(tmp_path, strategy, where):
    cfg = toy.Config(out=str(tmp_path / "run"), strategy=strategy, eval_every=100)
    with pytest.raises(worlds.Died, match="SystemExit: 75"):
        worlds.launch(2, train, cfg, where)
    events = [json.loads(line) for line in (tmp_path / "run/events.jsonl").read_text().splitlines()]
    (left,) = [event["step"] for event in events if event["kind"] == "signal"]
    assert left == AT + (where == "forward")
    worlds.launch(2, train, cfg, "nowhere")
    whole = dataclasses.replace(cfg, out=str(tmp_path / "whole"))
    worlds.launch(2, toy.train, whole)
    assert toy.outcome(tmp_path / "run") == toy.outcome(tmp_path / "whole")
