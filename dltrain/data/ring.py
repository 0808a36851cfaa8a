"""Eight Gaussians on a ring, on which generators lose modes (Metz et al. 2016, https://arxiv.org/abs/1611.02163,
section 3.1): rows, how many of the eight a set of points covers, how far two sets are apart, and what they look like.

Legend: B rows of a micro-batch, N points, D dimensions, S slices, H and W pixels.
"""

import numpy as np
import torch
from torch import Tensor

from dltrain.data.sheet import contact_sheet
from dltrain.seeds import key

ANGLES_8 = np.arange(8) * np.pi / 4
CENTRES_82 = 2 * np.stack([np.cos(ANGLES_8), np.sin(ANGLES_8)], 1)
SPREAD = 0.02  # standard deviation of each


class RingRows:
    """65,536 points, drawn once: points_B2, weights_B (0 for padding) and count."""

    def __init__(self, seed: int):
        random, n = np.random.Generator(np.random.Philox(key=key("ring", seed))), 1 << 16
        points_N2 = CENTRES_82[random.integers(8, size=n)] + SPREAD * random.standard_normal((n, 2))
        self.points_N2, self.fingerprint = torch.from_numpy(points_N2.astype(np.float32)), f"ring-{seed}"

    def __len__(self) -> int:
        return len(self.points_N2)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        weights_B = torch.from_numpy(index_M >= 0).float()
        return {"points_B2": self.points_N2[index_M], "weights_B": weights_B, "count": weights_B.sum().long()}


def modes(points_N2: Tensor) -> int:
    """How many of the eight have a hundredth of the points within six standard deviations."""
    near_N8 = torch.cdist(points_N2, torch.from_numpy(CENTRES_82).float()) < 6 * SPREAD
    return int((near_N8.float().mean(0) >= 0.01).sum())


def sliced_wasserstein(a: Tensor, b: Tensor, slices: int = 64) -> float:
    """Mean over random directions of the Wasserstein distance of two sets of N rows, of any shape, projected on them.

    Rabin et al. 2011, "Wasserstein barycenter and its application to texture mixing". In the units of the rows.
    """
    a_ND, b_ND = a.flatten(1), b.flatten(1)
    directions_DS = torch.randn(a_ND.shape[1], slices, generator=torch.Generator().manual_seed(slices))
    directions_DS /= directions_DS.norm(dim=0)
    return float(((a_ND @ directions_DS).sort(0).values - (b_ND @ directions_DS).sort(0).values).abs().mean())


def densities(*sets_N2: Tensor) -> bytes:
    """PNG of sets of points side by side, darker where there are more."""
    counts_HW = [np.histogram2d(*points_N2.T.numpy(), bins=160, range=[(-2.5, 2.5)] * 2)[0] for points_N2 in sets_N2]
    greys_HW = [255 - np.minimum(255, 64 * count_HW).astype(np.uint8) for count_HW in counts_HW]
    return contact_sheet([np.repeat(grey_HW[:, :, None], 3, 2) for grey_HW in greys_HW], columns=len(sets_N2))
