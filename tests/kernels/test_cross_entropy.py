"""Cross-entropy: the Triton kernels against torch."""

import contract
import gate
import pytest
import tolerance
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from dltrain.errors import UserError
from dltrain.kernels import dispatch
from dltrain.kernels.cross_entropy import cross_entropy, reference

OPTIONS = [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.3, "z_loss": 1e-4, "ignore_index": 3}]


def problem(rows: int, classes: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Logits and targets, every fourth of which does not count by either of the numbers that say so."""
    logits = torch.randn(rows, classes, dtype=torch.float64).mul_(3).to(dtype).requires_grad_()
    target = torch.randint(classes, (rows,))
    target[1::4] = -100
    return logits, target


def kept(target: Tensor, options: dict) -> dict:
    """The options with a number to ignore that the targets have."""
    if "ignore_index" in options:
        target[target == -100] = options["ignore_index"]
    return options


def results(f, logits: Tensor, target: Tensor, **options) -> list[Tensor]:
    """The loss and the logits' gradient, of weights on the losses that differ from row to row."""
    loss = f(logits, target, **options)
    weight = torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)
    (grad,) = torch.autograd.grad((loss * weight).sum(), logits)
    return [loss.detach(), grad]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_float64_is_exact(watched, reduction, options):
    for classes in (7, 1024, 2500):  # a part of a chunk, a chunk, chunks and a part
        logits, target = problem(6, classes)
        options = kept(target, options) | {"reduction": reduction}
        want = results(reference, logits, target, **options)
        tolerance.exact(results(cross_entropy, logits, target, **options), want)
        tolerance.exact(results(overwriting, logits, target, **options), want)
    assert {launch.kernel for launch in watched.launches} == {"_forward", "_backward", "_in_place", "_scale_rows"}


def overwriting(logits: Tensor, target: Tensor, **options) -> Tensor:
    """Logits that may be overwritten, as a linear layer's may."""
    return cross_entropy(logits * 1.0, target, inplace=True, **options)


@pytest.mark.parametrize("f", [cross_entropy, overwriting])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_lower_precision_is_as_good_as_torch(watched, dtype, f):
    logits, target = problem(40, 1500, dtype)
    options = {"label_smoothing": 0.1, "reduction": "none"}
    want = results(reference, logits.detach().double().requires_grad_(), target, **options)
    got = results(f, logits, target, **options)
    tolerance.as_good(got, results(reference, logits, target, **options), want)
    assert got[0].dtype == torch.float32


