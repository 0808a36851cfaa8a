"""Running statistics: torch's own with one lane; one update a step, of the same bits on any number of processes."""

import dataclasses
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
import worlds
from torch import Tensor, nn

import dltrain
from dltrain import checkpoint
from dltrain.loop import fit
from dltrain.models.batch_norm import BatchNorm, Statistics
from dltrain.models.image_layers import Conv, Linear
from dltrain.optim import sgd
from dltrain.run import Run
from dltrain.schedules import linear

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="a C++ compiler is needed")
MOMENTUM = 0.3  # large, so that a mistake shows


@dataclass(frozen=True, kw_only=True)
class Config(dltrain.Config):
    steps: int = 4
    batch: int = 24
    lanes: int = 3
    log_every: int = 1
    save_every: int = 2
    idle: bool = True


class Images:
    """Random images of 6 pixels whose brightness grows with their number, so that no two lanes look alike."""

    fingerprint = "images"

    def __len__(self) -> int:
        return 50

    def batch(self, epoch_B: np.ndarray, index_B: np.ndarray) -> dict[str, Tensor]:
        images = [np.random.default_rng(int(i) + 1).normal(i / 10, 1, (3, 6, 6)) for i in index_B]
        weights_B = torch.from_numpy((index_B >= 0).astype(np.float32))
        labels_B = torch.from_numpy(index_B % 4).long()
        return {
            "images_BCHW": torch.from_numpy(np.stack(images)).float(), "labels_B": labels_B, "weights_B": weights_B,
            "count": weights_B.sum().long(),
        }  # fmt: skip


