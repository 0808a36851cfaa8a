"""BERT. Devlin et al. 2018, https://arxiv.org/abs/1810.04805, section 3 and appendix A.2.

A post-norm Transformer encoder with learned positions and segments, and the two heads of pre-training: masked language
model and next sentence. RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692) is the same network with
`segments=1, next_sentence=False`.
"""

# B rows, L tokens of a row, P predicted positions of a row, D width, H heads, K width of a head, V vocabulary

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain import ops
from dltrain.errors import UserError


@dataclass(frozen=True, kw_only=True)
class BertConfig:
    """BERT-base by default. Raises UserError where the width does not divide into heads."""

    vocab: int = 30522
    layers: int = 12
    width: int = 768
    heads: int = 12
    mlp: int = 3072  # inner width of the feed-forward network
    positions: int = 512  # longest row, tokens
    segments: int = 2  # segment types: 2 for sentence pairs, 1 for none
    next_sentence: bool = True  # with a pooler and a next-sentence head
    dropout: float = 0.1  # of embeddings, of each sublayer's output and of attention probabilities
    layer_norm_eps: float = 1e-12
    causal: bool = False  # each token sees those before it alone: what BERT is compared with

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise UserError(f"BERT's width ({self.width}) must be a multiple of its heads ({self.heads})")


BASE = BertConfig()  # 110,106,428 parameters with both heads
LARGE = replace(BASE, layers=24, width=1024, heads=16, mlp=4096)  # 336,226,108
TINY = replace(BASE, layers=2, width=128, heads=2, mlp=512)  # Turc et al. 2019, https://arxiv.org/abs/1908.08962


def _initialise(weight_: Tensor) -> None:
    """Normal with deviation 0.02, redrawn beyond two deviations, as in the paper's code (`create_initializer`)."""
    nn.init.trunc_normal_(weight_, std=0.02, a=-0.04, b=0.04)


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        _initialise(self.weight)
        nn.init.zeros_(self.bias)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        _initialise(self.weight)


class LayerNorm(nn.LayerNorm):
    def forward(self, input: Tensor) -> Tensor:
        return ops.layer_norm(input, self.normalized_shape, self.weight, self.bias, self.eps)


class AddNorm(LayerNorm):
    """The end of a post-norm sublayer: the norm of the residual plus what dropout leaves of the sublayer's output."""

    def forward(self, input: Tensor, residual: Tensor, dropout_p: float) -> Tensor:
        y, _ = ops.layer_norm(
            input, self.normalized_shape, self.weight, self.bias, self.eps, residual=residual, dropout_p=dropout_p
        )
        return y


