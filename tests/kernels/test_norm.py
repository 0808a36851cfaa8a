"""Layer norm and RMS norm: one kernel."""

import functools
from typing import Any

import interpreter
import pytest
import torch
from contract import check_compiled, check_no_second_derivative, check_op
from gate import compiled
from hypothesis import given, settings
from hypothesis import strategies as st
from tolerance import as_good, exact
from torch.utils import checkpoint

from dltrain import ops
from dltrain.errors import UserError
from dltrain.kernels import dropout, launch, layer_norm, norm, norm_triton, rms_norm

# M rows, N columns

SEED = torch.tensor([0x1234567890ABCDEF])
kinds = pytest.mark.parametrize("kind", [layer_norm, rms_norm], ids=["layer", "rms"])
NAME = {layer_norm: "layer_norm", rms_norm: "rms_norm"}


@pytest.fixture(params=["registers", "blocks"])
def wide(request, monkeypatch):
    """Rows held in registers; and rows taken to be too wide for that, in blocks of 64."""
    if request.param == "blocks":
        monkeypatch.setattr(norm_triton, "FORWARD_ROW", 0)
        monkeypatch.setattr(norm_triton, "BACKWARD_ROW", 0)
        config = launch.config
        blocks = {"BLOCK_N": 64, "num_warps": 1, "num_stages": 1}
        monkeypatch.setattr(
            launch, "config", lambda kernel, *a, **k: blocks if kernel.endswith("_wide") else config(kernel, *a, **k)
        )
    return request.param == "blocks"


def data(m, n, dtype=torch.float64, seed=0):
    """x, residual, weight, bias and the gradients of y and h."""
    g = torch.Generator().manual_seed(seed)
    x, residual, grad_y, grad_h = torch.randn(4, m, n, generator=g, dtype=torch.float64)
    weight, bias = torch.randn(2, n, generator=g, dtype=torch.float64)
    return [t.to(dtype) for t in (3 * x + 1, residual, weight + 1, bias, grad_y, grad_h)]


def results(function, inputs, *, affine=True, with_residual=True, change=lambda x: x, **keywords):
    """y and h by `function`, and the gradients of all inputs; without residual y alone. `change` is applied to x."""
    *given, grad_y, grad_h = inputs
    x, residual, weight, bias = (t.detach().clone().requires_grad_() for t in given)
    weights = [] if not affine else [weight] if "rms" in str(function.__module__) else [weight, bias]
    names = dict(zip(("weight", "bias"), weights))
    if with_residual:
        keywords["residual"] = residual
    y, h = function(change(x), x.shape[-1:], eps=1e-5, **names, **keywords)
    outs, grads = ([y, h], [grad_y, grad_h]) if with_residual else ([y], [grad_y])
    used = [x, *([residual] if with_residual else []), *weights]
    return [*(o.detach() for o in outs), *torch.autograd.grad(outs, used, grads)]


def pair(kind):
    return getattr(kind, NAME[kind]), kind.reference