class Unit(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = Conv(5, 5, 3), BatchNorm(5, momentum=MOMENTUM)

    def forward(self, h_BCHW: Tensor) -> Tensor:
        return h_BCHW + self.norm(self.conv(h_BCHW)).relu()


class Net(nn.Module):
    """A norm of images in the root, one in every unit, one of vectors, and a frozen copy that has no forward."""

    def __init__(self, idle: bool):
        super().__init__()
        self.stem, self.norm = Conv(3, 5, 3), BatchNorm(5, momentum=MOMENTUM)
        self.blocks = nn.ModuleList(Unit() for _ in range(2))
        self.last, self.fc = BatchNorm(5, momentum=0.1), Linear(5, 4)
        self.idle = BatchNorm(2).requires_grad_(False) if idle else None

    def forward(self, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        h_BCHW = self.norm(self.stem(batch["images_BCHW"])).relu()
        for block in self.blocks:
            h_BCHW = block(h_BCHW)
        logits_BK = self.fc(self.last(h_BCHW.mean((2, 3)))).float()
        loss_B = nn.functional.cross_entropy(logits_BK, batch["labels_B"], reduction="none")
        return {"loss": (loss_B * batch["weights_B"]).sum()}


def train(cfg: Config) -> None:
    with Run(cfg) as run:
        task, optimizer = run.prepare(lambda: Net(cfg.idle), sgd(0.05, 0.9))
        fit(run, task, optimizer, linear(1, 20), run.batches(Images()), evals={"eval": Images()})


def run(out: Path, world: int = 1, strategy: str = "single", local_world: int = 0, **changes) -> tuple[str, bytes]:
    cfg = dataclasses.replace(Config(out=str(out), strategy=strategy), **changes)  # type: ignore[arg-type]
    worlds.launch(world, train, cfg, local_world=local_world, env={"DLTRAIN_DEVICE": "cpu"})
    return toy.outcome(out)


def weights(out: Path) -> dict[str, Tensor]:
    return checkpoint.read(checkpoint.steps(out / "checkpoints")[-1])


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    """One process, three lanes of two micro-batches, four steps."""
    return run(tmp_path_factory.mktemp("one") / "run", micro_batch=4)


def step_of(layer: nn.Module, *micro_batches: Tensor) -> None:
    statistics = Statistics(layer)
    taken = []
    for h in micro_batches:
        layer(h)
        taken.append(torch.cat(statistics.take()))
    statistics.update(torch.stack(taken).sum(0))


@pytest.mark.parametrize(("torchs", "shape"), [(nn.BatchNorm2d, (6, 5, 4, 3)), (nn.BatchNorm1d, (6, 5))])
def test_it_is_torchs_layer_with_one_micro_batch_a_step(torchs, shape):
    theirs, ours = torchs(5, eps=1e-3, momentum=MOMENTUM), BatchNorm(5, eps=1e-3, momentum=MOMENTUM)
    nn.init.uniform_(theirs.weight)
    ours.load_state_dict(theirs.state_dict())
    for seed in range(3):
        h = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3 + seed
        a, b = h.clone().requires_grad_(), h.clone().requires_grad_()
        out, want = ours(a), theirs(b)
        out.square().sum().backward()
        want.square().sum().backward()
        assert torch.equal(out, want) and torch.equal(a.grad, b.grad)  # pyright: ignore
        step_of(ours, h)
    state = theirs.state_dict()
    assert state.keys() == ours.state_dict().keys()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, state[name])
    torch.testing.assert_close(ours.eval()(h), theirs.eval()(h))


def test_a_step_blends_the_mean_of_its_micro_batches_once():
    parts = [torch.randn(4, 5, 3, 3, generator=torch.Generator().manual_seed(i)) + i for i in range(3)]
    layer = BatchNorm(5, momentum=MOMENTUM)
    step_of(layer, *parts)
    mean = torch.stack([p.mean((0, 2, 3)) for p in parts]).mean(0)
    var = torch.stack([p.transpose(0, 1).flatten(1).var(1) for p in parts]).mean(0)
    torch.testing.assert_close(layer.running_mean, MOMENTUM * mean)
    torch.testing.assert_close(layer.running_var, 1 - MOMENTUM + MOMENTUM * var)
    assert layer.num_batches_tracked == 1


def test_low_precision_keeps_statistics_in_float32():
    h = torch.randn(64, 5, 8, 8, generator=torch.Generator().manual_seed(0)) + 100
    layer = BatchNorm(5, momentum=1.0)
    assert layer(h.bfloat16()).dtype == torch.bfloat16
    step_of(layer, h.bfloat16())
    torch.testing.assert_close(layer.running_mean, h.bfloat16().float().mean((0, 2, 3)), rtol=1e-5, atol=0)


def test_evaluation_moves_nothing_and_a_checkpoint_holds_no_more_than_torchs():
    layer = BatchNorm(5).eval()
    before = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    step_of(layer, torch.randn(4, 5) + 3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in layer.state_dict().items())


def test_the_last_scale_may_begin_at_zero():
    assert not BatchNorm(5, gamma=0.0)(torch.randn(4, 5)).any()


# --- under Run --------------------------------------------------------------------------------------------------------


def test_running_statistics_move_and_an_idle_layers_do_not(tmp_path):
    run(tmp_path / "run")
    found = weights(tmp_path / "run")
    for name in ("norm", "blocks.0.norm", "blocks.1.norm", "last"):
        assert found[f"{name}.running_mean"].abs().max() > 0.01 and found[f"{name}.num_batches_tracked"] == 4
    assert not found["idle.running_mean"].any() and found["idle.num_batches_tracked"] == 0


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_bits_of_one_process_on_any_number(tmp_path, one, strategy, world):
    """Two processes of fsdp run a fourth lane for company: it counts for nothing."""
    assert run(tmp_path / "run", world, strategy, micro_batch=4) == one


def test_a_resume_on_other_processes_is_exact(tmp_path, one):
    run(tmp_path / "run", 2, "fsdp", micro_batch=4, steps=2)
    assert run(tmp_path / "run", 3, "ddp", micro_batch=4)[0] == one[0]


@pytest.mark.parametrize("remat", ["full", "selective"])
def test_a_forward_that_runs_twice_counts_once(tmp_path, one, remat):
    assert run(tmp_path / "run", 2, "fsdp", micro_batch=4, remat=remat) == one


def test_bfloat16_on_one_two_and_four_processes(tmp_path):
    how = {"precision": "bf16", "lanes": 4, "micro_batch": 3}
    want = run(tmp_path / "one", **how)
    assert {t.dtype for n, t in weights(tmp_path / "one").items() if "running" in n} == {torch.float32}
    assert run(tmp_path / "ddp", 2, "ddp", **how) == want
    assert run(tmp_path / "fsdp", 2, "fsdp", **how, remat="full") == want
    assert run(tmp_path / "hybrid", 4, "hybrid", local_world=2, **how) == want


@needs_compiler
@pytest.mark.compiler
def test_compiled_units_agree_to_rounding(tmp_path, one):
    run(tmp_path / "run", compile=True, micro_batch=4, remat="full")
    run(tmp_path / "plain", micro_batch=4)
    for name, tensor in weights(tmp_path / "plain").items():
        torch.testing.assert_close(weights(tmp_path / "run")[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_backends_own_reduction_agrees_to_rounding(tmp_path, strategy):
    run(tmp_path / "own", 2, strategy, lanes=0)
    run(tmp_path / "tree", 2, strategy, lanes=2)
    for name, tensor in weights(tmp_path / "tree").items():
        torch.testing.assert_close(weights(tmp_path / "own")[name], tensor, rtol=1e-4, atol=1e-5)


@needs_compiler
@pytest.mark.compiler
@pytest.mark.parametrize(
    "strategy",
    [pytest.param("zero1", marks=pytest.mark.long), "zero2", pytest.param("zero3", marks=pytest.mark.long)],
)
def test_deepspeed_agrees_to_rounding_and_resumes_exactly(tmp_path, strategy):
    how = {"lanes": 2, "idle": False}  # DeepSpeed wants every parameter in the loss
    run(tmp_path / "ddp", 2, "ddp", **how)
    whole = run(tmp_path / "zero", 2, strategy, **how)
    for name, tensor in weights(tmp_path / "ddp").items():
        torch.testing.assert_close(weights(tmp_path / "zero")[name], tensor, rtol=1e-4, atol=1e-5)
    run(tmp_path / "halves", 2, strategy, **how, steps=2)
    assert run(tmp_path / "halves", 2, strategy, **how)[0] == whole[0]
