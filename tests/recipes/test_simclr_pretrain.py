"""SimCLR: what it says of itself is true of a run of seconds; one process, two or sharded, the same bytes."""

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import worlds
from PIL import Image
from torch import Tensor
from torch.func import functional_call

from dltrain import checkpoint
from dltrain.data.order import Order
from dltrain.initial import fill, leaves
from dltrain.models.simclr import nt_xent
from dltrain.recipes.simclr_pretrain import PRESETS, Config, SimCLR, main, rows_of, views_of
from dltrain.seeds import key

DEBUG = dataclasses.replace(PRESETS["debug"], steps=4)


def run(out: Path, world: int, strategy: str, **changes) -> tuple[str, bytes]:
    cfg = dataclasses.replace(DEBUG, out=str(out), strategy=strategy, **changes)
    worlds.launch(world, main, cfg)
    return toy.outcome(out)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> tuple[Path, tuple[str, bytes]]:
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, run(out, 1, "single", micro_batch=3)


@pytest.mark.parametrize(("strategy", "world"), [("ddp", 2), ("fsdp", 3)])
def test_several_processes_give_the_bits_of_one(tmp_path, whole, strategy, world):
    """Four lanes of two micro-batches: three processes that shard have company in the last round."""
    assert run(tmp_path / "run", world, strategy, micro_batch=3) == whole[1]


def test_killed_and_resumed_sharded(tmp_path, whole):
    out = tmp_path / "run"
    run(out, 1, "single", micro_batch=3, save_every=1, keep=9)
    for path in checkpoint.steps(out / "checkpoints")[2:]:
        shutil.rmtree(path)  # as if killed after two steps
    assert run(out, 2, "fsdp", micro_batch=3) == whole[1]


def test_what_a_run_leaves(whole):
    out, _ = whole
    rows = toy.rows_of(out)
    (judged,) = [row for row in rows if "eval/linear" in row]
    assert all(0 <= judged[f"eval/{name}"] <= 1 for name in ("linear", "nearest", "linear_on_z"))
    assert all(0 <= row["top1"] <= 1 for row in rows if "top1" in row)
    with Image.open(out / "neighbours.png") as sheet:
        assert sheet.width >= 8 * 16 and sheet.height >= 8 * 16
    assert b"data:image/png;base64," in (out / "report.html").read_bytes()


def first_step(cfg: Config) -> tuple[float, float]:
    """Loss and gradient norm of the first step by plain autograd through all of it; batch norm has the same cuts."""
    task, (rows, _, _) = SimCLR(cfg), rows_of(cfg)
    fill(task, leaves(task), cfg.seed)
    order = Order(len(rows), key("order", cfg.seed)).at(np.arange(cfg.batch))
    micro = cfg.micro_batch or cfg.batch // cfg.lanes
    batches = [rows.batch(*(part[i : i + micro] for part in order)) for i in range(0, cfg.batch, micro)]
    weights = dict(task.named_parameters())

    def project(batch: dict[str, Tensor]) -> Tensor:
        own = {name: b.clone() for name, b in task.named_buffers()}  # batch norm writes to its buffers in every forward
        _, z_NZ = functional_call(task, weights | own, (views_of(cfg, batch),))
        return z_NZ.unflatten(0, (2, -1)).transpose(0, 1)

    z_B2Z = torch.cat([project(batch) for batch in batches])
    loss = nt_xent(z_B2Z, torch.ones(cfg.batch), cfg.temperature)["loss"].mean()
    loss.backward()
    return float(loss.detach()), float(
        torch.cat([p.grad.flatten() for p in weights.values() if p.grad is not None]).norm()
    )


@pytest.mark.parametrize(("lanes", "micro_batch"), [(1, 0), (2, 4)])
def test_negatives_in_other_micro_batches_have_their_gradient(tmp_path, lanes, micro_batch):
    cfg = dataclasses.replace(DEBUG, out=str(tmp_path / "run"), lanes=lanes, micro_batch=micro_batch, steps=1)
    worlds.launch(1, main, cfg)
    (row,) = [row for row in toy.rows_of(tmp_path / "run") if "loss" in row]
    assert (row["loss"], row["grad_norm"]) == pytest.approx(first_step(cfg), rel=1e-5)


def test_zero_with_lars_and_the_checklist_are_refused(tmp_path):
    for changes, why in [({"strategy": "zero1"}, "lars needs whole tensors"), ({"debug": True}, "couples them")]:
        with pytest.raises(worlds.Died, match=why):
            worlds.launch(1, main, dataclasses.replace(DEBUG, out=str(tmp_path / "run"), **changes))


def test_a_view_depends_on_its_seed_and_row_alone():
    rows, _, _ = rows_of(DEBUG)
    epoch, index = np.ones(8, np.int64), np.arange(8)
    views = views_of(DEBUG, rows.batch(epoch, index))
    again = views_of(DEBUG, rows.batch(epoch[:2], index[2:4]))
    torch.testing.assert_close(again, views[[2, 3, 10, 11]])
    assert not torch.equal(views[:8], views[8:])
    assert float(views.min()) >= 0 and float(views.max()) <= 1


def test_sizes_of_the_papers_networks():
    """ResNet-50's 23,508,032 parameters without its classifier, and a head of 2048 x 2048 and 2048 x 128."""
    with torch.device("meta"):
        tasks = {name: SimCLR(PRESETS[name]) for name in ("paper", "gpu")}
    sizes = {name: sum(p.numel() for p in task.parameters()) for name, task in tasks.items()}
    assert sizes == {"paper": 23_508_032 + 2048 * 2049 + 2048 * 128, "gpu": 11_168_832 + 512 * 513 + 512 * 128}
