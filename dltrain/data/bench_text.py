"""How fast rows of tokens are made, in one process and on one core: from tokens, and from text beside the tokenizer
alone."""

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from dltrain.data.cache import built
from dltrain.data.on_the_fly import TextShards
from dltrain.data.order import Order
from dltrain.data.shards import Shards
from dltrain.data.text import text_of
from dltrain.data.token_rows import TokenRows
from dltrain.data.tokens import TokenShards, write_tokens
from dltrain.data.turns import Side
from dltrain.tokenizers import spm

ROW = 1024  # tokens
BATCH = 64  # rows
VOCAB = 8192
LETTERS = 24_000_000  # of text that is tokenised beforehand: more than a processor's caches hold
DOCUMENTS_PER_SHARD = 10


def token_sides(tokens: Shards, tokenizer: spm.Tokenizer) -> list[Side]:
    """Tokens per second of shuffled rows, packed and in fixed rows, and of 1 MiB reads of the same files."""
    source = TokenShards(tokens, tokenizer)
    return [
        _side("packed rows", TokenRows(source, ROW, pack=True)),
        _side("fixed rows", TokenRows(source, ROW, pack=False)),
    ]


def text_sides(text: Shards, tokenizer: spm.Tokenizer) -> list[Side]:
    """Tokens per second of packed rows made of text, and of the tokenizer alone on pieces as long, in memory."""
    source = TextShards(text, tokenizer)
    rows = _side("tokenised on the fly", TokenRows(source, ROW, pack=True), batch=8)
    room = source.room(ROW)
    letters = "".join(text_of(text, i) for i in range(min(len(text), 8)))
    pieces = [letters[at : at + room] for at in range(0, len(letters) - room, room)]
    batches = [pieces[at : at + 8] for at in range(0, len(pieces) - 8, 8)]
    each = np.mean([sum(map(len, tokenizer.encode(batch))) for batch in batches[:16]])
    return [rows, Side("tokenizer alone", map(tokenizer.encode, itertools.cycle(batches)), units=float(each))]


def _side(name: str, rows: TokenRows, batch: int = BATCH) -> Side:
    order = Order(len(rows), 0)

    def batches() -> Iterator[dict[str, Any]]:
        for at in itertools.count(0, batch):
            yield rows.batch(*order.at(np.arange(at, at + batch)))

    each = np.mean([int(made["count"]) for made in itertools.islice(batches(), 16)])
    return Side(name, batches(), units=float(each))


def made(text: Shards, folder: Path) -> tuple[spm.Tokenizer, Shards]:
    """A tokenizer of the text and shards of its tokens, made once in `folder`."""
    model = built(folder / f"tokenizer-{VOCAB}-{text.fingerprint[:16]}", _trainer(text)) / "tokenizer.model"
    tokenizer = spm.load(model)

    def tokenise(into: Path) -> None:
        write_tokens(_documents(text), tokenizer, into, "tokens", documents_per_shard=DOCUMENTS_PER_SHARD)

    return tokenizer, Shards(str(built(folder / f"tokens-{tokenizer.digest[:16]}", tokenise)))


def _trainer(text: Shards) -> Callable[[Path], None]:
    def train(into: Path) -> None:
        spm.train((of for _, of in _documents(text)), into / "tokenizer.model", vocab=VOCAB, kind="bpe")

    return train


def _documents(text: Shards) -> Iterator[tuple[str, str]]:
    """(key, text) of the first ones."""
    letters = 0
    for i in range(len(text)):
        if letters >= LETTERS:
            return
        document = text_of(text, i)
        letters += len(document)
        yield text.key(i), document
