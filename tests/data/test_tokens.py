"""Rows of tokens: nothing lost, nothing twice, no prediction across documents when packed; damage costs one piece."""

import itertools
import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dltrain.data.loader import Loader, n_micro, nth
from dltrain.data.on_the_fly import REACH, TextShards
from dltrain.data.order import Order
from dltrain.data.packing import Pieces
from dltrain.data.shards import Shards, write_shards
from dltrain.data.token_rows import TokenRows
from dltrain.data.tokens import TokenShards, stamp, write_tokens
from dltrain.errors import UserError

EOS = 999_999


class Numbers:
    """A tokenizer of texts of numbers, which are their tokens."""

    digest = "0123456789abcdef" * 4
    vocab_size = 1_000_000

    def arrays(self, texts):
        return [np.array(text.split(), np.int32) for text in texts]


class Letters(Numbers):
    """A tokenizer whose tokens are characters."""

    digest = "f" * 64

    def arrays(self, texts):
        return [np.array([ord(letter) for letter in text], np.int32) for text in texts]


def texts(longest=300, n=80) -> list[str]:
    """Documents of 0 ... longest numbers; no number twice."""
    size_D = np.random.Generator(np.random.Philox(key=5)).integers(0, longest + 1, n)
    size_D[[3, n - 1]] = 0
    number = itertools.count(100_000)
    return [" ".join(str(next(number)) for _ in range(size)) for size in size_D]


TEXTS = texts()
TOKENS = [tokens.tolist() for tokens in Numbers().arrays(TEXTS)]


