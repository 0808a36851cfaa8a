"""Rows of tokens for language models: from documents to inputs, targets, and what attention must not cross.

Shapes: D documents, P pieces, M rows of a micro-batch (B in what it gives), L tokens of a row.
"""

import hashlib
import itertools
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from dltrain.data.cache import built, cache_dir
from dltrain.data.index import Damage
from dltrain.data.packing import Fixed, Packed, Pieces, best_fit
from dltrain.errors import UserError

VERSION = 1


class Source(Protocol):
    """Documents of so many units, tokens or bytes. Picklable."""

    fingerprint: str
    overlap: int  # units of the next piece that the last target of a piece is in
    vocab_size: int

    def lengths(self) -> np.ndarray:
        """int64 [D], in units, with the end-of-sequence token if there is one."""
        ...

    def room(self, row: int) -> int:
        """Units that give about `row` tokens."""
        ...

    def read(self, pieces: Pieces) -> list[np.ndarray | Damage]:
        """The tokens of each piece, 1-D of any integer type; UserError for damage, or Damage if the shards skip it."""
        ...

    def name(self, document: int) -> str: ...


class TokenRows:
    """Rows of `row` inputs and targets; a `dltrain.data.loader.Rows`.

    `pack`: whole documents put together so that rows are full (`packing.best_fit`). A piece of n tokens is n - 1
    inputs, each with the next one as its target; where tokens are known beforehand the next piece of a document begins
    with the last token of this one, so that every token of a document but its first is a target exactly once.
    Otherwise: the documents end to end, in rows of `row` + 1 tokens of which the last is the first of the next; every
    token but the very first is a target exactly once, the first one of a document too.

    `documents`: numbers of the documents to use, by default all.
    """

    def __init__(self, source: Source, row: int, *, pack: bool, documents: np.ndarray | None = None):
        if row < 1:
            raise UserError(f"rows of {row} tokens; give at least 1")
        self.source, self.row, self.pack = source, row, pack
        length_D = source.lengths()
        self._chosen = None if documents is None else np.sort(np.asarray(documents, np.int64))
        chosen = "all"
        if self._chosen is not None:
            length_D, chosen = length_D[self._chosen], hashlib.sha256(self._chosen.tobytes()).hexdigest()
        identity = f"rows {VERSION} {source.fingerprint} {row} {pack} {chosen}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()
        room = source.room(row)
        if pack:

            def fill(folder: Path) -> None:
                best_fit(length_D, room, source.overlap).save(folder)

            self._packing: Packed | Fixed = Packed.load(built(cache_dir() / f"packing-{self.fingerprint[:16]}", fill))
        else:
            self._packing = Fixed(length_D, room, source.overlap)

    def __len__(self) -> int:
        return len(self._packing)

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray, /) -> dict[str, Any]:
        """A micro-batch:

        ids_BL int64 (0 where there is none), targets_BL int64 (-100: none), documents_BL int32 (number of the document
        within the row, -1: none), positions_BL int64 (from the start of the document's piece), count (of targets), and
        truncated (tokens that had no room; 0-d int64). damaged, a list, where a document could not be read: its place
        stays empty.
        """
        real_M = np.flatnonzero(index_M >= 0)
        pieces = self._pieces(index_M[real_M])
        found_P = self.source.read(pieces)
        end_M = np.cumsum(np.bincount(real_M[pieces.row_P], minlength=len(index_M))).tolist()
        filling = _Filling(self.row)
        fill = filling.packed if self.pack else filling.joined
        for start, end in zip([0, *end_M], end_M):
            fill(found_P[start:end])
        batch = filling.batch(len(index_M))
        if max(int(batch["ids_BL"].max()), int(batch["targets_BL"].max())) >= self.source.vocab_size:
            self._refuse(pieces, found_P)
        if damaged := [found for found in found_P if isinstance(found, Damage)]:
            batch["damaged"] = damaged
        return batch

    def _refuse(self, pieces: Pieces, found_P: list[np.ndarray | Damage]) -> None:
        for document, tokens in zip(pieces.document_P.tolist(), found_P):
            if not isinstance(tokens, Damage) and (greatest := int(tokens.max(initial=0))) >= self.source.vocab_size:
                raise UserError(
                    f"{self.source.name(document)} has token {greatest}, the vocabulary {self.source.vocab_size}; "
                    "give the tokenizer that the shards were made with"
                )

    def _pieces(self, row_M: np.ndarray) -> Pieces:
        pieces = self._packing.pieces(row_M)
        if self._chosen is None:
            return pieces
        return Pieces(pieces.row_P, self._chosen[pieces.document_P], pieces.start_P, pieces.stop_P)


