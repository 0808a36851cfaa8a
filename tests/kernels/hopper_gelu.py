"""What gate.py compiles: see there."""

import torch

from dltrain.kernels import gelu_triton


def launches():
    for dtype in (torch.bfloat16, torch.float32):
        x, bias = torch.empty(8192, 4096, dtype=dtype, device="meta"), torch.empty(4096, dtype=dtype, device="meta")
        for tanh in (False, True):
            for b in (bias, None):
                name = f"gelu {dtype} {'tanh' if tanh else 'erf'}{' bias' if b is not None else ''}"
                yield f"{name} forward", lambda x=x, b=b, tanh=tanh: gelu_triton.forward(x, b, tanh)
                yield f"{name} backward", lambda x=x, b=b, tanh=tanh: gelu_triton.backward(x, x, b, tanh, False)
