"""Tokenised text: what goes in comes out, and chunks are the greedy ones of a plain loop."""

import json
import pickle

import numpy as np
import pytest

from dltrain.data.order import split
from dltrain.data.shards import Shards, write_shards
from dltrain.data.text import TokenStore, document_chunks, sentences, stream_chunks, tokenise
from dltrain.errors import UserError


class Letters:
    """A tokenizer whose tokens are characters."""

    digest = "letters"
    vocab_size = 256

    def encode(self, texts):
        return [list(text.encode()) for text in texts]


def corpus(folder, texts, prefix="x", per_shard=3):
    write_shards(({"__key__": f"{i:04d}", "txt": text} for i, text in enumerate(texts)), folder, prefix, per_shard)
    return Shards(str(folder))


def random_texts(n: int) -> list[str]:
    generator = np.random.Generator(np.random.Philox(key=4))
    texts = [
        "\n".join("x" * length for length in generator.integers(1, 30, generator.integers(0, 12))) for _ in range(n)
    ]
    return ["", *texts, ""]


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    folder = tmp_path_factory.mktemp("text")
    return tokenise(corpus(folder / "shards", random_texts(60)), Letters(), folder / "cache")


def test_sentences():
    text = "One. Two? Three!  Four e.g. five 3.5.\n\n  Six's end\nseven. "
    assert sentences(text) == ["One.", "Two?", "Three!", "Four e.g. five 3.5.", "Six's end", "seven."]
    assert sentences(" \n ") == []


def test_store_holds_the_text(tmp_path):
    shards = corpus(tmp_path / "shards", ["Ab. Cd.", "", "e" * 150, "Zz"])
    store = tokenise(shards, Letters(), tmp_path / "cache")
    assert store.n_documents == 4 and store.document_ends.tolist() == [2, 2, 5, 6]
    assert store.sentence_ends.tolist() == [3, 6, 70, 134, 156, 158] and store.tokens.dtype == np.uint16
    assert [bytes(store.span(i, i + 1).astype(np.uint8)) for i in (0, 1, 5)] == [b"Ab.", b"Cd.", b"Zz"]
    assert bytes(store.span(0, 2).astype(np.uint8)) == b"Ab.Cd." and len(store.span(2, 2)) == 0
    counts = store.token_counts(256)
    assert counts[ord("e")] == 150 and counts.sum() == store.n_tokens == 158
    assert (store.key_hashes == shards.key_hashes()).all()
    copy = pickle.loads(pickle.dumps(store))
    assert (copy.tokens == store.tokens).all() and copy.fingerprint == store.fingerprint
    assert tokenise(shards, Letters(), tmp_path / "cache", longest=80).sentence_ends.tolist() == [3, 6, 86, 156, 158]
    assert len(list((tmp_path / "cache").glob("tokens-*"))) == 2


def test_processes_change_nothing(tmp_path):
    shards = corpus(tmp_path / "shards", random_texts(300), per_shard=70)
    one, two = (tokenise(shards, Letters(), tmp_path / str(n), processes=n) for n in (1, 2))
    for path in one.folder.iterdir():
        assert path.read_bytes() == (two.folder / path.name).read_bytes()


def test_other_sources_of_text(tmp_path):
    samples = [
        {"__key__": "a", "text": "Aa"},
        {"__key__": "b", "json": {"text": "Bb"}},
        {"__key__": "c", "json": {"text": "No"}, "txt": "Cc"},
    ]
    write_shards(samples, tmp_path / "s", "x", 9)
    assert bytes(tokenise(Shards(str(tmp_path / "s")), Letters(), tmp_path).tokens.astype(np.uint8)) == b"AaBbCc"
    for i, bad in enumerate(({"cls": 3}, {"txt": b"\xff"}, {"json": {"body": ""}})):
        write_shards([{"__key__": "bad", **bad}], tmp_path / f"bad{i}", "y", 9)
        with pytest.raises(UserError, match=r"y-000000.tar: sample 'bad'") as error:
            tokenise(Shards(str(tmp_path / f"bad{i}")), Letters(), tmp_path / "none")
        assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "none").iterdir() if not path.name.endswith(".lock")]


def test_nothing_to_tokenise(tmp_path):
    for name, texts in (("blank", ["", ""]), ("none", [])):
        (tmp_path / name).mkdir()
        (tmp_path / name / "empty.tar").write_bytes(bytes(10240))
        store = tokenise(corpus(tmp_path / name, texts), Letters(), tmp_path / "cache")
        assert store.n_tokens == 0 and store.n_documents == len(texts)
        assert document_chunks(store, 64).shape == stream_chunks(store, 64).shape == (0, 2)


def lengths(store):
    return np.diff(store.sentence_ends, prepend=0).tolist()


def greedy(store, budget, documents, stream):
    """The specification: a plain loop over the sentences of the chosen documents."""
    size = lengths(store)
    chunks: list[list[int]] = []
    used = 0
    previous = None
    for d in documents:
        first, last = (int(store.document_ends[d - 1]) if d else 0), int(store.document_ends[d])
        for s in range(first, last):
            boundary = s == first
            cost = size[s] + (1 if stream and boundary else 0)
            joined = chunks and previous == s and (stream or not boundary)
            if joined and used + cost <= budget:
                chunks[-1][1] = s + 1
                used += cost
            else:
                chunks.append([s, s + 1])
                used = size[s]
            previous = s + 1
    return chunks


@pytest.mark.parametrize("budget", [29, 64, 200, 10**6])
def test_chunks_are_the_greedy_ones(store, budget):
    training, held_out = split(store.key_hashes, 0.2)
    assert 3 < len(held_out) < 30
    for documents in (training, held_out, np.arange(store.n_documents)):
        assert document_chunks(store, budget, documents).tolist() == greedy(store, budget, documents, stream=False)
        assert stream_chunks(store, budget, documents).tolist() == greedy(store, budget, documents, stream=True)
    assert (
        document_chunks(store, budget).tolist() == document_chunks(store, budget, np.arange(store.n_documents)).tolist()
    )
    assert stream_chunks(store, budget)[:, 0].tolist() == [0, *stream_chunks(store, budget)[:-1, 1].tolist()]


def test_training_and_held_out_share_no_sentence(store):
    parts = [stream_chunks(store, 64, documents) for documents in split(store.key_hashes, 0.2)]
    covered = [s for part in parts for first, last in part for s in range(first, last)]
    assert sorted(covered) == list(range(len(store.sentence_ends)))


def test_a_row_too_short_for_a_sentence(store):
    with pytest.raises(UserError, match=r"has \d+ tokens, a row has room for 7"):
        document_chunks(store, 7)


def test_stale_caches_are_not_mistaken(tmp_path):
    first = tokenise(corpus(tmp_path / "a", ["Aa"]), Letters(), tmp_path)
    second = tokenise(corpus(tmp_path / "b", ["Bb"]), Letters(), tmp_path)
    assert first.fingerprint != second.fingerprint and bytes(second.tokens.astype(np.uint8)) == b"Bb"
    assert json.loads((second.folder / "meta.json").read_text())["fingerprint"] == second.fingerprint
