"""GELU with and without a bias, and the network made of it."""

from typing import Any

import interpreter
import pytest
import torch
from contract import check_compiled, check_no_second_derivative, check_op
from gate import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import as_good, error, exact

from dltrain import ops
from dltrain.errors import UserError
from dltrain.kernels import gelu, gelu_triton, mlp


def data(m, n, dtype=torch.float64) -> list[Any]:
    """x, bias and the gradient of y."""
    return [t.to(dtype) for t in (3 * torch.randn(m, n).double(), torch.randn(n).double(), torch.randn(m, n).double())]


def results(function, x, bias, grad, approximate):
    leaves = [t.detach().clone().requires_grad_() for t in (x, bias) if t is not None]
    y = function(leaves[0], approximate, bias=None if bias is None else leaves[1])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad)]


approximations = pytest.mark.parametrize("approximate", ["none", "tanh"])
biases = pytest.mark.parametrize("with_bias", [True, False])


@approximations
@biases
def test_float64(approximate, with_bias, watched):
    x, bias, grad = data(37, 130)
    args = x, bias if with_bias else None, grad, approximate
    exact(results(gelu.gelu, *args), results(gelu.reference, *args))
    assert {launch.atomics for launch in watched.launches} == {0}


@approximations
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(approximate, dtype):
    x, bias, grad = data(40, 130, dtype)
    for b in (bias, None):
        wide = None if b is None else b.double()
        want = results(gelu.reference, x.double(), wide, grad.double(), approximate)
        got, torchs = (results(f, x, b, grad, approximate) for f in (gelu.gelu, gelu.reference))
        as_good(got, torchs, want, factor=3 if dtype == torch.float32 else 1.5)


@approximations
@settings(max_examples=12)
@given(st.integers(0, 30), st.integers(1, 140), st.booleans(), st.sampled_from(["", "apart", "transposed", "expanded"]))
def test_shapes(approximate, m, n, with_bias, how):
    x, bias, grad = data(m, n)
    if how == "apart":
        x = torch.nn.functional.pad(x, (1, 2), value=float("nan"))[:, 1 : n + 1]
    elif how == "transposed":
        x, grad = x.t().contiguous().t(), grad.t().contiguous().t()
    elif how == "expanded":
        grad = grad.new_ones(()).expand(m, n)
    args = x, bias if with_bias else None, grad, approximate
    with interpreter.watch():
        got = results(gelu.gelu, *args)
    exact(got, results(gelu.reference, *args))


def test_far_from_zero():
    x = torch.tensor([-1e4, -40.0, 40.0, 1e4, float("inf"), float("nan")], requires_grad=True)
    for approximate in ("none", "tanh"):
        y = ops.gelu(x, approximate)
        assert torch.equal(y[:5], torch.tensor([0.0, 0.0, 40.0, 1e4, float("inf")])) and y[5].isnan()
        (dx,) = torch.autograd.grad(y[:4].sum(), x)
        assert torch.equal(dx[:4], torch.tensor([0.0, 0.0, 1.0, 1.0]))


def test_bytes_moved(watched):
    x, bias, grad = data(64, 512, torch.float32)
    once = x.numel() * 4
    gelu_triton.forward(x, bias, False)
    assert watched.bytes <= 1.02 * 2 * once + 8 * 512 * 4  # 8 blocks of rows read the bias
    watched.launches.clear()
    gelu_triton.forward(x, None, False)
    assert watched.bytes == 2 * once
    watched.launches.clear()
    gelu_triton.backward(grad, x, bias, False, False)
    (main,) = watched.of("_backward")
    assert main.loaded["G"] == main.loaded["X"] == main.stored["DX"] == once
    assert "Y" not in main.stored


def test_ops_as_torch_checks_them():
    x, bias, grad = data(3, 5, torch.float32)
    check_op(torch.ops.dltrain.gelu_forward.default, x.requires_grad_(), bias.requires_grad_(), True)
    check_op(torch.ops.dltrain.gelu_backward.default, grad, x.detach(), bias.detach(), False, True)


def test_compiled_graph():
    x, bias, _ = data(3, 5, torch.float32)
    check_compiled(lambda x, b: ops.gelu(x, "tanh", bias=b), x, bias)


def test_second_derivatives_raise():
    x, bias, _ = data(3, 5, torch.float32)
    check_no_second_derivative(lambda x, b: ops.gelu(x, bias=b), x, bias)


def test_bad_input():
    x = torch.randn(3, 5)
    with pytest.raises(
        UserError, match=r"gelu has no kernel for a bias of torch.float32 \(4,\) on torch.float32 \(3, 5\)"
    ):
        ops.gelu(x, bias=torch.randn(4))
    with pytest.raises(RuntimeError, match="approximate"):
        ops.gelu(x, "sigmoid")


# ---- the network ----


def network(dtype=torch.float64) -> list[Any]:
    """x [2, 5, 8], both projections, inner width 24."""
    shapes = (2, 5, 8), (24, 8), (24,), (8, 24), (8,)
    return [torch.randn(shape).to(dtype) for shape in shapes]


@approximations
def test_mlp_float64(approximate, watched):
    tensors, grad = network(), torch.randn(2, 5, 8, dtype=torch.float64)
    found = []
    functions: list[Any] = [mlp.mlp, mlp.reference]
    for function in functions:
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = function(*leaves, approximate)
        found.append([y.detach(), *torch.autograd.grad(y, leaves, grad)])
    exact(*found)


def test_mlp_keeps_one_tensor_between():
    leaves = [t.requires_grad_() for t in network(torch.float32)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (kept.append(t), t)[1], lambda t: t):
        ops.mlp(*leaves)
    assert [tuple(t.shape) for t in kept if t.shape[-1:] == (24,) and t.dim() == 3] == [(2, 5, 24)]


@pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")  # torch.compile does so itself
def test_mlp_compiled_and_twice():
    check_compiled(ops.mlp, *network(torch.float32))
    check_no_second_derivative(ops.mlp, *network(torch.float32))


def test_mlp_autocast():
    leaves = [t.requires_grad_() for t in network(torch.float32)]
    with torch.autocast("cpu", torch.bfloat16):
        y = ops.mlp(*leaves)
        want = mlp.reference(*leaves)
    assert y.dtype == want.dtype == torch.bfloat16
    assert error(y, want) < 0.01
    assert all(g.dtype == torch.float32 for g in torch.autograd.grad(y.sum(), leaves))


def test_hopper():
    for binary in compiled("hopper_gelu"):
        binary.check()