@given(
    rows=st.integers(0, 9),
    classes=st.integers(1, 300),
    pad=st.integers(0, 3),
    transposed=st.booleans(),
    options=st.sampled_from(OPTIONS),
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_any_shape(rows, classes, pad, transposed, options, reduction):
    import interpreter

    whole = torch.randn(classes + pad, rows).mT if transposed else torch.randn(rows, classes + pad)
    logits = whole.double()[:, pad:].requires_grad_()
    target = torch.randint(classes, (2 * rows,))[::2]
    target[:1] = options.get("ignore_index", -100)
    with interpreter.watch():
        got = results(cross_entropy, logits, target, **options, reduction=reduction)
    want = results(reference, logits, target, **options, reduction=reduction)
    tolerance.exact([g.nan_to_num() for g in got], [w.nan_to_num() for w in want])
    assert torch.equal(got[0].isnan(), want[0].isnan())  # the mean of nothing


@pytest.mark.parametrize("inplace", [False, True])
def test_extreme_logits(watched, inplace):
    logits = torch.tensor(
        [[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4], [3e38, -3e38, 0.0], [0.0, -float("inf"), 1.0]], requires_grad=True
    )
    target = torch.tensor([1, 2, 0, 0])

    def f(z: Tensor, t: Tensor) -> Tensor:
        return cross_entropy(z * 1.0, t, reduction="sum", inplace=inplace)

    got, want = results(f, logits, target), results(reference, logits, target, reduction="sum")
    tolerance.exact(got, want, 1e-6)
    assert got[1].isfinite().all()


def test_nothing_but_minus_infinity_is_nan_as_in_torch(watched):
    logits, target = torch.full((1, 5), -float("inf")), torch.tensor([2])
    assert cross_entropy(logits, target).isnan() and reference(logits, target).isnan()


@pytest.mark.parametrize("wrong", [-1, 5, 2**40])
def test_a_target_out_of_range_is_never_read_at(watched, monkeypatch, wrong):
    logits, target = torch.randn(3, 5, requires_grad=True), torch.tensor([0, wrong, 4])
    with pytest.raises(IndexError, match=f"Target {wrong} is out of bounds"):
        cross_entropy(logits, target)
    monkeypatch.setattr("dltrain.kernels.cross_entropy.check_targets", lambda *_: None)  # as on a GPU
    for f in (cross_entropy, overwriting):
        loss, grad = results(f, logits, target, reduction="none")
        assert loss.isnan().tolist() == [False, True, False]
        assert grad.isnan().all(1).tolist() == [False, True, False] and grad[[0, 2]].isfinite().all()


def test_bytes(watched):
    """Two reads and a write; in place the second read comes from the cache."""
    logits, target = problem(24, 2048, torch.bfloat16)
    one = logits.nbytes
    cross_entropy(logits, target).backward()
    assert watched.bytes <= 1.02 * 3 * one
    before = watched.bytes
    overwriting(logits, target, reduction="sum").backward()
    (launch,) = watched.of("_in_place")
    assert sum(launch.loaded.values()) <= 1.02 * 2 * one and sum(launch.stored.values()) <= 1.02 * one
    assert watched.bytes - before - launch.bytes <= 0.01 * one  # an upstream gradient of 1 moves nothing


def test_a_row_does_not_depend_on_the_others():
    logits, target = problem(5, 1300, torch.bfloat16)
    loss, grad = results(cross_entropy, logits, target, reduction="none")
    alone = cross_entropy(logits[2:3], target[2:3], reduction="none")
    assert torch.equal(alone, loss[2:3])
    assert torch.equal(torch.autograd.grad(alone.sum(), logits)[0][2], grad[2])


def test_an_overwritten_tensor_is_never_used():
    logits, target = problem(3, 8, torch.float32)
    with pytest.raises(ValueError, match="leaf"):
        cross_entropy(logits, target, inplace=True)
    with pytest.raises(ValueError, match="rows"):
        cross_entropy((logits * 1.0)[:, ::2], target.clamp(max=3), inplace=True)
    exp = logits.exp()  # saved by exp itself
    loss = cross_entropy(exp, target, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = overwriting(logits, target)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_no_gradient_leaves_the_logits():
    logits, target = problem(3, 8, torch.float32)
    with torch.no_grad():
        before = logits.clone()
        loss = cross_entropy(logits, target, inplace=True)
    assert torch.equal(logits, before) and not loss.requires_grad


def test_second_derivatives_raise():
    logits, target = problem(3, 8)
    contract.check_no_second_derivative(lambda z: cross_entropy(z, target).square(), logits)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(overwriting(logits, target), logits, create_graph=True)


def test_contract():
    logits, target = problem(4, 9, torch.float32)
    ops, options = torch.ops.dltrain, (-100, 0.1, 1e-3)
    contract.check_op(ops.cross_entropy_forward.default, logits, target, *options)
    plain = logits.detach().clone()
    _, statistics = ops.cross_entropy_forward(plain, target, *options)
    contract.check_op(ops.cross_entropy_backward.default, torch.randn(4), plain, target, statistics, *options)
    contract.check_op(ops.cross_entropy_in_place.default, plain, target, torch.ones(()), *options)
    contract.check_op(ops.scale_rows.default, plain, torch.randn(4))
    contract.check_compiled(lambda z: cross_entropy(z * 1.0, target, label_smoothing=0.1), logits)
    compiled = torch.compile(overwriting, fullgraph=True, backend="aot_eager")
    tolerance.exact(results(compiled, logits, target), results(overwriting, logits, target), 1e-6)


def test_the_rest_is_torchs(monkeypatch):
    logits, target = problem(4, 5, torch.float32)
    probabilities, weight = torch.rand(4, 5), torch.rand(5)
    for call in (
        lambda: cross_entropy(logits, probabilities),
        lambda: cross_entropy(logits, target, weight),
        lambda: cross_entropy(logits.view(4, 5, 1), target[:, None]),
    ):
        with pytest.raises(UserError, match="has no kernel for"):
            call()
    for wrong in (target[:3], target.int(), target.view(2, 2)):
        with pytest.raises((ValueError, RuntimeError)):
            cross_entropy(logits, wrong)
    with pytest.raises(ValueError, match="is not a valid value for reduction"):
        cross_entropy(logits, target, reduction="average")
    monkeypatch.setattr(dispatch, "MODE", "auto")
    assert torch.equal(cross_entropy(logits, target, weight), reference(logits, target, weight))
    with pytest.raises(ValueError, match="z_loss"):
        cross_entropy(logits, probabilities, z_loss=1e-3)


def test_hopper():
    for binary in gate.compiled("hopper_cross_entropy"):
        binary.check()
