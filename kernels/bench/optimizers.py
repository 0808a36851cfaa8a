"""AdamW and LAMB on a billion parameters, in few tensors and in many, beside torch's own."""

import functools
from collections.abc import Iterator

import torch
from torch import nn

from dltrain.kernels.adamw import AdamW
from dltrain.kernels.bench.frame import Case
from dltrain.kernels.lamb import Lamb


def cases(smoke: bool, device: torch.device) -> Iterator[Case]:
    """float32 weights, gradients and moments: AdamW moves 28 bytes a parameter, LAMB 40. All share the weights."""
    for tensors, rows in ((2, 2),) if smoke else ((10, 100_000), (10_000, 100)):
        params = [nn.Parameter(torch.randn(rows, 1024, device=device)) for _ in range(tensors)]
        for p in params:
            p.grad = torch.randn_like(p)
        count, shape = tensors * rows * 1024, f"{tensors} x {rows} x 1024 fp32"
        scale = torch.ones((), dtype=torch.float64, device=device)
        calls = {
            "dltrain": functools.partial(AdamW(params).step, scale=scale),
            "torch fused": torch.optim.AdamW(params, fused=True).step,
            "torch foreach": torch.optim.AdamW(params, foreach=True).step,
        }
        yield Case("AdamW", shape, calls, bytes=28 * count)
        yield Case("LAMB", shape, {"dltrain": functools.partial(Lamb(params).step, scale=scale)}, bytes=40 * count)
