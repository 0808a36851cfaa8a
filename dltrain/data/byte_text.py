"""Text as bytes: the tokens of a language model that needs no tokenizer, made once and kept in the cache."""

# T tokens

import gzip
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from dltrain.data.cache import built, cache_dir
from dltrain.data.corpus import shards_of
from dltrain.data.text import text_of
from dltrain.data.windows import Windows
from dltrain.errors import UserError
from dltrain.progress import track

VOCAB = 256


def byte_tokens(source: str) -> np.ndarray:
    """uint8, memory-mapped: the UTF-8 bytes of all documents, a zero byte behind each.

    `source` is a file of JSON lines (.jsonl or .jsonl.gz) whose documents are called "text", or a pattern of shards of
    text as `dltrain.data.corpus.shards_of` has it.

    Raises:
        UserError: for a file or shards that cannot be read, with the line.
    """
    if not source.endswith((".jsonl", ".jsonl.gz")):
        shards = shards_of(source)
        return _kept(shards.fingerprint, lambda: (text_of(shards, i) for i in range(len(shards))))
    path = Path(source)
    try:
        with path.open("rb") as file:
            identity = hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): set DLTRAIN_DATA or --data to its folder") from None
    return _kept(identity, lambda: _documents(path))


def byte_windows(data: str, row: int, *, text: int = 0, unseen: int) -> tuple[Windows, Windows]:
    """Every window of the training text, of which the first `text` bytes are used (0: all), and `unseen` windows spread
    over the held-out text.

    `data` is a folder of train.jsonl.gz and valid.jsonl.gz, $DLTRAIN_DATA/gutenberg-en if empty; or a pattern of shards
    of text, whose last tenth is held out. UserError as `byte_tokens` raises it.
    """
    folder = Path(data or Path(os.environ.get("DLTRAIN_DATA", "data")) / "gutenberg-en")
    if data and not folder.is_dir():
        tokens_T = byte_tokens(data)
        train_T, unseen_T = np.split(tokens_T, [len(tokens_T) * 9 // 10])
    else:
        train_T, unseen_T = (byte_tokens(str(folder / f"{part}.jsonl.gz")) for part in ("train", "valid"))
    stride = max(1, (len(unseen_T) - row - 1) // max(1, unseen - 1))
    return Windows(train_T[: text or None], row, 1, str(folder)), Windows(unseen_T, row, stride, str(folder))


def _kept(identity: str, documents: Callable[[], Iterator[str]]) -> np.ndarray:
    def write(folder: Path) -> None:
        with (folder / "tokens").open("wb") as file:
            for text in track(documents(), "documents, to bytes"):
                file.write(text.encode("utf-8", "replace") + b"\0")

    path = built(cache_dir() / f"bytes-{identity[:24]}", write) / "tokens"
    return np.memmap(path, np.uint8, "r") if path.stat().st_size else np.empty(0, np.uint8)


def _documents(path: Path) -> Iterator[str]:
    line = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for line, row in enumerate(file, 1):  # noqa: B007  # the error says it
                yield str(json.loads(row)["text"])
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}, after line {line - 1 if line else 0}: no JSON with a text ({error!r}): fetch it again"
        ) from None