def blank(row: int) -> dict[str, torch.Tensor]:
    """A batch of one row of padding, by the names of `TokenRows.batch`."""
    found = {name: torch.zeros(1, row, dtype=torch.int64) for name in ("ids_BL", "positions_BL")}
    found |= {"targets_BL": torch.full((1, row), -100), "documents_BL": torch.full((1, row), -1, dtype=torch.int32)}
    return found | {"count": torch.tensor(0)}


class _Filling:
    """Rows of a micro-batch, filled one after the other: lists of what is put end to end at last."""

    def __init__(self, row: int):
        self.length = row
        self.ids: list[np.ndarray] = []
        self.targets: list[np.ndarray] = []
        self.documents: list[int] = []
        self.sizes: list[int] = []  # of what `documents` says
        self.count = self.truncated = 0

    def packed(self, found: list[np.ndarray | Damage]) -> None:
        """A row of pieces, each by itself."""
        left = self.length
        for number, tokens in enumerate(found):
            if isinstance(tokens, Damage) or not len(tokens):
                continue
            fit = min(len(tokens) - 1, left)
            self._add(tokens, fit)
            self.documents.append(number)
            self.sizes.append(fit)
            left -= fit
        self._pad(left)

    def joined(self, found: list[np.ndarray | Damage]) -> None:
        """A row of pieces that follow each other, but for those that damage parts."""
        left, number = self.length, 0
        for damaged, pieces in itertools.groupby(found, key=lambda piece: isinstance(piece, Damage)):
            run: list[Any] = list(pieces)
            tokens = np.concatenate(run) if len(run) > 1 and not damaged else run[0]
            if not damaged and len(tokens):
                fit = min(len(tokens) - 1, left)
                self._add(tokens, fit)
                left -= fit
                for at, piece in enumerate(run, number):
                    size = min(len(piece), fit)
                    self.documents.append(at)
                    self.sizes.append(size)
                    fit -= size
            number += len(run)
        self._pad(left)

    def _add(self, tokens: np.ndarray, fit: int) -> None:
        """`fit` inputs of the len(tokens) - 1 that have a target."""
        self.ids.append(tokens[:fit])
        self.targets.append(tokens[1 : fit + 1])
        self.count += fit
        self.truncated += len(tokens) - 1 - fit

    def _pad(self, left: int) -> None:
        if left:
            self.ids.append(np.zeros(left, np.int64))
            self.targets.append(np.full(left, -100))
            self.documents.append(-1)
            self.sizes.append(left)

    def batch(self, rows: int) -> dict[str, Any]:
        shape = rows, self.length
        ids, targets = np.empty(rows * self.length, np.int64), np.empty(rows * self.length, np.int64)
        np.concatenate(self.ids, out=ids)
        np.concatenate(self.targets, out=targets)
        sizes = np.array(self.sizes)
        documents = np.repeat(np.array(self.documents, np.int32), sizes)
        positions = np.arange(rows * self.length)
        positions -= np.repeat(np.cumsum(sizes) - sizes, sizes)
        return {
            "ids_BL": torch.from_numpy(ids.reshape(shape)),
            "targets_BL": torch.from_numpy(targets.reshape(shape)),
            "documents_BL": torch.from_numpy(documents.reshape(shape)),
            "positions_BL": torch.from_numpy(positions.reshape(shape)),
            "count": torch.tensor(self.count),
            "truncated": torch.tensor(self.truncated),
        }
