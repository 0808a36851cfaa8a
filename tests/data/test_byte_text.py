"""Bytes of documents, as they are; what cannot be read is named with its line."""

import gzip
import json
from pathlib import Path

import numpy as np
import pytest

from dltrain.data.byte_text import byte_tokens, byte_windows
from dltrain.errors import UserError


def write(path: Path, texts: list[str]) -> str:
    lines = "".join(json.dumps({"id": i, "text": text}) + "\n" for i, text in enumerate(texts)).encode()
    path.write_bytes(gzip.compress(lines) if path.suffix == ".gz" else lines)
    return str(path)


@pytest.mark.parametrize("name", ["books.jsonl", "books.jsonl.gz"])
def test_every_document_ends_in_a_zero(tmp_path, name):
    tokens = byte_tokens(write(tmp_path / name, ["déjà vu\n", "", "end"]))
    assert bytes(tokens) == "déjà vu\n\0\0end\0".encode()


def test_they_are_made_once_and_anew_where_the_file_changes(tmp_path):
    path = tmp_path / "books.jsonl"
    first = byte_tokens(write(path, ["one"]))
    again = byte_tokens(str(path))
    assert isinstance(first, np.memmap) and isinstance(again, np.memmap) and first.filename == again.filename
    assert bytes(byte_tokens(write(path, ["two"]))) == b"two\0"
    assert len(byte_tokens(write(path, []))) == 0


def test_windows_of_a_folder_and_of_shards(tmp_path):
    for part, text in (("train", "abcdefgh"), ("valid", "0123456789" * 10)):
        write(tmp_path / f"{part}.jsonl.gz", [text])
    train, unseen = byte_windows(str(tmp_path), 4, text=7, unseen=5)
    assert (len(train), len(unseen)) == (3, 5)
    rows = unseen.batch(np.zeros(5, int), np.arange(5))["ids_BL"]
    assert bytes(rows[:, 0].tolist()) == b"04826"  # spread over the whole text
    train, unseen = byte_windows("embedded:topics", 16, unseen=10)
    assert len(unseen) == 10 and len(train) > 8 * len(unseen)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"text": "a"}\n{"text": \n', "after line 1: no JSON with a text"),
        (b'{"text": "a"}\n["b"]\n', "after line 1"),
        (b'{"title": "a"}\n', "after line 0"),
    ],
)
def test_what_cannot_be_read_is_named(tmp_path, content, message):
    path = tmp_path / "books.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message):
        byte_tokens(str(path))
    packed = tmp_path / "books.jsonl.gz"
    packed.write_bytes(gzip.compress(content * 1000)[:-30])
    with pytest.raises(UserError, match=r"books\.jsonl\.gz, after line"):
        byte_tokens(str(packed))


def test_without_the_books_the_variable_is_named(tmp_path, monkeypatch):
    monkeypatch.setenv("DLTRAIN_DATA", str(tmp_path))
    with pytest.raises(UserError, match=r"gutenberg-en/train\.jsonl\.gz cannot be read .*: set DLTRAIN_DATA"):
        byte_windows("", 16, unseen=10)
