"""Linear cross-entropy beside its three matrix products, torch on all logits and torch's own in chunks."""

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels.bench.frame import Case
from dltrain.kernels.linear_cross_entropy import linear_cross_entropy, reference


def cases(smoke: bool, device: torch.device) -> Iterator[Case]:
    """Loss and gradients together. "three products" is the floor: cuBLAS on the whole matrices, and nothing else."""
    N, D, V = (6, 8, 32) if smoke else (8192, 4096, 128256)
    dtype = torch.float32 if smoke else torch.bfloat16
    input, weight = (torch.randn(s, device=device).mul_(D**-0.5).to(dtype).requires_grad_() for s in ((N, D), (V, D)))
    target = torch.randint(V, (N,), device=device)
    functions: dict[str, Callable[..., Tensor]] = {
        f"dltrain{note}": functools.partial(linear_cross_entropy, reduction="sum", chunk_bytes=chunk)
        for note, chunk in (("", 1 << 28), (", chunks of 512 MB", 1 << 29), (", chunks of 128 MB", 1 << 27))
    }
    functions["torch"] = functools.partial(reference, reduction="sum")
    if hasattr(F, "linear_cross_entropy") and not smoke:  # torch 2.13
        options = torch.nn.LinearCrossEntropyOptions()
        functions["torch in chunks"] = functools.partial(F.linear_cross_entropy, reduction="sum", options=options)
    calls = {
        name: functools.partial(_loss_and_gradients, function, input, weight, target)
        for name, function in functions.items()
    }
    logits = torch.empty(N, V, dtype=dtype, device=device).normal_()
    calls["three products"] = functools.partial(_products, input.detach(), weight.detach(), logits)
    yield Case("linear cross-entropy", f"{N} x {D} x {V} bf16", calls, flops=6 * N * D * V)


def _loss_and_gradients(function: Callable[..., Tensor], input: Tensor, weight: Tensor, target: Tensor) -> Any:
    return torch.autograd.grad(function(input, weight, target), (input, weight))


def _products(input: Tensor, weight: Tensor, logits: Tensor) -> Any:
    return input @ weight.T, logits @ weight, logits.T @ input
