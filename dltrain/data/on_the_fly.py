"""Shards of text, tokenised as rows are read: nothing to prepare and nothing to store.

Rows are made of bytes of text, whose number the index knows, so that a row is a pure function of its number here too.

Shapes: D documents, P pieces.
"""

import hashlib
import json
import re

import numpy as np

from dltrain.data.index import Damage
from dltrain.data.packing import Pieces
from dltrain.data.shards import Shards
from dltrain.data.tokens import Encoder
from dltrain.errors import UserError

VERSION = 1
EXTENSIONS = ("txt", "text", "json")  # the first that a sample has
REACH = 256  # bytes after its bound in which a piece of text may end
MEASURED = 1_000_000, 65_536  # bytes of text that bytes per token are measured on, and of one document at most
WHITE = re.compile(rb"[ \t\n\r\v\f]")


class TextShards:
    """Documents of text (.txt or .text, or "text" in their .json), tokenised when a row is read.

    Pieces are cut by bytes; the budget of a row is what its tokens take on average in the first documents, times
    `margin`: a smaller one leaves more of a row empty, a greater one cuts more tokens off rows that came out too long.
    A piece ends at the first white space after its bound, or, if there is none near, between two letters. A .json is
    read whole for every piece of it, so long documents should be .txt. `eos` is appended to every document. UserError
    for a sample without text.
    """

    overlap = 0

    def __init__(self, shards: Shards, tokenizer: Encoder, eos: int | None = None, margin: float = 0.9):
        assert margin > 0 and (eos is None or 0 <= eos < tokenizer.vocab_size), (margin, eos)
        self.shards, self.tokenizer, self.eos, self.margin = shards, tokenizer, eos, margin
        self.vocab_size = tokenizer.vocab_size
        self._end = np.array([] if eos is None else [eos], np.int32)
        self._length_D = np.full(len(shards), -1)
        self._extension_D = np.zeros(len(shards), np.uint8)
        for number, extension in enumerate(EXTENSIONS):
            length_D = shards.lengths(extension)
            new_D = (self._length_D < 0) & (length_D >= 0)
            self._length_D[new_D], self._extension_D[new_D] = length_D[new_D], number
        if (lacking := np.flatnonzero(self._length_D < 0)).size:
            raise UserError(f"{shards.name(int(lacking[0]))} has no .txt, .text or .json; give shards of text")
        self.bytes_per_token = self._measure()
        identity = f"text {VERSION} {shards.fingerprint} {tokenizer.digest} {eos} {self.bytes_per_token} {margin}"
        self.fingerprint = hashlib.sha256(identity.encode()).hexdigest()

    def lengths(self) -> np.ndarray:
        return self._length_D

    def room(self, row: int) -> int:
        return max(1, int(row * self.bytes_per_token * self.margin))

    def name(self, document: int) -> str:
        return self.shards.name(document)

    def read(self, pieces: Pieces) -> list[np.ndarray | Damage]:
        document_P, length_P = pieces.document_P, self._length_D[pieces.document_P]
        json_P = self._extension_D[document_P] == EXTENSIONS.index("json")
        start_P = np.where(json_P, 0, pieces.start_P)
        stop_P = np.where(json_P, length_P, pieces.stop_P + REACH)
        blob_P: list[bytes | Damage] = [b""] * len(document_P)
        for number, extension in enumerate(EXTENSIONS):
            where = np.flatnonzero(self._extension_D[document_P] == number)
            found = self.shards.parts(document_P[where], extension, start_P[where], stop_P[where])
            for at, blob in zip(where.tolist(), found):
                blob_P[at] = blob
        spans = zip(document_P.tolist(), blob_P, pieces.start_P.tolist(), pieces.stop_P.tolist())
        text_P = [blob if isinstance(blob, Damage) else self._text(i, blob, *span) for i, blob, *span in spans]
        encoded = iter(self.tokenizer.arrays([found[0] for found in text_P if not isinstance(found, Damage)]))
        tokens_P: list[np.ndarray | Damage] = []
        for found in text_P:
            if isinstance(found, Damage):
                tokens_P.append(found)
            else:
                tokens = next(encoded)
                tokens_P.append(np.concatenate([tokens, self._end]) if found[1] and len(self._end) else tokens)
        return tokens_P

    def _text(self, i: int, blob: bytes, start: int, stop: int) -> tuple[str, bool] | Damage:
        """(the text of units start ... stop - 1, from white space to white space, whether the document ends with it)

        in `blob`, which was read of it from `start` on, or from the beginning of a .json.
        """
        length = int(self._length_D[i])
        try:
            if EXTENSIONS[self._extension_D[i]] == "json":  # its units are spread evenly over the text
                text = json.loads(blob)["text"].encode()
                start, stop, length = (at * len(text) // length for at in (start, stop, length))
                blob = text[start : stop + REACH]
            first = _cut(blob, 0) if start else 0
            last = len(blob) if stop == length else _cut(blob, stop - start) if stop else 0
            return blob[first:last].decode(), first < last == length - start
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            return self.shards.broken(i, f"its text is not readable ({error!r})")

    def _measure(self) -> float:
        """Bytes per token of the first documents."""
        total, most = MEASURED
        length_D = np.minimum(self._length_D, most)
        n = min(len(length_D), 1 + int(np.searchsorted(np.cumsum(length_D), total)))
        zero_P = np.zeros(n, np.int64)
        found = self.read(Pieces(zero_P, np.arange(n), zero_P, length_D[:n]))
        size = sum(int(length) for length, tokens in zip(length_D, found) if not isinstance(tokens, Damage))
        return round(size / max(1, sum(len(tokens) for tokens in found if not isinstance(tokens, Damage))), 3) or 1.0


def _cut(blob: bytes, at: int) -> int:
    """Where the piece that is bound to end at `at` does: what both neighbours find, given REACH bytes after it."""
    if white := WHITE.search(blob, at, at + REACH):
        return white.start()
    if at + REACH > len(blob):  # the last word of a document
        return len(blob)
    while at < len(blob) and blob[at] & 0xC0 == 0x80:  # inside a letter of UTF-8
        at += 1
    return at