@pytest.fixture(scope="module")
def tokens(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tokens")
    documents = ((f"{i:03d}", text) for i, text in enumerate(TEXTS))
    write_tokens(documents, Numbers(), folder, "n", documents_per_shard=30)
    return folder


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """The same in .txt, .text and .json."""
    folder = tmp_path_factory.mktemp("text")
    kinds = [lambda text: {"txt": text}, lambda text: {"text": text}, lambda text: {"json": {"n": 1, "text": text}}]
    write_shards(({"__key__": f"{i:03d}", **kinds[i % 3](text)} for i, text in enumerate(TEXTS)), folder, "t", 30)
    return folder


def source(way: str, tokens: Path, text: Path, **options):
    if way == "text":
        return TextShards(Shards(str(text)), Numbers(), margin=0.7, **options)
    return TokenShards(Shards(str(tokens)), Numbers(), **options)


def rows_of(rows, micro_batch=5) -> list[dict]:
    """Every row of one pass, as lists, without padding."""
    found = []
    for j in range(n_micro(rows, micro_batch)):
        batch = nth(rows, micro_batch, j)
        names = ("ids_BL", "targets_BL", "documents_BL", "positions_BL")
        assert all(batch[name].shape == (micro_batch, rows.row) for name in names)
        assert int(batch["count"]) == int((batch["targets_BL"] >= 0).sum())
        for b in range(micro_batch):
            row = {name: batch[name][b].tolist() for name in names}
            size = rows.row - row["documents_BL"].count(-1)
            assert row["targets_BL"][size:] == [-100] * (rows.row - size) and -100 not in row["targets_BL"][:size]
            assert not any(row["ids_BL"][size:])
            if size:
                found.append({name: column[:size] for name, column in row.items()})
    return found


@pytest.mark.parametrize("way", ["tokens", "text"])
@pytest.mark.parametrize("eos", [None, EOS])
def test_packed_rows(way, eos, tokens, text):
    rows = TokenRows(source(way, tokens, text, eos=eos), 64, pack=True)
    targets, inputs = [], []
    for row in rows_of(rows):
        # Within a document numbers follow each other; what follows a document is not its target.
        assert all(b in (a + 1, eos) for a, b in zip(row["ids_BL"], row["targets_BL"]))
        number = itertools.groupby(zip(row["documents_BL"], row["positions_BL"], row["ids_BL"]), key=lambda x: x[0])
        for _, document in number:
            _, positions, ids = zip(*document)
            assert list(positions) == list(range(len(ids))) and list(ids) == list(range(ids[0], ids[0] + len(ids)))
        inputs += row["ids_BL"]
        targets += row["targets_BL"]
    documents = [[*document, *([] if eos is None else [eos])] for document in TOKENS]
    expected = [token for document in documents for token in document[1:]]
    if way == "tokens":
        assert sorted(targets) == sorted(expected)
        assert sorted(inputs) == sorted(token for document in documents for token in document[:-1])
        assert len(targets) / (len(rows) * 64) > 0.95
    else:  # a piece's first token is no target, and there are more pieces than documents
        found = [target for target in targets if target != EOS]
        assert len(found) == len(set(found)) and set(found) < set(expected) and len(found) > 0.97 * len(expected)
        assert targets.count(EOS) == sum(bool(document) for document in TOKENS) * bool(eos)
        assert len(inputs) == len(set(inputs)) and len(set(inputs + targets)) > 0.999 * len(expected)


@pytest.mark.parametrize("eos", [None, EOS])
def test_fixed_rows_are_the_stream(eos, tokens, text):
    stream = [token for document in TOKENS for token in [*document, *([] if eos is None else [eos])]]
    rows = rows_of(TokenRows(source("tokens", tokens, text, eos=eos), 64, pack=False))
    assert [token for row in rows for token in row["ids_BL"]] == stream[:-1]
    assert [token for row in rows for token in row["targets_BL"]] == stream[1:]
    assert {len(row["ids_BL"]) for row in rows[:-1]} == {64}
    firsts = {document[0] for document in TOKENS if document} | ({eos} - {None})
    for row in rows:
        first, *others = zip(row["documents_BL"], row["positions_BL"], row["ids_BL"])
        assert first[:2] == (0, 0)
        for (before, last, token), (document, position, id) in itertools.pairwise([first, *others]):
            new = token == eos or id in firsts - {eos}
            assert (document, position) == ((before + 1, 0) if new else (before, last + 1))


def test_fixed_rows_of_text(tokens, text):
    rows = TokenRows(source("text", tokens, text, eos=EOS), 64, pack=False)
    found = [[*row["ids_BL"], row["targets_BL"][-1]] for row in rows_of(rows)]
    stream = [token for document in TOKENS for token in [*document, EOS] if document]
    assert [token for row in found for token in row] == stream and 0.5 < len(stream) / (len(rows) * 64) < 0.9


def pieces_of(shards: Shards, tokenizer, size: int, i: int) -> list[list[int]]:
    source = TextShards(shards, tokenizer)
    length = int(source.lengths()[i])
    start_P = np.arange(0, length, size)
    zero_P = np.zeros_like(start_P)
    read = source.read(Pieces(zero_P, zero_P + i, start_P, np.minimum(start_P + size, length)))
    return [np.asarray(piece).tolist() for piece in read]


@pytest.mark.parametrize("size", [1, 2, 7, 100, 1000])
def test_pieces_of_text_are_the_text(size, tmp_path):
    """However it is cut: words whole where there is white space near, letters always."""
    samples = [
        {"__key__": "a", "txt": "ab cd\tefg\n\nhij  klmnop " * 20},
        {"__key__": "b", "txt": "€ü語x" * 200},
        {"__key__": "c", "txt": "x" * (3 * REACH)},
        {"__key__": "d", "json": {"text": 'Quoted "words"\n\tand ünïcödé\n' * 20}},
        {"__key__": "e", "txt": ""},
    ]
    write_shards(samples, tmp_path, "x", 9)
    shards = Shards(str(tmp_path))
    for i, sample in enumerate(samples):
        whole = sample["json"]["text"] if "json" in sample else sample["txt"]
        pieces = pieces_of(shards, Letters(), size, i)
        assert "".join(chr(letter) for piece in pieces for letter in piece) == whole
        if i == 0:
            assert all(chr(piece[0]).isspace() for piece in pieces[1:] if piece)


def test_what_has_no_room_is_counted(tmp_path):
    """Bytes per token are measured on the first documents; later ones of shorter words do not fit."""
    documents = [" ".join(["00123456"] * 200_000), *[" ".join("12345" * 40) for _ in range(50)]]
    write_shards(({"__key__": f"{i:03d}", "txt": text} for i, text in enumerate(documents)), tmp_path, "x", 99)
    rows = TokenRows(TextShards(Shards(str(tmp_path)), Numbers(), margin=1.0), 32, pack=True)
    short = TokenRows(rows.source, 32, pack=True, documents=np.arange(1, 51))

    def total(rows, name):
        return sum(int(nth(rows, 64, j)[name]) for j in range(n_micro(rows, 64)))

    count, truncated = total(short, "count"), total(short, "truncated")
    pieces = short._packing.pieces(np.arange(len(short)))
    assert count + truncated == 50 * 200 - len(pieces.row_P) and truncated > count / 4
    assert total(rows, "truncated") >= truncated


def ledger(rows, workers, first=0, last=3):
    loader = Loader(rows, Order(len(rows), 3), batch=8, lanes=2, micro_batch=2, workers=workers)
    return [
        {name: value.tolist() for name, value in micro.batch.items()}
        for step in loader.steps(first, last, [0, 1])
        for micro in step
    ]


@pytest.mark.parametrize("way", ["tokens", "text"])
def test_resume_and_workers_change_nothing(way, tokens, text):
    rows = TokenRows(source(way, tokens, text, eos=EOS), 64, pack=True)
    whole = ledger(rows, 0)
    assert ledger(pickle.loads(pickle.dumps(rows)), 0, first=1) == whole[4:]
    if way == "text":
        assert ledger(rows, 2) == whole


def test_documents_and_fingerprint(tokens, text):
    found = set()
    for way, pack, row in itertools.product(("tokens", "text"), (True, False), (32, 64)):
        rows = TokenRows(source(way, tokens, text), row, pack=pack)
        chosen = TokenRows(rows.source, row, pack=pack, documents=np.array([7, 2]))
        ids = {token for found in rows_of(chosen) for token in found["ids_BL"]}
        assert ids and ids <= {*TOKENS[2], *TOKENS[7]}
        found |= {rows.fingerprint, chosen.fingerprint}
    assert len(found) == 16
    assert TokenRows(source("tokens", tokens, text), 32, pack=True).fingerprint in found
    assert source("tokens", tokens, text, eos=1).fingerprint != source("tokens", tokens, text).fingerprint


def flip(path: Path, payload: bytes) -> None:
    """Change a byte of the only place in a file where `payload` is, and nothing that stat tells."""
    content, stat = path.read_bytes(), path.stat()
    assert content.count(payload) == 1
    at = content.index(payload)
    with open(path, "r+b") as file:
        file.seek(at)
        file.write(bytes([payload[0] ^ 1]))
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


@pytest.mark.parametrize("pack", [True, False])
def test_damage_costs_one_document(pack, tmp_path):
    documents = [(f"{i:03d}", text) for i, text in enumerate(TEXTS)]
    (path,) = write_tokens(documents, Numbers(), tmp_path, "n", documents_per_shard=99)
    bad = next(i for i, document in enumerate(TOKENS) if len(document) > 150)
    flip(path, np.array(TOKENS[bad][100:103], "<u4").tobytes())
    with pytest.raises(UserError, match=rf"n-000000.tar.*{bad:03d}"):
        rows_of(TokenRows(TokenShards(Shards(str(tmp_path)), Numbers()), 64, pack=pack))
    rows = TokenRows(TokenShards(Shards(str(tmp_path), on_error="skip"), Numbers()), 64, pack=pack)
    batches = [nth(rows, 4, j) for j in range(n_micro(rows, 4))]
    damaged = {damage.key for batch in batches for damage in batch.get("damaged", [])}
    assert damaged == {f"{bad:03d}"} and any("damaged" not in batch for batch in batches)
    ids = {token for batch in batches for token in batch["ids_BL"][batch["targets_BL"] >= 0].tolist()}
    lost = {token for document in TOKENS for token in document} - ids
    firsts_and_lasts = {document[at] for document in TOKENS if document for at in (0, -1)}
    assert set(TOKENS[bad]) <= lost and not lost - set(TOKENS[bad]) - firsts_and_lasts
    for batch in batches:
        valid = batch["targets_BL"] >= 0
        assert int(batch["count"]) == int(valid.sum())
        step = (batch["targets_BL"] - batch["ids_BL"])[valid].tolist()
        assert set(step) == {1}, "the neighbours of what is damaged were joined"


def test_damaged_text(tmp_path):
    contents = {"a": {"txt": "1 2 3 4"}, "b": {"txt": b"1 \xff 2"}, "c": {"json": b'{"x": 1}'}}
    write_shards(({"__key__": key, **content} for key, content in contents.items()), tmp_path, "x", 9)
    with pytest.raises(UserError, match=r"'b'.*not readable"):
        rows_of(TokenRows(TextShards(Shards(str(tmp_path)), Numbers()), 8, pack=True))
    rows = TokenRows(TextShards(Shards(str(tmp_path), on_error="skip"), Numbers()), 8, pack=True)
    batch = nth(rows, 8, 0)
    assert sorted(damage.key for damage in batch["damaged"]) == ["b", "c"] and int(batch["count"]) == 3


def test_what_is_refused(tmp_path, tokens):
    def shards(name, *samples):
        write_shards([{"__key__": f"{i}", **sample} for i, sample in enumerate(samples)], tmp_path / name, "x", 9)
        return Shards(str(tmp_path / name))

    class Other(Numbers):
        digest = "9" * 64

    with pytest.raises(UserError, match=r"000.*tokenised by 0123456789abcdef.*stamp is 9999999999999999"):
        TokenShards(Shards(str(tokens)), Other())
    good = np.arange(5, dtype="<u4")
    with pytest.raises(UserError, match=r"'1' has no \.npy"):
        TokenShards(shards("lacking", {"npy": good}, {"txt": "x"}), Numbers())
    with pytest.raises(UserError, match=r"'0': its \.npy is <f8, 1-D"):
        TokenShards(shards("float", {"npy": np.zeros(3)}), Numbers())
    with pytest.raises(UserError, match=r"'0': its \.npy is <u4, 2-D"):
        TokenShards(shards("square", {"npy": np.zeros((3, 3), "<u4")}), Numbers())
    with pytest.raises(UserError, match="unreadable"):
        TokenShards(shards("garbage", {"npy": b"garbage"}), Numbers())
    for i, other in enumerate((b"garbage", good.astype("<u2"))):
        with pytest.raises(UserError, match=r"'1': its \.npy has \d+ bytes, as no 1-D array of <u4 has"):
            TokenShards(shards(f"size{i}", {"npy": good}, {"npy": other}), Numbers())
    with pytest.raises(UserError, match=r"'0' has no \.txt"):
        TextShards(shards("images", {"jpg": b"x"}), Numbers())
    for i, other in enumerate((good.astype("<i4"), good.reshape(1, 5), np.arange(5, dtype=">u4"))):
        mixed = TokenRows(TokenShards(shards(f"mixed{i}", {"npy": good}, {"npy": other}), Numbers()), 16, pack=True)
        with pytest.raises(UserError, match=r"'1'.*is not 1-D of <u4"):
            nth(mixed, 1, 0)
    large = TokenRows(TokenShards(shards("large", {"npy": good}, {"npy": good + 10**6}), Numbers()), 16, pack=True)
    with pytest.raises(UserError, match=r"'1' has token 1000004, the vocabulary 1000000"):
        nth(large, 1, 0)
    with pytest.raises(UserError, match="rows of 0"):
        TokenRows(large.source, 0, pack=True)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves its files open
def test_write_tokens(tokens, tmp_path):
    """Any number of processes writes the same bytes; shards say whose tokens they hold, and webdataset reads them."""
    from webdataset.compat import WebDataset

    documents = [(f"{i:03d}", text) for i, text in enumerate(TEXTS)]
    paths = write_tokens(iter(documents), Numbers(), tmp_path, "n", documents_per_shard=30, processes=2)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in sorted(tokens.glob("*.tar"))]
    dataset: Any = WebDataset([str(path) for path in paths], shardshuffle=False, empty_check=False).decode()
    read = list(dataset)
    assert [sample["npy"].tolist() for sample in read] == TOKENS and read[0]["npy"].dtype == np.uint32
    said = [sample[stamp(Numbers())] for sample in read if stamp(Numbers()) in sample]
    assert said == 3 * [{"sha256": Numbers.digest, "vocab_size": Numbers.vocab_size}]