@kinds
@pytest.mark.parametrize("with_residual", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_float64(kind, with_residual, affine, wide, watched):
    inputs, how = data(7 if wide else 35, 100), {"affine": affine, "with_residual": with_residual}
    got, want = (results(f, inputs, **how) for f in pair(kind))
    exact(got, want)
    assert {launch.atomics for launch in watched.launches} == {0}
    assert {launch.kernel.endswith("_wide") for launch in watched.of("_forward") + watched.of("_forward_wide")} == {
        wide
    }


@kinds
@pytest.mark.parametrize("with_residual", [True, False])
def test_dropout(kind, with_residual, wide, monkeypatch):
    monkeypatch.setattr(norm, "draw_seed", lambda device: SEED)
    inputs = data(5, 72)
    kept = dropout.keep(SEED, 1, 5, 72, 0.3)[0].double() / 0.7
    kernel, reference = pair(kind)
    got = results(kernel, inputs, with_residual=with_residual, dropout_p=0.3)
    exact(got, results(reference, inputs, with_residual=with_residual, change=lambda x: x * kept))


@kinds
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_half_precision(kind, dtype, wide):
    inputs = data(4 if wide else 33, 200, dtype)
    kernel, reference = pair(kind)
    for how in ({}, {"with_residual": False}):
        want = results(reference, [t.double() for t in inputs], **how)
        as_good(results(kernel, inputs, **how), results(reference, inputs, **how), want)


def strided(t, how):
    """The same numbers in another layout; what lies between them is NaN."""
    if how == "rows apart":
        wide = t.new_full((t.shape[0], t.shape[1] + 3), float("nan"))
        wide[:, 1:-2] = t
        return wide[:, 1:-2]  # unaligned too
    return t.t().contiguous().t() if how == "transposed" else t


@kinds
@settings(max_examples=10)
@given(st.integers(0, 9), st.integers(4, 70), st.sampled_from(["", "rows apart", "transposed"]), st.booleans())
def test_shapes(kind, m, n, how, with_residual):
    inputs = [strided(t, how) if t.dim() == 2 else t for t in data(m, n)]
    inputs[4] = inputs[4][:1].expand(m, n) if m else inputs[4]  # the gradient of a sum has stride 0
    kernel, reference = pair(kind)
    with interpreter.watch():
        got = results(kernel, inputs, with_residual=with_residual)
    exact(got, results(reference, inputs, with_residual=with_residual))


def test_several_dimensions_and_wider_residuals():
    x, weight = torch.randn(2, 3, 4, 5).bfloat16().requires_grad_(), torch.randn(4, 5)
    residual = torch.randn(2, 3, 4, 5, requires_grad=True)
    y, h = ops.rms_norm(x, (4, 5), weight, residual=residual)
    assert (y.dtype, h.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(h, residual + x)
    dx, dresidual = torch.autograd.grad([y, h], [x, residual], [torch.ones_like(y), torch.ones_like(h)])
    assert (dx.dtype, dresidual.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(dx, dresidual.bfloat16())


def test_statistics_of_what_is_far_from_zero():
    """The variance is not a difference of squares, which would be off by 6 here; a mean of 1e4 is known to 1e-3."""
    x = 1e4 + torch.randn(4, 512)
    for got in (ops.layer_norm(x, (512,)), ops.layer_norm(x, (512,), residual=torch.zeros_like(x))[0]):
        torch.testing.assert_close(got.double(), layer_norm.reference(x.double(), (512,))[0], rtol=1e-3, atol=1e-3)


def test_rows_of_one():
    x, weight, bias = torch.randn(3, 1), torch.randn(1), torch.randn(1)
    assert torch.equal(ops.layer_norm(x, (1,), weight, bias), bias.expand(3, 1))
    torch.testing.assert_close(ops.rms_norm(x, (1,), eps=0.0), x.sign())


def test_a_row_does_not_depend_on_its_batch():
    x = torch.randn(40, 100)
    assert torch.equal(ops.layer_norm(x, (100,))[17], ops.layer_norm(x[17:18], (100,))[0])


def test_dropout_is_drawn_from_torchs_generator():
    x = torch.ones(50, 40)
    torch.manual_seed(7)
    first, second = (ops.rms_norm(x, (40,), residual=torch.zeros_like(x), dropout_p=0.25)[1] for _ in range(2))
    torch.manual_seed(7)
    again = ops.rms_norm(x, (40,), residual=torch.zeros_like(x), dropout_p=0.25)[1]
    assert torch.equal(first, again) and not torch.equal(first, second)
    assert set(first.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    with pytest.raises(ValueError, match="between 0 and 1"):
        ops.rms_norm(x, (40,), dropout_p=1.5)


@pytest.mark.parametrize("selective", [False, True])
def test_checkpointed_activations_draw_the_same_mask(selective):
    x, residual, weight, bias, *_ = data(6, 16, torch.float32)

    def block(x, r, w, b):
        return ops.layer_norm(x, (16,), w, b, residual=r, dropout_p=0.5)

    save = functools.partial(checkpoint.create_selective_checkpoint_contexts, [torch.ops.dltrain.norm_forward.default])
    how: dict[str, Any] = {"context_fn": save} if selective else {}
    found = []
    for run in (block, lambda *t: checkpoint.checkpoint(block, *t, use_reentrant=False, **how)):
        torch.manual_seed(5)
        leaves = [t.clone().requires_grad_() for t in (x, residual, weight, bias)]
        outs = run(*leaves)
        found.append([*outs, *torch.autograd.grad(outs[0].square().sum() + outs[1].sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found))


def test_bytes_moved(watched):
    x, residual, weight, bias, grad_y, grad_h = data(64, 128, torch.float32)
    forward = norm_triton.forward(x, residual, weight, bias, None, 0.0, 1e-5, 128, True)
    of_rows = 64 * 128 * 4
    assert watched.bytes <= 1.02 * (
        4 * of_rows + 2 * 64 * 4 + 2 * 128 * 4 * 4
    )  # x, residual, y, h; 4 programs read weights
    watched.launches.clear()
    _, h, mean, rstd = forward
    assert h is not None
    norm_triton.backward(
        grad_y, grad_h, h, weight, bias, None, mean, rstd, 0.0, 128, True, torch.float32, torch.float32
    )  # fmt: skip
    (main,) = watched.of("_backward")
    assert main.loaded["G"] == main.loaded["GH"] == main.loaded["H"] == main.stored["DH"] == of_rows
    assert "DX" not in main.stored  # x and residual have one gradient


def test_ops_as_torch_checks_them():
    x, residual, weight, bias, grad, _ = data(3, 8, torch.float32)
    leaves = [t.requires_grad_() for t in (x, residual, weight, bias)]
    check_op(torch.ops.dltrain.norm_forward.default, *leaves, SEED, 0.5, 1e-5, 8, True)
    check_op(torch.ops.dltrain.norm_forward.default, x, None, weight, None, None, 0.0, 1e-5, 8, False)
    with torch.no_grad():
        _, h, mean, rstd = torch.ops.dltrain.norm_forward(*leaves, SEED, 0.5, 1e-5, 8, True)
        types = torch.float32, torch.float32
        args = grad, None, h, weight, bias, SEED, mean, rstd, 0.5, 8, True, *types
    check_op(torch.ops.dltrain.norm_backward.default, *(a.detach() if isinstance(a, torch.Tensor) else a for a in args))


def test_compiled_graph():
    x, residual, weight, bias, *_ = data(3, 16, torch.float32)
    check_compiled(lambda x, r, w, b: ops.layer_norm(x, (16,), w, b, residual=r), x, residual, weight, bias)


def test_second_derivatives_raise():
    x, residual, weight, *_ = data(3, 16, torch.float32)
    check_no_second_derivative(lambda x, r, w: ops.rms_norm(x, (16,), w, residual=r), x, residual, weight)


def test_bad_input():
    x = torch.randn(3, 8)
    with pytest.raises(ValueError, match=r"residual \(3, 7\) must have the shape of input \(3, 8\)"):
        ops.layer_norm(x, (8,), residual=torch.randn(3, 7))
    with pytest.raises(UserError, match=r"layer_norm has no kernel for normalized_shape \(7,\) of \(3, 8\)"):
        ops.layer_norm(x, (7,))
    with pytest.raises(RuntimeError):
        ops.layer_norm(torch.ones(3, 8, dtype=torch.int64), (8,))


def test_hopper():
    found = compiled("hopper_norm")
    for binary in found:
        binary.check(wide="odd" not in binary.launch)
    assert {b.kernel for b in found} >= {
        "_forward", "_forward_wide", "_backward", "_backward_wide", "_backward_weights", "_column_sums"
    }  # fmt: skip
