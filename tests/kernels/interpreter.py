"""Triton's interpreter mended and turned into a sanitizer. Importing this mends it; `watch` looks on.

Mended: bfloat16, which the interpreter stores as integers: casts round to nearest even, tl.dot multiplies numbers, and
arithmetic on what was not cast to float32 first is an error.

Looked at, for every kernel launched inside `watch()`:

- bounds: each lane of a load or store that the mask lets through lies within one of the launch's tensors;
- undefined lanes: masked lanes of a load without `other` are NaN (a large number for integers), and torch.empty is
  filled with NaN;
- overflow of int32 arithmetic, and tl.device_assert;
- races: no address is written by two programs of a launch, or read by one and written by another, or written twice in
  one store; atomics are counted;
- traffic: bytes loaded and stored, by argument.

Programs run one after another: what no interpreter sees is the GPU's (barriers, alignment of TMA, shared memory).
"""

import contextlib
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter as ti

from dltrain.kernels import dispatch

BF16, F32 = tl.bfloat16, tl.float32
Builder = ti.InterpreterBuilder
_original = {
    name: getattr(Builder, name)
    for name in (
        *("cast_impl", "create_fp_to_fp", "create_dot", "binary_op", "unary_op"),
        *("create_masked_load", "create_masked_store", "create_atomic_rmw"),
    )
}


class Violation(AssertionError):
    """A kernel did what a GPU would punish with a wrong number or a fault."""


@dataclass
class Launch:
    """What one launch of one kernel did: bytes by argument, atomic operations, programs that touched memory."""

    kernel: str
    loaded: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    stored: dict[str, int] = field(default_factory=lambda: defaultdict(int))
    atomics: int = 0
    programs: int = 0

    @property
    def bytes(self) -> int:
        return sum(self.loaded.values()) + sum(self.stored.values())


@dataclass
class Report:
    launches: list[Launch] = field(default_factory=list)

    def of(self, kernel: str) -> list[Launch]:
        return [launch for launch in self.launches if launch.kernel == kernel]

    @property
    def bytes(self) -> int:
        return sum(launch.bytes for launch in self.launches)


