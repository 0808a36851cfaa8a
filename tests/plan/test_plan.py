"""The planner's words, its arithmetic and its refusals (half a minute)."""

import dataclasses
import math
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from dltrain.commands.plan import main, page
from dltrain.errors import UserError
from dltrain.plan.check import Training, predicted, work_of
from dltrain.plan.machines import MACHINES, machine
from dltrain.plan.memory import Place, lasting, sizes
from dltrain.plan.plan import fit, plan, refuse
from dltrain.plan.time import GPU_HOURS_TO_FAILURE, all_to_all, failures, ring
from dltrain.plan.trace import trace
from dltrain.recipes import bert_pretrain, gpt_pretrain, imagenet_train, simclr_pretrain

RECIPES = Path(gpt_pretrain.__file__).parent
GPT = gpt_pretrain.PRESETS
H100 = machine("h100")


def test_a_thousand_gpus_in_ten_seconds():
    command = ["plan", str(RECIPES / "gpt_pretrain.py"), "gpt3-xl", "--world", "1024", "--gpu", "h100"]
    before = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime  # of the tests before
    done = subprocess.run(
        [sys.executable, "-m", "dltrain", *command, "--batch", "1024", "--strategy", "fsdp", "--price", "2"],
        capture_output=True, text=True, check=True, env={"OMP_NUM_THREADS": "1", "PATH": ""},
    )  # fmt: skip
    assert "1.32G parameters, 1024 x h100" in done.stdout
    assert "failures expected" in done.stdout and "kWh" in done.stdout and "at 2 an hour" in done.stdout
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - before < 10


def test_every_conflict_at_once():
    cfg = dataclasses.replace(GPT["gpt2"], strategy="zero2", remat="selective", batch=500, keep=0, precision="fp32")
    with pytest.raises(UserError) as error:
        plan(gpt_pretrain, cfg, 64, H100)
    for word in ("keep (0)", "rows of a lane (500 / 100 lanes = 5)", "selective is not offered under zero2"):
        assert word in str(error.value)
    with pytest.raises(UserError, match="v100 has no bf16"):
        plan(gpt_pretrain, GPT["gpt2"], 8, machine("v100"))
    with pytest.raises(UserError, match="no machine 'h1000': choose one of h100"):
        machine("h1000")


@pytest.mark.parametrize(
    ("recipe", "preset"),
    [(gpt_pretrain, "gpt2"), (bert_pretrain, "paper"), (imagenet_train, "paper"), (simclr_pretrain, "gpu")],
)
def test_recipes_can_be_planned(recipe, preset):
    cfg = dataclasses.replace(recipe.PRESETS[preset], precision="bf16", strategy="ddp", lanes=8)
    planned = plan(recipe, cfg, 8, H100)
    assert 0 < planned.used(planned.flops.needed) < 0.8
    assert planned.memory.activations > planned.memory.batch > 0
    assert planned.step.compute > 0 and "MFU" in page(planned)


def test_what_does_not_fit_is_refused():
    cfg = dataclasses.replace(GPT["gpt3-13b"], strategy="ddp", batch=128)
    planned = plan(gpt_pretrain, cfg, 8, H100)
    with pytest.raises(UserError, match=r"of a h100's 80\.0GB"):
        refuse(planned)
    found = fit(gpt_pretrain, cfg, 64, H100)
    assert found and all(p.fits and p.cfg.strategy != "ddp" for p in found)
    assert [p.step.seconds for p in found] == sorted(p.step.seconds for p in found)


def test_rematerialisation_trades_memory_for_time():
    cfg = Training(precision="bf16", width=512, layers=6)
    none, selective, full = (
        trace(work_of(cfg), dataclasses.replace(cfg, remat=again), 8, H100) for again in ("none", "selective", "full")
    )
    assert none.kept > selective.kept > full.kept
    assert none.flops < full.flops and none.backward < full.backward
    assert none.layer > full.layer > 0


def test_layers_are_drawn_out():
    """Each further layer keeps the same."""
    cfg = Training(precision="fp32")
    few = [trace(work_of(dataclasses.replace(cfg, layers=n)), cfg, 4, None) for n in (3, 6, 12)]
    assert few[2].kept - few[1].kept == pytest.approx(2 * (few[1].kept - few[0].kept), rel=1e-6)


def test_shards_add_up():
    """Over all ranks the shards are the whole, wherever they are cut."""
    found, buffers = sizes(gpt_pretrain.work(GPT["debug"]))
    cfg = dataclasses.replace(GPT["debug"], strategy="fsdp")
    whole = sum(size.elements for size in found)
    for world in (1, 3, 7, 64):
        ranks = [lasting(found, buffers, cfg, Place(world, world, rank)) for rank in range(world)]
        assert sum(rank.parameters for rank in ranks) == sum(rank.gradients for rank in ranks) == 4 * whole


def test_rings_and_trees():
    size = 1e9
    assert ring(size, 8, H100) == pytest.approx(size * 7 / 8 / H100.link, rel=0.05)
    across = ring(size, 64, H100)
    assert across == pytest.approx(size * 7 / 8 / (8 * H100.network), rel=0.05)
    assert all_to_all(size, 64, H100) == pytest.approx(size * 56 / 64 / H100.network, rel=0.05)  # a NIC for itself


def test_young_and_daly():
    """With a short save the interval is Young's; the least is lost there."""
    found = failures(16_384, 54 * 24 * 3600.0, 10.0)
    assert found.expected == pytest.approx(419)
    mean = GPU_HOURS_TO_FAILURE * 3600 / 16_384
    assert found.interval == pytest.approx(math.sqrt(2 * 10 * mean), rel=0.05)
    assert 0 < failures(1024, 1e6, 10.0).lost < found.lost < 1


def test_machines():
    assert all(m.peak("fp32") and m.memory > 1e10 for m in MACHINES.values())
    assert predicted(Training(), gpu=False) > predicted(Training(batch=4), gpu=False)


def test_the_command_says_what_is_missing(capsys):
    with pytest.raises(UserError, match="which recipe"):
        main(["--world", "8"])
    with pytest.raises(UserError, match="study of many small runs"):
        main([str(RECIPES / "studies" / "double_descent_study.py")])
