"""Many tensors in one launch: a table of their addresses, and the span of elements that each program has.

A kernel is launched once for all tensors that share types and hyper-parameters, so that ten thousand small ones cost
what a large one does. A span is (tensor, first element, how many); tensors are cut into parts of a given length, so
spans depend on shapes alone and are made once.

Legend: T tensors, C columns of the table, S spans.
"""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor

PART = 8192  # elements of a program, where nothing is summed


@functools.lru_cache(maxsize=64)
def spans(sizes: tuple[int, ...], parts: tuple[int, ...], device: torch.device) -> Tensor:
    """[S, 3] int64: tensor i, of sizes[i] elements, is cut into pieces of parts[i], the last one shorter."""
    size_T, part_T = torch.tensor(sizes, dtype=torch.int64), torch.tensor(parts, dtype=torch.int64)
    count_T = (size_T + part_T - 1) // part_T
    owner_S = torch.repeat_interleave(count_T)
    before_T = count_T.cumsum(0) - count_T
    first_S = (torch.arange(len(owner_S)) - before_T[owner_S]) * part_T[owner_S]
    length_S = torch.minimum(part_T[owner_S], size_T[owner_S] - first_S)
    return torch.stack((owner_S, first_S, length_S), 1).to(device)


@functools.lru_cache(maxsize=64)
def offsets(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """[T + 1] int64: where each of some tensors begins and the last one ends, if they lie one after the other."""
    return torch.tensor([0, *counts]).cumsum(0).to(device)


def table(addresses: Sequence[Sequence[int]], numbers: Sequence[float], device: torch.device) -> tuple[Tensor, Tensor]:
    """[T, C] int64 and [...] float64 on the device: the numbers of a step, which are no constants of a kernel.

    One copy, which nothing waits for: on a GPU from pinned memory, which torch does not use again before it is done.
    """
    words = torch.tensor(addresses, dtype=torch.int64)
    both = torch.cat((words.flatten(), torch.tensor(numbers, dtype=torch.float64).view(torch.int64)))
    if device.type == "cuda":
        both = both.pin_memory()
    both = both.to(device, non_blocking=True)
    return both[: words.numel()].view(words.shape), both[words.numel() :].view(torch.float64)


def aligned(*tensors: Tensor | None) -> bool:
    """Whether all begin at multiples of 16 bytes, as loads of 128 bits have to."""
    return all(t is None or t.data_ptr() % 16 == 0 for t in tensors)


def dense(tensor: Tensor) -> bool:
    """Whether its elements fill one block of memory, dimension 0 outermost: contiguous, or channels last."""
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    return tensor.is_contiguous() or (
        tensor.ndim in formats and tensor.is_contiguous(memory_format=formats[tensor.ndim])
    )


def like(grad: Tensor, param: Tensor) -> Tensor:
    """The gradient in the order of the parameter's memory."""
    return grad if grad.stride() == param.stride() else torch.empty_like(param, dtype=grad.dtype).copy_(grad)
