"""Layer norm and RMS norm beside torch, torch.compile and, where installed, Liger."""

import functools
import importlib.util
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from dltrain.kernels import layer_norm, rms_norm
from dltrain.kernels.bench.frame import Case, gradients


def cases(smoke: bool, device: torch.device) -> Iterator[Case]:
    """Forward and backward over widths, and with the residual sum fused."""
    rows = 4 if smoke else 32768
    for width in (32,) if smoke else (1024, 4096, 8192):
        x, weight, bias = (torch.randn(s, device=device).bfloat16() for s in ((rows, width), (width,), (width,)))
        shape, once = f"{rows} x {width} bf16", x.numel() * 2
        functions: dict[str, Callable[..., Any]] = {
            "dltrain": lambda x, w, b: layer_norm.layer_norm(x, w.shape, w, b)[0],
            "torch": lambda x, w, b: F.layer_norm(x, w.shape, w, b),
        }
        if not smoke:
            functions["torch.compile"] = torch.compile(functions["torch"], dynamic=False)
        if importlib.util.find_spec("liger_kernel"):
            functions["liger"] = _liger
        if smoke and device.type == "cpu":
            x, weight, bias = x.float(), weight.float(), bias.float()  # what Triton's interpreter can do
        yield Case("layer norm forward", shape, _calls(functions, x, weight, bias), bytes=2 * once)
        backward = {name: gradients(f, (x, weight, bias)) for name, f in functions.items()}
        yield Case("layer norm backward", shape, backward, bytes=3 * once)
        fused = {
            "dltrain": lambda x, r, w: rms_norm.rms_norm(x, w.shape, w, residual=r),
            "torch": lambda x, r, w: (F.rms_norm(x + r, w.shape, w), x + r),
        }
        yield Case("rms norm with residual forward", shape, _calls(fused, x, x.clone(), weight), bytes=4 * once)
        backward = {name: gradients(f, (x, x.clone(), weight)) for name, f in fused.items()}
        yield Case("rms norm with residual backward", shape, backward, bytes=4 * once)


def _calls(functions: dict, *inputs: Tensor) -> dict:
    return {name: functools.partial(function, *inputs) for name, function in functions.items()}


def _liger(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction  # type: ignore[import-not-found]

    return LigerLayerNormFunction.apply(x, weight, bias, 1e-5)