@dataclass
class _Region:
    name: str
    start: int
    stop: int
    size: int  # of an element
    writer: np.ndarray = field(init=False)  # by element: the last program to write it, or -1
    reader: np.ndarray = field(init=False)  # the program that read it, -1, or -2 for several

    def __post_init__(self) -> None:
        count = min((self.stop - self.start) // self.size, 1 << 24)  # the races of larger ones are not looked at
        self.writer = np.full(count, -1, np.int64)
        self.reader = np.full(count, -1, np.int64)


_report: Report | None = None
_launch = Launch("")
_regions: list[_Region] = []
_extra: list[torch.Tensor] = []


@contextlib.contextmanager
def watch(*reached: torch.Tensor) -> Iterator[Report]:
    """Look on; `reached` are tensors that kernels reach other than by their own arguments (tables of addresses)."""
    global _report
    options = ti.interpreter_builder.options
    deterministic, warn_only = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    _report, _extra[:] = Report(), reached
    object.__setattr__(options, "debug", True)
    torch.use_deterministic_algorithms(True, warn_only=False)
    torch.utils.deterministic.fill_uninitialized_memory = True  # type: ignore  # torch.empty gives NaN
    try:
        yield _report
    finally:
        _report = None
        _extra.clear()
        object.__setattr__(options, "debug", False)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore


# ---- launches ----


def _tensors(value: Any, name: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, ti.TensorDescriptor):
        yield name, value.base
    elif isinstance(value, tuple | list):
        for i, item in enumerate(value):
            yield from _tensors(item, f"{name}.{i}")


_run = ti.GridExecutor.__call__


def _watched_run(self: Any, *args: Any, **kwargs: Any) -> Any:
    """A launch of a kernel: infinities and NaNs are no news to a GPU, and older interpreters use numpy's older ways."""
    with np.errstate(all="ignore"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return _look_on(self, *args, **kwargs)


def _look_on(self: Any, *args: Any, **kwargs: Any) -> Any:
    global _launch
    if _report is None:
        return _run(self, *args, **kwargs)
    named = [*zip(self.arg_names, args), *kwargs.items(), *((f"reached.{i}", t) for i, t in enumerate(_extra))]
    _regions.clear()
    for name, value in named:
        for label, t in _tensors(value, name):
            if t.numel():
                last = sum((n - 1) * s for n, s in zip(t.shape, t.stride()))
                size = t.element_size()
                _regions.append(_Region(label, t.data_ptr(), t.data_ptr() + (last + 1) * size, size))
    _launch = Launch(self.fn.__name__)
    _report.launches.append(_launch)
    return _run(self, *args, **kwargs)


ti.GridExecutor.__call__ = _watched_run


# ---- memory ----


def _lanes(ptrs: Any, mask: Any) -> np.ndarray:
    addresses = np.asarray(ptrs.data)
    through = np.broadcast_to(np.asarray(mask.data, dtype=bool), addresses.shape)
    return addresses[through].astype(np.int64)


def _program(builder: Any) -> int:
    x, y, z = builder.grid_idx
    return x + builder.grid_dim[0] * (y + builder.grid_dim[1] * z)


def _look(builder: Any, ptrs: Any, mask: Any, store: bool) -> None:
    lanes = _lanes(ptrs, mask)
    if not lanes.size:
        return
    width = max(1, ptrs.get_element_ty().primitive_bitwidth // 8)
    left = np.ones(lanes.size, bool)
    program = _program(builder)
    _launch.programs = max(_launch.programs, program + 1)
    for region in _regions:
        inside = left & (lanes >= region.start) & (lanes + width <= region.stop)
        if not inside.any():
            continue
        left &= ~inside
        (_launch.stored if store else _launch.loaded)[region.name] += int(inside.sum()) * width
        at = (lanes[inside] - region.start) // region.size
        at = at[at < region.writer.size]
        if store:
            if len(np.unique(at)) != len(at):
                raise Violation(f"{_launch.kernel}: two lanes of one store write one element of {region.name}")
            others = (region.writer[at] != -1) & (region.writer[at] != program)
            others |= (region.reader[at] != -1) & (region.reader[at] != program)
            region.writer[at] = program
        else:
            others = (region.writer[at] != -1) & (region.writer[at] != program)
            read = region.reader[at]
            region.reader[at] = np.where((read == -1) | (read == program), program, -2)
        if others.any():
            raise Violation(f"{_launch.kernel}: a race of programs on {int(others.sum())} elements of {region.name}")
    if left.any():
        what = "store" if store else "load"
        raise Violation(f"{_launch.kernel}: a {what} of {int(left.sum())} lanes outside of all tensors")


def _masked_load(self: Any, ptrs: Any, mask: Any, other: Any, *rest: Any, **kwargs: Any) -> Any:
    if _report is not None:
        _look(self, ptrs, mask, store=False)
    loaded = _original["create_masked_load"](self, ptrs, mask, other, *rest, **kwargs)
    if _report is not None and other is None:
        through = np.broadcast_to(np.asarray(mask.data, dtype=bool), loaded.data.shape)
        if not through.all():
            poison = {"f": np.nan, "b": True}.get(loaded.data.dtype.kind, 0x7FC0)  # as bfloat16 a NaN too
            loaded.data = np.where(through, loaded.data, np.asarray(poison).astype(loaded.data.dtype))
    return loaded


def _masked_store(self: Any, ptrs: Any, value: Any, mask: Any, *rest: Any, **kwargs: Any) -> Any:
    if _report is not None:
        _look(self, ptrs, mask, store=True)
    return _original["create_masked_store"](self, ptrs, value, mask, *rest, **kwargs)


def _atomic_rmw(self: Any, *args: Any, **kwargs: Any) -> Any:
    if _report is not None:
        _launch.atomics += 1
    return _original["create_atomic_rmw"](self, *args, **kwargs)


# ---- bfloat16 ----


def _to_f32(handle: Any) -> Any:
    bits = np.ascontiguousarray(handle.data).astype(np.uint32) << np.uint32(16)
    return ti.TensorHandle(bits.view(np.float32), F32)


def _to_bf16(handle: Any) -> Any:
    numbers = np.ascontiguousarray(handle.data)
    bits = numbers.view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    rounded = np.where(np.isnan(numbers), np.uint32(0x7FC0), rounded).astype(np.uint16)
    return ti.TensorHandle(rounded, BF16)


def _cast(self: Any, src: Any, dst_type: Any) -> Any:
    here, there = src.dtype.scalar, dst_type.scalar
    if here == there or BF16 not in (here, there):
        return _original["cast_impl"](self, src, dst_type)
    if here == BF16:
        src = _to_f32(src)
        return src if there == F32 else _original["cast_impl"](self, src, dst_type)
    return _to_bf16(src if here == F32 else _original["cast_impl"](self, src, F32))


def _fp_to_fp(self: Any, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
    if BF16 in (src.dtype.scalar, dst_type.scalar):
        return _cast(self, src, dst_type)
    return _original["create_fp_to_fp"](self, src, dst_type, rounding_mode)


def _dot(self: Any, a: Any, b: Any, d: Any, *rest: Any, **kwargs: Any) -> Any:
    a, b = (_to_f32(h) if h.dtype.scalar == BF16 else h for h in (a, b))
    return _original["create_dot"](self, a, b, d, *rest, **kwargs)


def _binary(self: Any, lhs: Any, rhs: Any, op: Any) -> Any:
    if BF16 in (lhs.dtype.scalar, rhs.dtype.scalar):
        raise Violation(f"{op.__name__} of bfloat16: cast to float32 first")
    return _original["binary_op"](self, lhs, rhs, op)


def _unary(self: Any, arg: Any, op: Any) -> Any:
    if arg.dtype.scalar == BF16:
        raise Violation(f"{op.__name__} of bfloat16: cast to float32 first")
    return _original["unary_op"](self, arg, op)


Builder.create_masked_load, Builder.create_masked_store = _masked_load, _masked_store
Builder.create_atomic_rmw = _atomic_rmw
Builder.cast_impl, Builder.create_fp_to_fp, Builder.create_dot = _cast, _fp_to_fp, _dot
Builder.create_fp_trunc = Builder.create_fp_ext = lambda self, src, dst_type: _cast(self, src, dst_type)
Builder.binary_op, Builder.unary_op = _binary, _unary
dispatch.INTERPRETED.append(torch.bfloat16)
