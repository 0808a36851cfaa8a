"""Text for language models: tokenised once into flat files, then rows are ranges of sentences.

Shapes: T tokens, S sentences, D documents, C chunks. A sentence is what `sentences` makes of the text, with no special
token.
"""

import hashlib
import json
import multiprocessing
import re
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dltrain.data.cache import built
from dltrain.data.shards import Shards
from dltrain.errors import UserError
from dltrain.progress import track

VERSION = 1
LONGEST = 64  # tokens of a sentence; longer ones are cut
TASK = 128  # documents that a process tokenises at a time


class Encoder(Protocol):
    """What is asked of a tokenizer (`dltrain.tokenizers.spm.Tokenizer` is one). Picklable."""

    digest: str
    vocab_size: int

    def encode(self, texts: list[str]) -> list[list[int]]: ...


def sentences(text: str) -> list[str]:
    """Cut at newlines, and after . ! or ? where white space and a capital letter follow. Blank ones are dropped."""
    return [part for part in map(str.strip, re.split(r"\n|(?<=[.!?])\s+(?=[A-Z])", text)) if part]


@dataclass(frozen=True)
class TokenStore:
    """Tokenised documents, memory-mapped from `folder`; empty documents count, with no sentence. Picklable."""

    folder: Path

    @cached_property
    def _meta(self) -> dict[str, Any]:
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def fingerprint(self) -> str:
        """Of shards, tokenizer and rule for sentences."""
        return self._meta["fingerprint"]

    @cached_property
    def tokens(self) -> np.ndarray:
        """uint16 or uint32 [T]."""
        return self._map("tokens", self._meta["dtype"])

    @cached_property
    def sentence_ends(self) -> np.ndarray:
        """int64 [S], in tokens."""
        return self._map("sentence_ends", "<i8")

    @cached_property
    def document_ends(self) -> np.ndarray:
        """int64 [D], in sentences."""
        return self._map("document_ends", "<i8")

    @cached_property
    def key_hashes(self) -> np.ndarray:
        """uint64 [D], for `order.split`."""
        return self._map("key_hashes", "<u8")

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def n_documents(self) -> int:
        return len(self.document_ends)

    def token_counts(self, vocab_size: int) -> np.ndarray:
        """int64 [vocab_size]: how often each token occurs."""
        counts = np.zeros(vocab_size, np.int64)
        for start in range(0, self.n_tokens, 1 << 24):
            counts += np.bincount(self.tokens[start : start + (1 << 24)], minlength=vocab_size)
        return counts

    def span(self, first: int, last: int) -> np.ndarray:
        """The tokens of sentences first ... last - 1."""
        start = self.sentence_ends[first - 1] if first else 0
        return self.tokens[start : self.sentence_ends[last - 1] if last else 0]

    def _map(self, name: str, dtype: str) -> np.ndarray:
        path = self.folder / f"{name}.bin"
        if not path.stat().st_size:  # mmap refuses an empty file
            return np.empty(0, dtype)
        return np.memmap(path, dtype, mode="r")

    def __reduce__(self):
        return TokenStore, (self.folder,)  # not the cached maps


def tokenise(shards: Shards, tokenizer: Encoder, cache: Path, processes: int = 1, longest: int = LONGEST) -> TokenStore:
    """Every sample's text (.txt or .text, or "text" in its .json) in sentences of at most `longest` tokens.

    Made once per shards, tokenizer and `longest`, in a folder of `cache` named after them; the number of processes does
    not change it. UserError for a sample without text or that is no UTF-8.
    """
    identity = f"{VERSION} {shards.fingerprint} {tokenizer.digest} {longest}"
    fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def build(folder: Path) -> None:
        dtype = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"
        starts = range(0, len(shards), TASK)
        tokens = n_sentences = 0
        names = ("tokens", "sentence_ends", "document_ends", "key_hashes")
        with ExitStack() as stack:
            files = {name: stack.enter_context(open(folder / f"{name}.bin", "wb")) for name in names}
            encoded = _in_order(starts, (shards, tokenizer, longest), processes)
            for flat, lengths, counts in track(encoded, f"tokenising, by {TASK} documents", len(starts)):
                if isinstance(flat, UserError):
                    raise flat
                files["tokens"].write(flat.astype(dtype).tobytes())
                files["sentence_ends"].write((tokens + np.cumsum(lengths, dtype=np.int64)).tobytes())
                files["document_ends"].write((n_sentences + np.cumsum(counts, dtype=np.int64)).tobytes())
                tokens += len(flat)
                n_sentences += len(lengths)
            files["key_hashes"].write(shards.key_hashes().tobytes())
        (folder / "meta.json").write_text(json.dumps({"fingerprint": fingerprint, "dtype": dtype, "longest": longest}))

    return TokenStore(built(cache / f"tokens-{fingerprint[:16]}", build))


_source: tuple[Shards, Encoder, int]  # set once in each worker process, so that tasks need not carry it


