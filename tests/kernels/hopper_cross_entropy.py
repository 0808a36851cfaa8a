"""What gate.py compiles: see there."""

import torch

from dltrain.kernels import cross_entropy_triton as kernels


def launches():
    target, rows = (torch.empty(8192, dtype=t, device="meta") for t in (torch.int64, torch.float32))
    statistics, scale = rows.expand(2, -1).contiguous(), rows[0]
    options = (-100, 0.1, 1e-4)
    # 30522 classes in rows of 30528, as linear_cross_entropy makes them
    for dtype, width, classes in (
        (torch.bfloat16, 1024, 1024),
        (torch.bfloat16, 30528, 30522),
        (torch.float32, 4096, 4096),
    ):
        logits = torch.empty(8192, width, dtype=dtype, device="meta")[:, :classes]
        name = f"{dtype} {classes}"
        yield f"forward {name}", lambda z=logits: kernels.forward(z, target, *options)
        yield f"backward {name}", lambda z=logits: kernels.backward(rows, z, target, statistics, *options, out=z)
        yield f"in place {name}", lambda z=logits: kernels.in_place(z, target, scale, *options)
        yield f"scale {name}", lambda z=logits: kernels.scale_rows(z, rows)
