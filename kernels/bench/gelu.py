"""GELU with a bias beside torch and torch.compile."""

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from dltrain.kernels import gelu
from dltrain.kernels.bench.frame import Case, gradients


def cases(smoke: bool, device: torch.device) -> Iterator[Case]:
    """Both approximations, forward and backward; torch adds the bias by itself."""
    rows = 4 if smoke else 32768
    for approximate in ("none", "tanh"):
        for width in (32,) if smoke else (4096, 16384):
            dtype = torch.float32 if smoke else torch.bfloat16
            x, bias = torch.randn(rows, width, device=device).to(dtype), torch.randn(width, device=device).to(dtype)
            functions = {
                "dltrain": lambda x, b, a=approximate: gelu.gelu(x, a, bias=b),
                "torch": lambda x, b, a=approximate: F.gelu(x + b, approximate=a),
            }
            if not smoke:
                functions["torch.compile"] = torch.compile(functions["torch"], dynamic=False)
            shape, once = f"{rows} x {width} bf16", x.numel() * x.element_size()
            calls = {name: functools.partial(f, x, bias) for name, f in functions.items()}
            yield Case(f"bias-GELU {approximate} forward", shape, calls, bytes=2 * once)
            backward = {name: gradients(f, (x, bias)) for name, f in functions.items()}
            yield Case(f"bias-GELU {approximate} backward", shape, backward, bytes=3 * once)
