"""SimCLR (Chen et al. 2020, https://arxiv.org/abs/2002.05709): projection head and NT-Xent loss.

Legend: B rows of the whole step, 2 views of each, N = 2 B; D features, Z numbers of a projection.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

NOBODY = -1e9  # a similarity that no exponential sees; an infinite one would make gradients of rows of weight 0 NaN


class ProjectionHead(nn.Module):
    """h_ND -> z_NZ: one hidden layer of the features' width, ReLU between (section 4.2; the loss takes z, probes h)."""

    def __init__(self, features: int, projection: int = 128):
        super().__init__()
        self.hidden, self.out = nn.Linear(features, features), nn.Linear(features, projection, bias=False)

    def forward(self, h_ND: Tensor) -> Tensor:
        return self.out(F.relu(self.hidden(h_ND)))


def nt_xent(z_B2Z: Tensor, weights_B: Tensor, temperature: float) -> dict[str, Tensor]:
    """Equation 1 and algorithm 1: each view must find its other view among the 2 B - 1 others, by cosine similarity.

    Args:
        z_B2Z: projections of both views, of any length.
        weights_B: 1, or 0 for padding and damage: such rows are nobody's negatives.

    Returns:
        loss: [B] in nats, the mean over the row's two views; 0 for a row of weight 0.
        top1: [B], the part of its two views that found the other.
    """
    B = len(weights_B)
    z_NZ = F.normalize(z_B2Z.transpose(0, 1).flatten(0, 1), dim=1)
    itself_NN = torch.eye(2 * B, dtype=torch.bool, device=z_NZ.device)
    nobody_NN = itself_NN | (weights_B == 0).repeat(2)
    similarity_NN = (z_NZ @ z_NZ.T / temperature).masked_fill(nobody_NN, NOBODY)
    other_N = torch.arange(2 * B, device=z_NZ.device).roll(B)
    loss_2B = F.cross_entropy(similarity_NN, other_N, reduction="none").view(2, B)
    found_2B = (similarity_NN.argmax(1) == other_N).float().view(2, B)
    return {"loss": torch.where(weights_B > 0, loss_2B.mean(0), 0.0), "top1": found_2B.mean(0) * weights_B}
