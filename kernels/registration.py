"""Kernels as operators of torch: seen whole by torch.compile, checkpointing and profilers, and by autograd once.

An op is defined on a torch.library.Library and has an autograd kernel of its own: half the cost per call of
torch.library.custom_op with register_autograd, with the same meaning. An op without `backward`, as every backward op
is, raises when it is differentiated: a second derivative is an error, never a wrong number.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("dltrain", "FRAGMENT")


def register(
    schema: str,
    run: Callable[..., Any],
    fake: Callable[..., Any],
    *,
    setup: Callable[[Any, tuple[Any, ...], Any], None] | None = None,
    backward: Callable[..., Any] | None = None,
) -> Callable[..., Any]:
    """Define `dltrain::<schema>` and return it.

    run       what computes it, on CPU (interpreted) and CUDA tensors; outputs are new tensors, none an input's view
    fake      the same outputs as empty tensors, for torch.compile
    setup     (ctx, inputs, output): save for backward, mark outputs that have no gradient; all inputs are in `inputs`
    backward  (ctx, *gradients of the outputs) -> one gradient or None per input; absent gradients are None
    """
    name = schema[: schema.index("(")]
    _LIBRARY.define(schema)
    _LIBRARY.impl(name, run, "CPU")
    _LIBRARY.impl(name, run, "CUDA")
    torch.library.register_fake(f"dltrain::{name}", fake, lib=_LIBRARY)
    op = getattr(torch.ops.dltrain, name).default

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            ctx.set_materialize_grads(False)
            with torch._C._AutoDispatchBelowAutograd():
                output = op(*inputs)
            if setup is not None:
                setup(ctx, inputs, output)
            return tuple(output) if isinstance(output, list) else output

        @staticmethod
        def backward(ctx: Any, *grads: Tensor | None) -> Any:
            if backward is None:
                raise RuntimeError(f"dltrain::{name} cannot be differentiated: use DLTRAIN_KERNELS=reference for that")
            return backward(ctx, *grads)

    def differentiate(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(i, Tensor) and i.requires_grad for i in inputs):
            return Differentiable.apply(*inputs)
        with torch._C._AutoDispatchBelowAutograd():
            return op(*inputs)

    _LIBRARY.impl(name, differentiate, "Autograd")
    return op
