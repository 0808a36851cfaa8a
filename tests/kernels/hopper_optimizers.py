"""What gate.py compiles: see there."""

import torch

from dltrain.kernels import adamw_triton, lamb_triton


def launches():
    def some(dtype, shape=(4096, 1024)):
        return [torch.empty(shape, dtype=dtype, device="meta")]

    (seed,), (scale,), (squares,) = some(torch.int64, 1), some(torch.float64, ()), some(torch.float64, (4096, 2))
    wide, half, hyper = torch.float32, torch.bfloat16, (1e-3, 0.9, 0.99, 1e-8, 0.1)
    for name, weight, masters, key in (
        ("float32", wide, [], None),
        ("masters", half, some(wide), None),
        ("at random", half, [], seed),
    ):
        args = some(weight), some(weight), some(wide), some(wide), masters, [1], scale, *hyper, key, [0], [0]
        yield f"adamw {name}", lambda args=args: adamw_triton.step(*args)
    tensors = some(wide), some(wide), some(wide), some(wide)
    yield "lamb moments", lambda: lamb_triton.moments(*tensors, [1], scale, *hyper, [1024])
    yield "lamb not adapted", lambda: lamb_triton.moments(*tensors, [1], scale, *hyper, [])
    yield "lamb apply", lambda: lamb_triton.apply(*tensors[:3], squares, [4096], [1], *hyper, [1024])
