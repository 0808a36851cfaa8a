"""How far from the truth a kernel may be."""

from collections.abc import Iterable

import torch
from torch import Tensor

EXACT = 1e-12  # of float64 through the real kernels
ROUNDING = 1.5  # times torch's own error, of half precision


def error(got: Tensor, want: Tensor) -> float:
    """Largest difference over the largest true value; nothing but equal infinities and NaNs passes for equal."""
    assert got.shape == want.shape, f"shape {tuple(got.shape)}, not {tuple(want.shape)}"
    if not got.numel():
        return 0.0
    got, want = got.double(), want.double()
    finite = want.isfinite()
    if not torch.equal(got[~finite].nan_to_num(1.0), want[~finite].nan_to_num(1.0)):
        return float("inf")
    apart = (got - want)[finite].abs().max().item() if finite.any() else 0.0
    largest = want[finite].abs().max().item() if finite.any() else 0.0
    return apart / largest if largest else apart


def exact(got: Iterable[Tensor | None], want: Iterable[Tensor | None], tolerance: float = EXACT) -> None:
    """Each tensor within `tolerance` of the reference in float64."""
    for i, (g, w) in enumerate(zip(list(got), list(want), strict=True)):
        assert (g is None) == (w is None), f"result {i}: {g} and {w}"
        if g is not None and w is not None:
            assert (apart := error(g, w)) <= tolerance, f"result {i}: relative error {apart:.2e}"


def as_good(got: Iterable[Tensor], torchs: Iterable[Tensor], want: Iterable[Tensor], factor: float = ROUNDING) -> None:
    """Each tensor's root mean square error is at most `factor` times that of torch in the same type, and finite."""
    for i, (g, t, w) in enumerate(zip(list(got), list(torchs), list(want), strict=True)):
        assert g.dtype == t.dtype, f"result {i}: {g.dtype}, torch has {t.dtype}"
        assert g.isfinite().all(), f"result {i} is not finite"
        ours, theirs = ((x.double() - w.double()).square().mean().sqrt().item() for x in (g, t))
        floor = 0.1 * torch.finfo(g.dtype).eps * w.double().square().mean().sqrt().item()
        assert ours <= factor * max(theirs, floor), f"result {i}: error {ours:.2e}, torch's own {theirs:.2e}"