@pytest.mark.data
@pytest.mark.skipif("DLTRAIN_DATA" not in os.environ, reason="DLTRAIN_DATA names no folder of data")
def test_wikitext(tmp_path):
    """On the fly: pieces' tokens are those of the whole text, a few in a hundred thousand have no room."""
    from dltrain.tokenizers import spm

    lines = Path(os.environ["DLTRAIN_DATA"], "wikitext-2", "valid.txt").read_text().split("\n = ")
    tokenizer = spm.train(lines, tmp_path / "tokenizer.model", vocab=2000, kind="unigram")
    write_shards(({"__key__": f"{i:03d}", "txt": line} for i, line in enumerate(lines)), tmp_path / "s", "x", 100)
    shards = Shards(str(tmp_path / "s"))
    longest = int(np.argmax(shards.lengths("txt")))
    pieces = pieces_of(shards, tokenizer, 700, longest)
    assert len(pieces) > 4 and [t for piece in pieces for t in piece] == tokenizer.encode([lines[longest]])[0]
    rows = TokenRows(TextShards(shards, tokenizer, eos=tokenizer.sep), 256, pack=True)
    batches = [nth(rows, 16, j) for j in range(n_micro(rows, 16))]
    count, truncated = (sum(int(batch[name]) for batch in batches) for name in ("count", "truncated"))
    assert truncated <= 0.02 * count and count >= 0.8 * 256 * len(rows)
