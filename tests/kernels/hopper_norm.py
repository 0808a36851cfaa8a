"""What gate.py compiles: each row of the table, with all that may be fused; see there."""

import torch

from dltrain.kernels import norm_triton


def launches():
    widths = (96, 256, 512, 768, 1024, 2048, 4096, 8192, 16384, 20480)
    for width in widths:
        yield from both(width, torch.bfloat16, centre=True, everything=True)
    for width in (1024, 8192):
        yield from both(width, torch.float32, centre=True, everything=False)
    yield from both(1024, torch.bfloat16, centre=False, everything=False)
    yield from both(1021, torch.bfloat16, centre=True, everything=False, name="odd ")


def both(width, dtype, *, centre, everything, name=""):
    """With everything: residual and dropout and a gradient of their sum."""
    x = torch.empty(4096, width, dtype=dtype, device="meta")
    vector = torch.empty(width, dtype=dtype, device="meta")
    row = torch.empty(4096, dtype=torch.float32, device="meta")
    seed = torch.empty(1, dtype=torch.int64, device="meta") if everything else None
    residual, bias = x if everything else None, vector if centre else None
    name = f"{name}{'layer' if centre else 'rms'} norm {width} {dtype}"
    yield f"{name} forward", lambda: norm_triton.forward(x, residual, vector, bias, seed, 0.1, 1e-5, width, centre)
    yield f"{name} backward", lambda: norm_triton.backward(
        x, residual, x, vector, bias, seed, row, row, 0.1, width, centre, dtype, dtype if everything else None
    )  # fmt: skip
