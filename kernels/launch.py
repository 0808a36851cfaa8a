"""What every launch needs: tile sizes from the frozen table of the GPU's architecture, and the right device.

Configurations are looked up, never timed: ranks that time each choose for themselves, and with other tiles come other
orders of summation. `configs/<architecture>.json` holds for each kernel a list of rows, the most special first:

    {"when": {"dtype": "bf16", "width": 1024, "causal": true}, "use": {"BLOCK": 64, "num_warps": 4, "num_stages": 1}}

The first row that fits is used: a number in `when` is an upper bound, anything else must be equal, or one of a list.
`use` goes to the kernel as keywords. Further keys of a row ("note") are for readers.
"""

import contextlib
import functools
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dltrain.errors import UserError

TABLES = {(9, 0): "sm90"}  # compute capability -> file; all others: generic
NAMES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64"}


@functools.cache
def architecture(device: torch.device) -> str:
    """The table for a device; GPUs of makers and generations without one, and CPUs, have the generic one."""
    if device.type != "cuda" or torch.version.hip:
        return "generic"
    return TABLES.get(torch.cuda.get_device_capability(device), "generic")


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors; a fixed few for an interpreter, so that persistent kernels loop there too."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3


@functools.cache
def table(name: str) -> dict[str, list[dict[str, Any]]]:
    return json.loads((Path(__file__).parent / "configs" / f"{name}.json").read_text())


@functools.cache
def _lookup(name: str, kernel: str, when: tuple[tuple[str, Any], ...]) -> dict[str, Any]:
    given = dict(when)
    for row in table(name)[kernel]:
        if all(_fits(bound, given.get(key)) for key, bound in row.get("when", {}).items()):
            return row["use"]
    raise UserError(f"{kernel} has no configuration for {given} in kernels/configs/{name}.json: add a row")


def _fits(bound: Any, value: Any) -> bool:
    if isinstance(bound, list):
        return value in bound
    if isinstance(bound, int) and not isinstance(bound, bool):
        return value is not None and value <= bound
    return value == bound


def config(kernel: str, like: Tensor, **when: Any) -> dict[str, Any]:
    """The keywords of a launch of `kernel` on tensors like `like`: its row for the dtype and the sizes in `when`.

    The result is shared: do not change it. Raises UserError if the table has no row that fits.
    """
    return _lookup(architecture(like.device), kernel, (("dtype", NAMES[like.dtype]), *when.items()))


def on_device(tensor: Tensor) -> contextlib.AbstractContextManager[Any]:
    """Makes the tensor's GPU the current one: Triton launches there, whatever device its arguments are on."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return contextlib.nullcontext()
    return torch.cuda.device(tensor.device)


def allow_descriptors() -> None:
    """Give Triton scratch memory for descriptors made in a kernel; call it before each such launch.

    The allocator is a context variable, which autograd's threads, where backward runs, do not inherit.
    """
    import triton

    triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # the caching allocator aligns to 512 bytes
