"""Cross-entropy beside torch, torch.compile and, where installed, Liger: loss and gradient together."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels.bench.frame import Case
from dltrain.kernels.cross_entropy import cross_entropy


def cases(smoke: bool, device: torch.device) -> Iterator[Case]:
    """Bytes are those of the gradient in place: the logits are read once and their gradient is written."""
    rows, dtype = (4, torch.float32) if smoke else (8192, torch.bfloat16)
    for classes in (32,) if smoke else (32768, 65536, 128256, 262144):
        logits = torch.randn(rows, classes, device=device).to(dtype).requires_grad_()
        target = torch.randint(classes, (rows,), device=device)
        functions: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
            "dltrain": functools.partial(cross_entropy, reduction="sum", inplace=True),
            "dltrain, new memory": functools.partial(cross_entropy, reduction="sum"),
            "torch": lambda z, t: F.cross_entropy(z.float(), t, reduction="sum"),
        }
        if not smoke:
            functions["torch.compile"] = torch.compile(functions["torch"], dynamic=False)
        if importlib.util.find_spec("liger_kernel"):
            functions["liger"] = _liger
        calls = {name: functools.partial(_loss_and_gradient, f, logits, target) for name, f in functions.items()}
        yield Case("cross-entropy", f"{rows} x {classes} bf16", calls, bytes=2 * logits.numel() * logits.element_size())


def _loss_and_gradient(function: Callable[[Tensor, Tensor], Tensor], logits: Tensor, target: Tensor) -> Any:
    """Through a view, which may be overwritten as a linear layer's output may."""
    return torch.autograd.grad(function(logits.view_as(logits), target), logits)


def _liger(logits: Tensor, target: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_cross_entropy  # type: ignore[import-not-found]

    return liger_cross_entropy(logits, target, reduction="sum")  # type: ignore[return-value]
