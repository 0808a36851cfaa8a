"""Shards of tokens: text tokenised beforehand, one document a sample.

A sample has .npy, one dimension of uint16 or uint32; the first of a shard also has the stamp of the tokenizer, a .json
whose name says which one it was, so that the index alone tells whether shards and tokenizer belong together.

Shapes: D documents, P pieces, S shards.
"""

import hashlib
import io
import multiprocessing
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dltrain.data.index import Damage
from dltrain.data.packing import Pieces
from dltrain.data.shards import Shards, write_shards
from dltrain.errors import UserError
from dltrain.progress import track

VERSION = 1
TASK = 1_000_000  # letters that a process tokenises at a time
WIDTHS = {"<u2": 2, "<u4": 4}  # types of tokens -> bytes
STAMP = ".tokenizer.json"  # how the extension of a stamp ends


class Encoder(Protocol):
    """What is asked of a tokenizer (`dltrain.tokenizers.spm.Tokenizer` is one). Picklable."""

    digest: str
    vocab_size: int

    def arrays(self, texts: list[str]) -> list[np.ndarray]: ...


class TokenShards:
    """Documents tokenised beforehand: .npy, 1-D of uint16 or uint32, as `write_tokens` and webdataset write them.

    `eos` is appended to every document. Shards that bear the stamp of another tokenizer than `tokenizer` are refused
    with UserError, as are samples without a .npy and arrays of another kind. Shards without a stamp are taken, but no
    token beyond the vocabulary.
    """

    overlap = 1

    def __init__(self, shards: Shards, tokenizer: Encoder, eos: int | None = None):
        assert eos is None or 0 <= eos < tokenizer.vocab_size, eos
        self.shards, self.eos, self.vocab_size = shards, eos, tokenizer.vocab_size
        self._check_stamps(stamp(tokenizer))
        length_D = shards.lengths("npy")
        if (lacking := np.flatnonzero(length_D < 0)).size:
            raise UserError(f"{shards.name(int(lacking[0]))} has no .npy; give shards of tokens, or tokenise the text")
        self._header, self._type = self._layout()
        self._length_D, rest_D = np.divmod(length_D - len(self._header), WIDTHS[self._type])
        if (other := np.flatnonzero(rest_D + (self._length_D < 0))).size:
            i = int(other[0])
            problem = f"its .npy has {length_D[i]} bytes, as no 1-D array of {self._type} has; write it anew"
            raise UserError(f"{shards.name(i)}: {problem}")
        self._end = b"" if eos is None else np.array(eos, self._type).tobytes()
        self._checked = bytearray(len(length_D))  # documents whose header this process has seen
        self.fingerprint = hashlib.sha256(f"tokens {VERSION} {shards.fingerprint} {eos}".encode()).hexdigest()

    def lengths(self) -> np.ndarray:
        return self._length_D + (self.eos is not None)

    def room(self, row: int) -> int:
        return row

    def name(self, document: int) -> str:
        return self.shards.name(document)

    def read(self, pieces: Pieces) -> list[np.ndarray | Damage]:
        header, width, document_P = len(self._header), WIDTHS[self._type], pieces.document_P
        self._check(document_P)
        spans = header + pieces.start_P * width, header + pieces.stop_P * width
        found_P = self.shards.parts(document_P, "npy", *spans)
        last_P = pieces.stop_P > self._length_D[document_P]
        tokens: list[np.ndarray | Damage] = []
        for i, found, last in zip(document_P.tolist(), found_P, last_P.tolist()):
            if isinstance(found, Damage):
                tokens.append(found)
            elif not self._checked[i]:
                tokens.append(self.shards.broken(i, f".npy is not 1-D of {self._type}, as the first one is"))
            else:
                tokens.append(np.frombuffer(found + self._end if last else found, self._type))
        return tokens

    def _layout(self) -> tuple[bytes, str]:
        """The header of the first intact document, and the type that it states."""
        for i in range(len(self.shards)):
            content = self.shards.parts(np.array([i]), "npy", np.array([0]), np.array([4096]))[0]
            if isinstance(content, Damage):
                continue
            file = io.BytesIO(content)
            try:
                np.lib.format.read_magic(file)
                shape, _, type_ = np.lib.format.read_array_header_1_0(file)
            except ValueError as error:
                raise UserError(f"{self.shards.name(i)}: its .npy is unreadable ({error}); write it anew") from error
            if len(shape) != 1 or type_.str not in WIDTHS:
                kind = f"{type_.str}, {len(shape)}-D"
                raise UserError(f"{self.shards.name(i)}: its .npy is {kind}; give 1-D arrays of uint16 or uint32")
            return content[: file.tell()], type_.str
        raise UserError("the shards of tokens have no intact sample; restore them")

    def _check(self, document_P: np.ndarray) -> None:
        """Note which documents' headers are the first one's, but for the number of tokens."""
        new = np.array([i for i in document_P.tolist() if not self._checked[i]], np.int64)
        start = np.zeros_like(new)
        before = self._header.partition(b"(")[0] + b"("
        for i, found in zip(new.tolist(), self.shards.parts(new, "npy", start, start + len(self._header))):
            if isinstance(found, bytes):
                shape = b"%d,), }" % self._length_D[i]
                self._checked[i] = found.startswith(before + shape) and found.endswith(b"\n")

    def _check_stamps(self, own: str) -> None:
        """UserError for a shard whose first sample is stamped by another tokenizer."""
        first_S = np.cumsum(self.shards.counts_S) - self.shards.counts_S
        first_S = first_S[self.shards.counts_S > 0]
        for i in first_S[self.shards.lengths(own)[first_S] < 0].tolist():
            others = [extension for extension in self.shards[i] if extension.endswith(STAMP)]
            if others:
                raise UserError(
                    f"{self.shards.name(i)} was tokenised by {others[0]}, the tokenizer's stamp is {own}; "
                    "give the tokenizer that the shards were made with, or tokenise the text anew"
                )

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_checked": bytearray(len(self._length_D))}


