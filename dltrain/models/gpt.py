"""GPT-2. Radford et al. 2019, "Language models are unsupervised multitask learners", section 2.3.

A causal Transformer with a norm before each sublayer and one at the end, learned positions, and the token embedding as
its output layer. GPT (Radford et al. 2018, "Improving language understanding by generative pre-training", section 4.1)
has its norms behind each sublayer instead: `post_norm`. The sizes of GPT-3 (Brown et al. 2020,
https://arxiv.org/abs/2005.14165, table 2.1) are here with dense attention in every layer, where the paper has a banded
one in every other.

`base_width` is muP (Yang et al. 2022, https://arxiv.org/abs/2203.03466, table 8): hyper-parameters found at that width
hold at any other. Weights between hidden units start with a deviation that falls as 1 / sqrt(width) and have a rate
that falls as 1 / width (`hidden_rate`, for the optimizer), the output is multiplied by base_width / width, and
attention's products are divided by the width of a head instead of its root.
"""

# B rows, L tokens of a row, D width, H heads, K width of a head, V vocabulary

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain import ops
from dltrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class GptConfig:
    """GPT-2 of 124M parameters by default. Raises UserError where the width does not divide into heads."""

    vocab: int = 50257
    layers: int = 12
    width: int = 768
    heads: int = 12
    positions: int = 1024  # longest row, tokens
    dropout: float = 0.1  # of embeddings, of each sublayer's output and of attention probabilities
    post_norm: bool = False  # as the first GPT
    base_width: int = 0  # muP's, where the hyper-parameters were found; 0: no muP

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"GPT's width ({self.width}) must be a multiple of its heads ({self.heads})")

    @property
    def hidden_rate(self) -> float:
        """muP's multiplier of the output, and of Adam's rate for weights between hidden units; 1 without muP."""
        return self.base_width / self.width if self.base_width else 1.0

    @property
    def attention_scale(self) -> float | None:
        """muP's, of attention's products: falls as 1 / K; at base_width it is the usual 1 / sqrt(K), meant by None."""
        return math.sqrt(self.base_width * self.heads) / self.width if self.base_width else None


class Linear(nn.Linear):
    """Normal weights of deviation `std`, zero bias."""

    def __init__(self, inputs: int, outputs: int, std: float = 0.02):
        self.std = std  # torch's constructor already fills the weights
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=self.std)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        nn.init.normal_(self.weight, std=0.02)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class AddNorm(LayerNorm):
    """(norm of h, h) of h = residual + what dropout leaves of a sublayer's output."""

    def forward(self, input: Tensor, residual: Tensor, dropout_p: float) -> tuple[Tensor, Tensor]:
        return ops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual, dropout_p=dropout_p
        )


class Layer(nn.Module):
    """Causal self-attention, then a feed-forward network of four times the width."""

    def __init__(self, cfg: GptConfig):
        super().__init__()
        self.heads, self.dropout, self.post_norm = cfg.heads, cfg.dropout, cfg.post_norm
        self.scale, inner = cfg.attention_scale, 0.02 * math.sqrt(cfg.hidden_rate)
        # GPT-2 scales what adds to the residual path, of which there are two a layer (section 2.3).
        outer = inner if cfg.post_norm else inner / math.sqrt(2 * cfg.layers)
        self.attention_norm = (AddNorm if cfg.post_norm else LayerNorm)(cfg.width)
        self.qkv = Linear(cfg.width, 3 * cfg.width, inner)
        self.out = Linear(cfg.width, cfg.width, outer)
        self.mlp_norm = AddNorm(cfg.width)
        self.up = Linear(cfg.width, 4 * cfg.width, inner)
        self.down = Linear(4 * cfg.width, cfg.width, outer)

    def forward(self, h_BLD: Tensor, documents_BL: Tensor | None) -> Tensor:
        dropout = self.dropout if self.training else 0.0
        if self.post_norm:
            h_BLD, _ = self.attention_norm(self.attend(h_BLD, documents_BL, dropout), h_BLD, dropout)
            h_BLD, _ = self.mlp_norm(self.feed_forward(h_BLD), h_BLD, dropout)
            return h_BLD
        a_BLD = self.attend(self.attention_norm(h_BLD), documents_BL, dropout)
        n_BLD, h_BLD = self.mlp_norm(a_BLD, h_BLD, dropout)
        return h_BLD + F.dropout(self.feed_forward(n_BLD), dropout)

    def attend(self, n_BLD: Tensor, documents_BL: Tensor | None, dropout: float) -> Tensor:
        q_BHLK, k_BHLK, v_BHLK = self.qkv(n_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        a_BHLK = ops.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLK, dropout_p=dropout, is_causal=True, scale=self.scale, documents=documents_BL
        )
        return self.out(a_BHLK.transpose(1, 2).flatten(2))

    def feed_forward(self, n_BLD: Tensor) -> Tensor:
        return self.down(ops.gelu(self.up(n_BLD), "tanh"))


