"""Which implementation of an op runs: DLTRAIN_KERNELS=auto|triton|reference, read when dltrain is imported.

auto       the Triton kernel on CUDA tensors where it supports their shapes and types, else the reference
triton     the Triton kernel or an error; on CPU tensors with TRITON_INTERPRET=1, which Triton reads at its import
reference  the reference
"""

import contextlib
import importlib.util
import os
from collections.abc import Iterator

import torch
from torch import Tensor

from dltrain.errors import UserError

MODE = os.environ.get("DLTRAIN_KERNELS", "auto")
INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"
HAS_TRITON = importlib.util.find_spec("triton") is not None

# Sums of 16-bit inputs are float32; float64 is for tests that go through the real kernels.
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
# Triton's interpreter multiplies bit patterns of bfloat16 as integers (triton#11584); the tests' interpreter is mended.
INTERPRETED = [torch.float16, torch.float32, torch.float64]
_planned = False


@contextlib.contextmanager
def as_on_a_gpu() -> Iterator[None]:
    """Within it tensors that have no memory, of any device, take the ways of CUDA tensors: to plan for a GPU without
    one, by the kernels' fake implementations."""
    global _planned
    before, _planned = _planned, True
    try:
        yield
    finally:
        _planned = before


def use_kernel(op: str, unsupported: str, *tensors: Tensor | None) -> bool:
    """Whether the Triton kernel of `op` runs on these tensors; None among them is an argument that was not given.

    `unsupported` says in a few words what about the arguments no kernel does ("a mask of floats"), "" if nothing.
    Tensors that the kernel would have to refuse as torch does (of several devices, of integers) go to the reference,
    whose error is torch's own. Raises UserError where DLTRAIN_KERNELS is unknown, or `triton` and that cannot be.
    """
    if MODE == "reference":
        return False
    given = [t for t in tensors if t is not None]
    device = given[0].device
    if any(t.device != device or t.dtype not in FLOATS for t in given):
        return False
    if _planned:
        return not unsupported
    if MODE == "auto":
        return device.type == "cuda" and HAS_TRITON and not unsupported
    if MODE != "triton":
        raise UserError(f"DLTRAIN_KERNELS={MODE} is unknown: auto, triton or reference")
    if device.type == "meta":
        return False
    if not HAS_TRITON:
        raise UserError("DLTRAIN_KERNELS=triton, but Triton is not installed: pip install triton, or take auto")
    if device.type == "cpu" and not INTERPRET:
        raise UserError("DLTRAIN_KERNELS=triton needs a GPU, or TRITON_INTERPRET=1 to interpret kernels on the CPU")
    if device.type not in ("cpu", "cuda"):
        raise UserError(f"DLTRAIN_KERNELS=triton has no kernels for {device.type}: take auto")
    if device.type == "cpu" and (types := {t.dtype for t in given} - set(INTERPRETED)):
        raise UserError(f"Triton's interpreter is wrong in {types.pop()}: take float32, or DLTRAIN_KERNELS=reference")
    if unsupported:
        raise UserError(f"{op} has no kernel for {unsupported}: DLTRAIN_KERNELS=auto takes the reference there")
    return True
