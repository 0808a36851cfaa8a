"""Rows of text for masked language models: what a row is before anything is masked, and batches of masked ones.

BERT: Devlin et al. 2018, https://arxiv.org/abs/1810.04805, appendix A.2. RoBERTa: Liu et al. 2019,
https://arxiv.org/abs/1907.11692, section 4.2.

Shapes: N rows, B rows of a batch, L tokens of a row, P predicted positions of a row, K candidates for a second half.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from dltrain.data.text import TokenStore, document_chunks, stream_chunks
from dltrain.errors import UserError


class Special(Protocol):
    """What is asked of a tokenizer: the numbers of two special tokens."""

    cls: int
    sep: int


class SentencePairs:
    """[CLS] A [SEP] B [SEP] of at most `L` tokens: B goes on after A, or comes from another document, half and half.

    Raises:
        UserError: where fewer than two of the documents have a sentence.
    """

    def __init__(self, store: TokenStore, tokenizer: Special, documents: np.ndarray, L: int):
        self.store, self.tokenizer, self.L = store, tokenizer, L
        self.chunks_N2 = document_chunks(store, L - 3, documents)
        self.documents_N = np.searchsorted(store.document_ends, self.chunks_N2[:, 0], side="right")
        if len(np.unique(self.documents_N)) < 2:
            raise UserError(f"{len(documents)} documents are too few for pairs: give more, or another --held-out")

    def row(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens, segments (0 for A, 1 for B), and 1 where B is from another document."""
        first, last = self.chunks_N2[n]
        cut = int(random.integers(first + 1, last)) if last - first > 1 else last
        a = self.store.span(first, cut)[: self.L - 4]  # leaves B a token
        b, label = self.store.span(cut, last), 0
        if cut == last or random.random() < 0.5:
            b, label = self._second_half(n, len(b) or self.L - 3 - len(a), random), 1
        b = b[: self.L - 3 - len(a)]
        ids = np.concatenate([[self.tokenizer.cls], a, [self.tokenizer.sep], b, [self.tokenizer.sep]]).astype(np.int64)
        return ids, np.repeat([0, 1], [len(a) + 2, len(b) + 1]), label

    def _second_half(self, n: int, tokens: int, random: np.random.Generator) -> np.ndarray:
        """Of 64 second halves from other documents the nearest in length, or the length alone would give it away."""
        other_K = random.integers(len(self.chunks_N2), size=64)
        while (self.documents_N[other_K] == self.documents_N[n]).all():
            other_K = random.integers(len(self.chunks_N2), size=64)
        first_K, last_K = self.chunks_N2[other_K[self.documents_N[other_K] != self.documents_N[n]]].T
        cut_K = random.integers(first_K + (last_K - first_K > 1), last_K)
        ends = self.store.sentence_ends
        length_K = ends[last_K - 1] - np.where(cut_K > 0, ends[cut_K - 1], 0)
        best = np.abs(length_K - tokens).argmin()
        return self.store.span(cut_K[best], last_K[best])


class FullSentences:
    """[CLS] sentences [SEP] of at most `L` tokens, running on over documents, with a [SEP] where one ends inside."""

    def __init__(self, store: TokenStore, tokenizer: Special, documents: np.ndarray, L: int):
        self.store, self.tokenizer = store, tokenizer
        self.chunks_N2 = stream_chunks(store, L - 2, documents)

    def row(self, n: int, random: np.random.Generator) -> tuple[np.ndarray, np.ndarray, int]:
        """Tokens; segments and label are zeros, and nothing is drawn."""
        first, last = (int(s) for s in self.chunks_N2[n])
        ends = self.store.document_ends[np.searchsorted(self.store.document_ends, first, side="right") :]
        inside = np.unique(ends[: np.searchsorted(ends, last)])
        parts = [[self.tokenizer.cls]]
        for begin, end in pairwise([first, *inside.tolist(), last]):
            parts += [self.store.span(begin, end), [self.tokenizer.sep]]
        ids = np.concatenate(parts).astype(np.int64)
        return ids, np.zeros_like(ids), 0


class MaskedRow(NamedTuple):
    """A row as the model sees it, and what it must predict where."""

    ids: np.ndarray
    segments: np.ndarray
    label: int
    positions: np.ndarray
    targets: np.ndarray


def collate(rows: Sequence[MaskedRow | None], L: int, P: int, pad: int) -> dict[str, Tensor]:
    """int64 "ids_BL" and "segments_BL", "lengths_B", "next_B", "positions_BP", "targets_BP" (-100: none), "count".

    `count` is the number of targets. None is a row of padding, which weighs nothing.
    """
    B = len(rows)
    ids_BL, segments_BL = np.full((B, L), pad, np.int64), np.zeros((B, L), np.int64)
    lengths_B, next_B = np.zeros(B, np.int64), np.zeros(B, np.int64)
    positions_BP, targets_BP = np.zeros((B, P), np.int64), np.full((B, P), -100, np.int64)
    for b, row in enumerate(rows):
        if row is not None:
            lengths_B[b], next_B[b] = len(row.ids), row.label
            ids_BL[b, : len(row.ids)], segments_BL[b, : len(row.ids)] = row.ids, row.segments
            positions_BP[b, : len(row.positions)], targets_BP[b, : len(row.positions)] = row.positions, row.targets
    arrays = {"ids_BL": ids_BL, "segments_BL": segments_BL, "lengths_B": lengths_B, "next_B": next_B}
    arrays |= {"positions_BP": positions_BP, "targets_BP": targets_BP, "count": np.array((targets_BP >= 0).sum())}
    return {k: torch.from_numpy(v) for k, v in arrays.items()}


def short_sentences(text: SentencePairs | FullSentences) -> Iterator[np.ndarray]:
    """The first sentence of 8 to 24 tokens of about fifty rows, those that have one: examples to show."""
    for first, last in text.chunks_N2[:: max(1, len(text.chunks_N2) // 50)]:
        for i in range(first, last):
            if 8 <= len(sentence := text.store.span(i, i + 1)) <= 24:
                yield sentence
                break