class Gpt(nn.Module):
    """The token embedding's weight is the output layer's too; each parameter has one owner, so the parent uses it."""

    def __init__(self, cfg: GptConfig):
        super().__init__()
        self.cfg = cfg
        self.token = Embedding(cfg.vocab, cfg.width)
        self.position = Embedding(cfg.positions, cfg.width)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.norm = None if cfg.post_norm else LayerNorm(cfg.width)

    def hidden(self, ids_BL: Tensor, documents_BL: Tensor | None = None, positions_BL: Tensor | None = None) -> Tensor:
        """Hidden states [B, L, D] of token ids [B, L]; their products with the token embeddings are the logits.

        Of packed rows: a token sees those of its own document only, by the document numbers [B, L], and positions
        [B, L] count from the start of each. Raises UserError where a row is longer than the position table.
        """
        L = ids_BL.shape[1]
        if self.cfg.positions < L:
            raise UserError(
                f"a row of {L} tokens is longer than the model's {self.cfg.positions} positions: raise them"
            )
        if positions_BL is None:
            positions_BL = torch.arange(L, device=ids_BL.device)[None]
        h_BLD = self.token(ids_BL) + self.position(positions_BL)
        h_BLD = F.dropout(h_BLD, self.cfg.dropout, self.training)
        for layer in self.layers:
            h_BLD = layer(h_BLD, documents_BL)
        h_BLD = h_BLD if self.norm is None else self.norm(h_BLD)
        return h_BLD if self.cfg.hidden_rate == 1 else h_BLD * self.cfg.hidden_rate

    def forward(self, ids_BL: Tensor) -> Tensor:
        """Logits [B, L, V] of the token after each."""
        return F.linear(self.hidden(ids_BL), self.token.weight)

    def loss(
        self,
        ids_BL: Tensor,
        targets_BL: Tensor,
        documents_BL: Tensor | None = None,
        positions_BL: Tensor | None = None,
    ) -> Tensor:
        """The summed cross-entropy (nats) of the targets, but for those of -100; the logits never exist as a whole."""
        h_ND = self.hidden(ids_BL, documents_BL, positions_BL).flatten(0, 1)
        return ops.linear_cross_entropy(h_ND, self.token.weight, targets_BL.flatten(), reduction="sum")


@torch.no_grad()
def generate(
    model: Gpt, prompt: list[int], *, temperature: float = 1.0, top_k: int = 0, seed: int = 0, eos: int | None = None
) -> Iterator[int]:
    """Tokens that follow the prompt, one by one, up to the end of the text (`eos`) or without end.

    Temperature 0 takes the likeliest token each time; otherwise one is drawn from the `top_k` likeliest (0: from all)
    with logits divided by the temperature. Sees at most the last `positions` tokens. Every token costs a whole forward:
    nothing is cached. Raises UserError for an empty prompt or a negative temperature or top_k.
    """
    if not prompt or temperature < 0 or top_k < 0:
        raise UserError(
            f"a prompt of {len(prompt)} tokens, temperature {temperature}, top_k {top_k}: "
            "give a token at least, and no negative number"
        )
    random = torch.Generator().manual_seed(seed)
    device, ids = model.token.weight.device, list(prompt)
    while True:
        logits_V = model(torch.tensor([ids[-model.cfg.positions :]], device=device))[0, -1].float().cpu()
        if temperature == 0:
            token = int(logits_V.argmax())
        else:
            best = logits_V.topk(min(top_k, len(logits_V)) or len(logits_V))
            p = (best.values / temperature).softmax(-1)
            token = int(best.indices[torch.multinomial(p, 1, generator=random)])
        if token == eos:
            return
        ids.append(token)
        yield token
