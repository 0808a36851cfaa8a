"""From a pattern of text shards to a tokenizer and tokens, both made once and kept in the cache."""

import os
from pathlib import Path
from typing import Literal

from dltrain.data.cache import built, cache_dir
from dltrain.data.embedded import embedded
from dltrain.data.shards import Shards
from dltrain.data.text import TokenStore, text_of, tokenise
from dltrain.errors import UserError
from dltrain.tokenizers import spm


def shards_of(pattern: str) -> Shards:
    """`pattern` is a webdataset pattern, embedded:docs or embedded:topics. UserError as Shards raises it."""
    name = pattern.removeprefix("embedded:")
    return Shards(embedded(name, cache_dir()) if name != pattern else pattern)


def tokenizer_of(shards: Shards, model: str, *, kind: Literal["unigram", "bpe"], vocab: int) -> spm.Tokenizer:
    """The tokenizer `model`; one trained on the shards' text, once, if empty.

    Raises:
        UserError: for a tokenizer that cannot be read or trained, or is of another vocabulary than `vocab`.
    """
    if model:
        tokenizer = spm.load(Path(model))
    else:
        place = cache_dir() / f"tokenizer-{kind}-{vocab}-{shards.fingerprint[:16]}"

        def train(folder: Path) -> None:
            texts = (text_of(shards, i) for i in range(len(shards)))
            spm.train(texts, folder / "tokenizer.model", vocab=vocab, kind=kind)

        tokenizer = spm.load(built(place, train) / "tokenizer.model")
    if tokenizer.vocab_size != vocab:
        raise UserError(f"tokenizer {model} has {tokenizer.vocab_size} tokens, --vocab is {vocab}: make them equal")
    return tokenizer


def tokenised(
    pattern: str, model: str, *, kind: Literal["unigram", "bpe"], vocab: int, longest: int
) -> tuple[spm.Tokenizer, TokenStore]:
    """`tokenizer_of` the shards of `pattern`, and the shards' tokens, sentences cut at `longest`.

    Raises:
        UserError: for shards or a tokenizer that cannot be read, or a tokenizer of another vocabulary than `vocab`.
    """
    shards = shards_of(pattern)
    tokenizer = tokenizer_of(shards, model, kind=kind, vocab=vocab)
    processes = min(os.cpu_count() or 1, 1 + len(shards) // 20_000)  # starting one takes seconds
    return tokenizer, tokenise(shards, tokenizer, cache_dir(), processes, longest)