class Embeddings(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.token = Embedding(cfg.vocab, cfg.width)
        self.position = Embedding(cfg.positions, cfg.width)
        self.segment = Embedding(cfg.segments, cfg.width)
        self.norm = LayerNorm(cfg.width, eps=cfg.layer_norm_eps)
        self.dropout = cfg.dropout

    def forward(self, ids_BL: Tensor, segments_BL: Tensor) -> Tensor:
        positions_L = torch.arange(ids_BL.shape[1], device=ids_BL.device)
        h_BLD = self.token(ids_BL) + self.segment(segments_BL) + self.position(positions_L)
        return F.dropout(self.norm(h_BLD), self.dropout, self.training)


class Layer(nn.Module):
    """Self-attention, then a feed-forward network, each followed by dropout, the residual sum and a norm."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.heads, self.dropout, self.causal = cfg.heads, cfg.dropout, cfg.causal
        self.qkv = Linear(cfg.width, 3 * cfg.width)
        self.out = Linear(cfg.width, cfg.width)
        self.attention_norm = AddNorm(cfg.width, eps=cfg.layer_norm_eps)
        self.up = Linear(cfg.width, cfg.mlp)
        self.down = Linear(cfg.mlp, cfg.width)
        self.mlp_norm = AddNorm(cfg.width, eps=cfg.layer_norm_eps)

    def forward(self, h_BLD: Tensor, lengths_B: Tensor) -> Tensor:
        q_BHLK, k_BHLK, v_BHLK = self.qkv(h_BLD).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        dropout = self.dropout if self.training else 0.0
        a_BHLK = ops.scaled_dot_product_attention(
            q_BHLK, k_BHLK, v_BHLK, dropout_p=dropout, is_causal=self.causal, key_lengths=lengths_B
        )
        a_BLD = self.out(a_BHLK.transpose(1, 2).flatten(2))
        h_BLD = self.attention_norm(a_BLD, h_BLD, dropout)
        m_BLD = self.down(ops.gelu(self.up(h_BLD)))
        return self.mlp_norm(m_BLD, h_BLD, dropout)


class Bert(nn.Module):
    """The encoder, and the pooler where the config has a next-sentence head."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.cfg = cfg
        self.embed = Embeddings(cfg)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.layers))
        self.pooler = Linear(cfg.width, cfg.width) if cfg.next_sentence else None

    def forward(self, ids_BL: Tensor, segments_BL: Tensor, lengths_B: Tensor) -> Tensor:
        """Hidden states [B, L, D] of token ids and segments [B, L]; row b has `lengths_B[b]` tokens, then padding.

        No token attends to padding, so what stands there does not matter; hidden states at padding are finite and
        mean nothing. Raises UserError where a row is longer than the position table.
        """
        L = ids_BL.shape[1]
        if self.cfg.positions < L:
            raise UserError(
                f"a row of {L} tokens is longer than the model's {self.cfg.positions} positions: raise them"
            )
        # A row of padding alone sees its first token: over no key some attention kernels give 0, others NaN.
        lengths_B = lengths_B.clamp(min=1)
        h_BLD = self.embed(ids_BL, segments_BL)
        for layer in self.layers:
            h_BLD = layer(h_BLD, lengths_B)
        return h_BLD

    def pool(self, h_BLD: Tensor) -> Tensor:
        """[B, D]: what classifiers of whole rows read, from the first token ([CLS])."""
        assert self.pooler is not None, "next_sentence=False has no pooler"
        return torch.tanh(self.pooler(h_BLD[:, 0]))


class Decoder(nn.Module):
    """Logits from the token embedding's weight, which the parent passes in, and a bias of its own.

    Not a tied parameter: each parameter has one owner, which is what sharding and checkpoints by name need.
    """

    def __init__(self, vocab: int):
        super().__init__()
        self.bias = nn.Parameter(torch.empty(vocab))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.bias)

    def forward(self, h_BPD: Tensor, weight_VD: Tensor) -> Tensor:
        return F.linear(h_BPD, weight_VD, self.bias)


class MaskedLMHead(nn.Module):
    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.dense = Linear(cfg.width, cfg.width)
        self.norm = LayerNorm(cfg.width, eps=cfg.layer_norm_eps)
        self.decoder = Decoder(cfg.vocab)

    def forward(self, h_BPD: Tensor, weight_VD: Tensor) -> Tensor:
        return self.decoder(self.norm(ops.gelu(self.dense(h_BPD))), weight_VD)


class BertPretraining(nn.Module):
    """BERT with its pre-training heads."""

    def __init__(self, cfg: BertConfig):
        super().__init__()
        self.bert = Bert(cfg)
        self.masked_lm = MaskedLMHead(cfg)
        self.next_sentence = Linear(cfg.width, 2) if cfg.next_sentence else None

    def forward(
        self, ids_BL: Tensor, segments_BL: Tensor, lengths_B: Tensor, positions_BP: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """Masked-LM logits [B, P, V] at `positions_BP`, and next-sentence logits [B, 2] (class 0: B follows A) or None.

        Only the predicted positions are multiplied with the vocabulary, the largest product of a small model.
        """
        h_BLD = self.bert(ids_BL, segments_BL, lengths_B)
        h_BPD = h_BLD.gather(1, positions_BP[..., None].expand(-1, -1, h_BLD.shape[-1]))
        logits_BPV = self.masked_lm(h_BPD, self.bert.embed.token.weight)
        return logits_BPV, None if self.next_sentence is None else self.next_sentence(self.bert.pool(h_BLD))