def _in_order(starts: range, source: tuple[Shards, Encoder, int], processes: int) -> Iterator[tuple]:
    if processes <= 1:
        yield from (_encode(start, source) for start in starts)
        return
    context = multiprocessing.get_context("forkserver")
    with context.Pool(processes, _receive, (source,)) as pool:
        yield from pool.imap(_encode, starts)


def _receive(source: tuple[Shards, Encoder, int]) -> None:
    global _source
    _source = source


def _encode(start: int, source: tuple[Shards, Encoder, int] | None = None) -> tuple:
    """Documents start ... start + TASK - 1: (tokens or an error, tokens per sentence, sentences per document)."""
    shards, tokenizer, longest = source or _source
    lengths: list[int] = []
    counts: list[int] = []
    flat: list[int] = []
    try:
        for i in range(start, min(start + TASK, len(shards))):
            pieces = [
                row[cut : cut + longest]
                for row in tokenizer.encode(sentences(text_of(shards, i)))
                for cut in range(0, len(row), longest)
            ]
            for piece in pieces:
                flat += piece
            lengths += map(len, pieces)
            counts.append(len(pieces))
    except UserError as error:
        return error, None, None
    return np.array(flat, np.uint32), lengths, counts


def text_of(shards: Shards, i: int) -> str:
    """The text of a sample: .txt, .text, or "text" in its .json; UserError if it has none."""
    sample = shards[i]
    try:
        for extension in ("txt", "text"):
            if extension in sample:
                return sample[extension].decode()
        if "json" in sample:
            return json.loads(sample["json"])["text"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{shards.name(i)}: its text is not readable ({error!r}); write the shard anew") from error
    extensions = ", ".join(f".{key}" for key in sample if key != "__key__")
    raise UserError(f"{shards.name(i)} has no .txt, .text or .json, only {extensions}; give shards of text")


def document_chunks(store: TokenStore, budget: int, documents: np.ndarray | None = None) -> np.ndarray:
    """int64 [C, 2]: ranges of whole sentences, at most `budget` tokens each, cut greedily, never over a document's end.

    `documents`: numbers of the documents to use, by default all. Chunks come in the order of the store. UserError if a
    sentence is longer than `budget`.
    """
    first_D, last_D = _documents(store, documents)
    return _greedy(store.sentence_ends, np.concatenate([[0], store.sentence_ends]), first_D, last_D, budget)


def stream_chunks(store: TokenStore, budget: int, documents: np.ndarray | None = None) -> np.ndarray:
    """int64 [C, 2]: as `document_chunks`, but chunks run on over documents' ends, each inside one costing one more
    token.

    FULL-SENTENCES of RoBERTa (Liu et al. 2019, https://arxiv.org/abs/1907.11692, section 4.2). A chunk does end where
    `documents` leaves one out.
    """
    first_D, last_D = _documents(store, documents)
    if not len(first_D):
        return np.empty((0, 2), np.int64)
    ends_D = np.unique(store.document_ends)  # empty documents add no boundary
    document_S = np.searchsorted(ends_D, np.arange(len(store.sentence_ends)), side="right")
    gap = np.flatnonzero(first_D[1:] != last_D[:-1])
    first, last = first_D[np.concatenate([[0], gap + 1])], last_D[np.concatenate([gap, [-1]])]
    before = np.concatenate([[0], store.sentence_ends[:-1]]) + document_S
    return _greedy(store.sentence_ends + document_S, before, first, last, budget)


def _documents(store: TokenStore, documents: np.ndarray | None) -> tuple[np.ndarray, np.ndarray]:
    """First and last sentence of every document that is not empty, in the order of the store."""
    first_D, last_D = np.concatenate([[0], store.document_ends[:-1]]), np.asarray(store.document_ends)
    if not len(last_D):
        first_D = last_D
    if documents is not None:
        chosen = np.sort(documents)
        first_D, last_D = first_D[chosen], last_D[chosen]
    return first_D[first_D < last_D], last_D[first_D < last_D]


def _greedy(end_S: np.ndarray, start_S: np.ndarray, first_G: np.ndarray, last_G: np.ndarray, budget: int) -> np.ndarray:
    """Cut each group [first, last) of sentences at once: the k-th pass makes every group's k-th chunk.

    A chunk [a, b) costs end[b - 1] - start[a].
    """
    chunks = []
    while len(first_G):
        cut_G = np.minimum(np.searchsorted(end_S, start_S[first_G] + budget, side="right"), last_G)
        if (stuck := cut_G <= first_G).any():
            sentence = int(first_G[stuck][0])
            tokens = int(end_S[sentence] - start_S[sentence])
            raise UserError(f"sentence {sentence} has {tokens} tokens, a row has room for {budget}; use longer rows")
        chunks.append(np.stack([first_G, cut_G], axis=1))
        first_G, last_G = cut_G[cut_G < last_G], last_G[cut_G < last_G]
    if not chunks:
        return np.empty((0, 2), np.int64)
    chunk_C2 = np.concatenate(chunks).astype(np.int64)
    return chunk_C2[np.argsort(chunk_C2[:, 0])]