def write_tokens(
    documents: Iterable[tuple[str, str]],
    tokenizer: Encoder,
    folder: Path,
    prefix: str,
    *,
    documents_per_shard: int = 1000,
    processes: int = 1,
) -> list[Path]:
    """Tokenise (key, text) and write the shards that `TokenShards` reads, by `write_shards`.

    A document is a sample with a .npy, uint16 or uint32 by the size of the vocabulary. The first sample of a shard also
    has the stamp of the tokenizer. The number of processes changes nothing.
    """
    type_ = "<u2" if tokenizer.vocab_size <= 1 << 16 else "<u4"

    def samples() -> Iterator[dict[str, Any]]:
        encoded = _encoded(_tasks(track(documents, "tokenising, documents")), tokenizer, type_, processes)
        for number, (key, tokens) in enumerate(encoded):
            sample: dict[str, Any] = {"__key__": key, "npy": tokens}
            if number % documents_per_shard == 0:
                sample[stamp(tokenizer)] = {"sha256": tokenizer.digest, "vocab_size": tokenizer.vocab_size}
            yield sample

    return write_shards(samples(), folder, prefix, documents_per_shard)


Document = tuple[str, str]  # key, text


def _tasks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    """About TASK letters each."""
    task: list[Document] = []
    size = 0
    for key, text in documents:
        task.append((key, text))
        size += len(text)
        if size >= TASK:
            yield task
            task, size = [], 0
    if task:
        yield task


def _encoded(
    tasks: Iterator[list[Document]], tokenizer: Encoder, type_: str, processes: int
) -> Iterator[tuple[str, np.ndarray]]:
    """(key, tokens) in the order of the documents; few tasks are under way at a time, however many there are."""
    if processes <= 1:
        for task in tasks:
            yield from _encode(task, tokenizer, type_)
        return
    with multiprocessing.get_context("forkserver").Pool(processes, _receive, (tokenizer, type_)) as pool:
        under_way: deque[Any] = deque()
        for task in tasks:
            under_way.append(pool.apply_async(_encode, (task,)))
            if len(under_way) > 2 * processes:
                yield from under_way.popleft().get()
        while under_way:
            yield from under_way.popleft().get()


_settings: tuple[Encoder, str]  # set once in each worker process, so that tasks need not carry it


def _receive(*settings: Any) -> None:
    global _settings
    _settings = settings  # type: ignore[assignment]


def _encode(task: list[Document], *settings: Any) -> list[tuple[str, np.ndarray]]:
    tokenizer, type_ = settings or _settings
    encoded = tokenizer.arrays([text for _, text in task])
    return [(key, np.asarray(tokens, type_)) for (key, _), tokens in zip(task, encoded)]


def stamp(tokenizer: Encoder) -> str:
    """Extension of the member that says which tokenizer made the tokens of a shard, in its first sample."""
    return tokenizer.digest[:16].lower() + STAMP
