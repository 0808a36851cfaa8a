"""What every op keeps: torch's own checks of an op, one graph for torch.compile, no second derivative."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor


def check_op(op: Any, *args: Any) -> None:
    """Schema, fake implementation, autograd registration and AOT dispatch with dynamic shapes, as torch checks them."""
    torch.library.opcheck(op, args)


def check_compiled(function: Callable[..., Any], *inputs: Tensor) -> None:
    """One graph without breaks; outputs and gradients have the bits of eager mode."""
    eager, graph = (
        _results(f, inputs) for f in (function, torch.compile(function, fullgraph=True, backend="aot_eager"))
    )
    for e, g in zip(eager, graph, strict=True):
        assert torch.equal(e, g)


def check_no_second_derivative(function: Callable[..., Any], *inputs: Tensor) -> None:
    """Differentiating the gradient raises."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    first = torch.autograd.grad(_sum(function(*leaves)), leaves, create_graph=True)
    with pytest.raises(RuntimeError, match="cannot be differentiated"):
        torch.autograd.grad(_sum(first), leaves)


def _results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    outs = list(out) if isinstance(out, tuple) else [out]
    return [*outs, *torch.autograd.grad(_sum(out), leaves)]


def _sum(out: Any) -> Tensor:
    """A scalar whose gradients differ from element to element."""
    outs = out if isinstance(out, tuple) else (out,)
    return sum((o * torch.linspace(-1, 1, o.numel(), dtype=o.dtype).view(o.shape)).sum() for o in outs)  # type: ignore
