"""Linear cross-entropy: chunks of logits against torch on all of them."""

import contract
import interpreter
import pytest
import tolerance
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dltrain.errors import UserError
from dltrain.kernels import dispatch
from dltrain.kernels.linear_cross_entropy import linear_cross_entropy, reference

Problem = tuple[Tensor, Tensor, Tensor, Tensor]


def problem(rows: int, features: int, classes: int, dtype: torch.dtype = torch.float64) -> Problem:
    """Input, weight, bias and targets, of which some do not count."""
    input, weight, bias = (
        torch.randn(*s, dtype=torch.float64) for s in ((rows, features), (classes, features), (classes,))
    )
    target = torch.randint(classes, (rows,))
    target[1::4] = -100
    return input.to(dtype), weight.to(dtype), bias.to(dtype), target


def results(f, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, **options) -> list[Tensor]:
    """The loss and all gradients, of weights on the losses that differ from row to row."""
    leaves = [x.detach().clone().requires_grad_() for x in (input, weight, *([] if bias is None else [bias]))]
    loss = f(*leaves[:2], target, linear_bias=None if bias is None else leaves[2], **options)
    total = (loss * torch.linspace(0.5, 1.5, loss.numel(), dtype=loss.dtype).view(loss.shape)).sum()
    return [loss.detach(), *torch.autograd.grad(total, leaves)]


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize(
    "options", [{}, {"label_smoothing": 0.1}, {"z_loss": 1e-2}, {"label_smoothing": 0.2, "z_loss": 1e-3}], ids=str
)
def test_float64_is_exact(watched, reduction, options):
    input, weight, bias, target = problem(9, 5, 37)
    for b in (None, bias):
        args, options = (input, weight, b, target), options | {"reduction": reduction}
        tolerance.exact(results(linear_cross_entropy, *args, **options), results(reference, *args, **options))


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_chunks(monkeypatch, reduction):
    """Three, the last of which is a part."""
    monkeypatch.setattr("dltrain.kernels.linear_cross_entropy.GRAIN", 4)
    args = problem(11, 4, 20)
    options = {"reduction": reduction, "label_smoothing": 0.1}
    with interpreter.watch() as report:
        got = results(linear_cross_entropy, *args, **options, chunk_bytes=1)
    tolerance.exact(got, results(reference, *args, **options))
    forwards = [launch.programs for launch in report.launches][:3]
    assert forwards == [4, 4, 3]


@pytest.mark.parametrize("reduction", ["none", "sum"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_good_as_torch(monkeypatch, dtype, reduction):
    monkeypatch.setattr("dltrain.kernels.linear_cross_entropy.GRAIN", 16)
    args = input, weight, bias, target = problem(40, 16, 50, dtype)
    want = results(reference, input.double(), weight.double(), bias.double(), target, reduction=reduction)
    theirs = results(reference, *args, reduction=reduction)
    got = results(linear_cross_entropy, *args, reduction=reduction, chunk_bytes=1)
    if reduction == "sum":  # one number, whose error is a matter of luck
        assert abs(got[0] - want[0]) <= 1e-3 * want[0]
        got, theirs, want = got[1:], theirs[1:], want[1:]
    tolerance.as_good(got, theirs, want)


@settings(max_examples=10)
@given(
    rows=st.integers(0, 9),
    features=st.integers(1, 9),
    classes=st.integers(1, 40),
    transposed=st.booleans(),
    reduction=st.sampled_from(["none", "mean", "sum"]),
)
def test_any_shape(rows, features, classes, transposed, reduction):
    input, weight, bias, target = problem(rows, features, classes)
    if transposed:
        input, weight = input.mT.contiguous().mT, weight.mT.contiguous().mT
    with interpreter.watch():
        got = results(linear_cross_entropy, input, weight, bias, target, reduction=reduction)
    want = results(reference, input, weight, bias, target, reduction=reduction)
    tolerance.exact([g.nan_to_num() for g in got], [w.nan_to_num() for w in want])


def test_only_wanted_gradients():
    input, weight, bias, target = problem(6, 4, 7)
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        for reduction in ("sum", "none"):
            tensors = [x.clone().requires_grad_(w) for x, w in zip((input, weight, bias), wanted)]
            got, want = (
                torch.autograd.grad(
                    f(tensors[0], tensors[1], target, linear_bias=tensors[2], reduction=reduction).sum(),
                    [x for x in tensors if x.requires_grad],
                )
                for f in (linear_cross_entropy, reference)
            )
            tolerance.exact(got, want)
    with torch.no_grad():
        tolerance.exact([linear_cross_entropy(input, weight, target)], [reference(input, weight, target)])


def test_a_graph_kept_is_differentiated_again():
    input, weight, _, target = problem(6, 4, 7)
    input.requires_grad_()
    loss = linear_cross_entropy(input, weight, target)
    first, second = (torch.autograd.grad(loss, input, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_contract(reduction):
    input, weight, bias, target = problem(6, 4, 7, torch.float32)

    def f(h: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return linear_cross_entropy(h, w, target, linear_bias=b, reduction=reduction, label_smoothing=0.1)

    contract.check_compiled(f, input, weight, bias)
    contract.check_no_second_derivative(lambda *args: f(*args).square(), input, weight, bias)


def test_ops():
    input, weight, bias, target = problem(6, 4, 7, torch.float32)
    leaves, options = [x.requires_grad_() for x in (input, weight, bias)], (-100, 0.1, 1e-3, 1 << 20)
    ops, everything = torch.ops.dltrain, [True, True, True]
    contract.check_op(ops.linear_cross_entropy_rows.default, *leaves, target, *options)
    contract.check_op(ops.linear_cross_entropy_sum.default, *leaves, target, torch.ones(()), *options, everything)
    plain = [x.detach() for x in leaves]
    _, statistics = ops.linear_cross_entropy_rows(*plain, target, *options)
    contract.check_op(
        ops.linear_cross_entropy_rows_backward.default, torch.randn(6), *plain, target, statistics, *options, everything
    )
    contract.check_op(ops.linear_cross_entropy_sum_backward.default, torch.randn(()), *plain, *(x * 2 for x in plain))


def test_autocast():
    input, weight, bias, target = problem(6, 4, 7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = results(linear_cross_entropy, input, weight, bias, target)
    low = linear_cross_entropy(input.bfloat16(), weight.bfloat16(), target, linear_bias=bias.bfloat16())
    assert torch.equal(got[0], low)
    assert {g.dtype for g in got} == {torch.float32}


def test_bad_input(monkeypatch):
    input, weight, bias, target = problem(6, 4, 7, torch.float32)
    with pytest.raises(IndexError, match="Target 7 is out of bounds"):
        linear_cross_entropy(input, weight, target.clamp(max=6) * 0 + 7)
    with pytest.raises(UserError, match=r"no kernel for an input of shape \(4,\)"):
        linear_cross_entropy(input[0], weight, target[0])
    with pytest.raises(UserError, match="class probabilities"):
        linear_cross_entropy(input, weight, torch.rand(6, 7))
    for wrong in ((input[:, :3], weight, target), (input, weight.double(), target), (input, weight, target[:3])):
        with pytest.raises((RuntimeError, ValueError)):
            linear_cross_entropy(*wrong)
    with pytest.raises(RuntimeError):
        linear_cross_entropy(input, weight, target, linear_bias=bias[:2])
    monkeypatch.setattr(dispatch, "MODE", "auto")
    assert torch.equal(linear_cross_entropy(input, weight, target), reference(input, weight, target))
