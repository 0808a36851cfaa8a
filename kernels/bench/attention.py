"""Attention beside torch's flash and cuDNN kernels, our candidate configurations beside the default one.

FLOPs are those of Dao et al.: two products forward and five backward, half of them under a causal mask.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dltrain.kernels import launch
from dltrain.kernels.attention import scaled_dot_product_attention
from dltrain.kernels.bench.frame import Case, gradients

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]
BACKENDS = {"torch flash": SDPBackend.FLASH_ATTENTION, "torch cuDNN": SDPBackend.CUDNN_ATTENTION}


def cases(smoke: bool, device: torch.device) -> Iterator[Case]:
    """16k tokens in rows of several lengths; then rows that are half padding, and BERT's with dropout."""
    for E in (16,) if smoke else (64, 128):
        for L in (20,) if smoke else (512, 2048, 4096, 8192, 16384):
            for is_causal in (True, False):
                yield from _dense(smoke, device, E, L, is_causal)
    yield from _half_filled(smoke, device)
    yield from _bert(smoke, device)


def _inputs(smoke: bool, device: torch.device, B: int, H: int, L: int, E: int) -> tuple[Tensor, Tensor, Tensor]:
    dtype = torch.float32 if smoke else torch.bfloat16
    q, k, v = torch.randn(3, B, L, H, E, device=device).to(dtype).transpose(2, 3).unbind()
    return q, k, v


def _torch(smoke: bool, **options: Any) -> dict[str, Attention]:
    """torch's own kernels, each pinned; the default one changes from release to release."""

    def pinned(backend: SDPBackend, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, **options)

    if smoke:
        return {"torch": functools.partial(F.scaled_dot_product_attention, **options)}
    return {name: functools.partial(pinned, backend) for name, backend in BACKENDS.items()}


def _both(
    op: str, shape: str, functions: dict[str, Attention], inputs: tuple[Tensor, ...], flops: int
) -> Iterator[Case]:
    forward = {name: functools.partial(f, *inputs) for name, f in functions.items()}
    yield Case(f"{op} forward", shape, forward, flops=flops)
    yield Case(
        f"{op} backward", shape, {name: gradients(f, inputs) for name, f in functions.items()}, flops=5 * flops // 2
    )


def _dense(smoke: bool, device: torch.device, E: int, L: int, is_causal: bool) -> Iterator[Case]:
    B, H = (1, 2) if smoke else (16384 // L, 2048 // E)
    inputs = _inputs(smoke, device, B, H, L, E)
    ours = functools.partial(scaled_dot_product_attention, is_causal=is_causal)
    functions = {"dltrain": ours, **_torch(smoke, is_causal=is_causal)}
    op = f"attention {'causal' if is_causal else 'full'} D={E}"
    for case in _both(op, f"{B} x {H} x {L}", functions, inputs, 4 * B * H * L * L * E // (1 + is_causal)):
        if not smoke and L >= 2048:
            for kernel, use in _candidates(E):
                if ("forward" in kernel) == ("forward" in case.op):
                    case.providers[_name(kernel, use)] = _using(kernel, use, case.providers["dltrain"])
        yield case


def _half_filled(smoke: bool, device: torch.device) -> Iterator[Case]:
    """Sequences of every length up to L: packed for us, padded for torch."""
    B, H, L, E = (3, 1, 8, 16) if smoke else (32, 16, 1024, 64)
    lengths_B = torch.linspace(L // B, L, B, device=device).long()
    cu_seqlens = F.pad(lengths_B.cumsum(0), (1, 0)).int()
    total = int(cu_seqlens[-1])
    packed, padded = (_inputs(smoke, device, *shape) for shape in ((1, H, total, E), (B, H, L, E)))
    ours, theirs = functools.partial(scaled_dot_product_attention, cu_seqlens=cu_seqlens), _torch(smoke)
    flops = 4 * H * E * int((lengths_B**2).sum())
    for what, make in (("forward", functools.partial), ("backward", lambda f, *x: gradients(f, x))):
        calls = {"dltrain": make(ours, *packed)} | {f"{name}, padded": make(f, *padded) for name, f in theirs.items()}
        once = flops if what == "forward" else 5 * flops // 2
        yield Case(f"attention variable length {what}", f"{B} x {H} x <= {L}, D={E}", calls, flops=once)


def _bert(smoke: bool, device: torch.device) -> Iterator[Case]:
    """Dropout and padding; torch's flash kernel has no padding, so it does without, and dropout alone."""
    B, H, L, E = (2, 2, 20, 16) if smoke else (64, 12, 512, 64)
    inputs, lengths_B = _inputs(smoke, device, B, H, L, E), torch.full((B,), L, device=device)
    ours = functools.partial(scaled_dot_product_attention, dropout_p=0.1, key_lengths=lengths_B)
    functions = {"dltrain": ours, **_torch(smoke, dropout_p=0.1)}
    yield from _both("attention with dropout", f"{B} x {H} x {L}, D={E}", functions, inputs, 4 * B * H * L * L * E)


def _candidates(E: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Kernel and configuration of the rows that wait for a GPU's verdict."""
    for name, rows in launch.table("sm90").items():
        if name.startswith("attention_") and name.endswith("_candidates"):
            yield from ((name.removesuffix("_candidates"), row["use"]) for row in rows if row["when"]["head"] == E)


def _name(kernel: str, use: dict[str, Any]) -> str:
    how = "specialised" if use["SPECIALIZE"] else "TMA" if use["TMA"] else "pointers"
    tile = f"{use['BM']}x{use['BN']} {use['num_warps']} warps {use['num_stages']} stages"
    return f"{kernel.removeprefix('attention_')} {how} {tile}"


def _using(kernel: str, use: dict[str, Any], call: Callable[[], Any]) -> Callable[[], Any]:
    """`call` with another configuration of one kernel."""

    @contextlib.contextmanager
    def configured() -> Iterator[None]:
        lookup = launch.config
        launch.config = lambda name, *like, **when: use if name == kernel else lookup(name, *like, **when)
        try:
            yield
        finally:
            launch.config = lookup

    def run() -> Any:
        with configured():
            return call()

    return run
