"""GPT-2 as one writes it with torch alone, for comparison: what small public trainers are built on.

Radford et al. 2019, section 2.3: torch's layers, scaled_dot_product_attention, all logits at once, compiled as a whole.
"""

# B rows, L tokens of a row, D width, H heads, K width of a head, V vocabulary

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.models.gpt import GptConfig


class Block(nn.Module):
    def __init__(self, cfg: GptConfig):
        super().__init__()
        self.heads = cfg.heads
        self.norm1, self.norm2 = nn.LayerNorm(cfg.width), nn.LayerNorm(cfg.width)
        self.qkv, self.out = nn.Linear(cfg.width, 3 * cfg.width), nn.Linear(cfg.width, cfg.width)
        self.up, self.down = nn.Linear(cfg.width, 4 * cfg.width), nn.Linear(4 * cfg.width, cfg.width)

    def forward(self, h_BLD: Tensor) -> Tensor:
        q_BLD, k_BLD, v_BLD = self.qkv(self.norm1(h_BLD)).chunk(3, -1)
        q_BHLK, k_BHLK, v_BHLK = (t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in (q_BLD, k_BLD, v_BLD))
        a_BHLK = F.scaled_dot_product_attention(q_BHLK, k_BHLK, v_BHLK, is_causal=True)
        h_BLD = h_BLD + self.out(a_BHLK.transpose(1, 2).flatten(2))
        return h_BLD + self.down(F.gelu(self.up(self.norm2(h_BLD)), approximate="tanh"))


class PlainGpt(nn.Module):
    """Without dropout; the token embedding is the output layer too."""

    def __init__(self, cfg: GptConfig):
        super().__init__()
        self.token, self.position = nn.Embedding(cfg.vocab, cfg.width), nn.Embedding(cfg.positions, cfg.width)
        self.blocks = nn.Sequential(*(Block(cfg) for _ in range(cfg.layers)))
        self.norm = nn.LayerNorm(cfg.width)
        for p in self.parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.02)

    def forward(self, ids_BL: Tensor, targets_BL: Tensor) -> Tensor:
        """The mean cross-entropy (nats) of the targets."""
        positions_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        h_BLD = self.norm(self.blocks(self.token(ids_BL) + self.position(positions_L)))
        logits_BLV = F.linear(h_BLD, self.token.weight)
        return F.cross_entropy(logits_BLV.flatten(0, 1), targets_BL.flatten())
