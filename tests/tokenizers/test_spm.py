"""Tokenizers: reproducible, readable, and refused by name when damaged."""

import itertools
import json
import pickle
import subprocess
import sys
from typing import Literal

import numpy as np
import pytest

from dltrain.errors import UserError
from dltrain.tokenizers import spm


def words(n: int) -> list[str]:
    generator = np.random.Generator(np.random.Philox(key=1))
    syllables = ["ka", "to", "mi", "ren", "sol", "ba", "du", "fi", "gor", "len"]
    lines = []
    for _ in range(n):
        picks = generator.integers(0, 10, (8, 2))
        lines.append(" ".join(syllables[a] + syllables[b] for a, b in picks).capitalize() + ".")
    return lines


@pytest.fixture(scope="module", params=["unigram", "bpe"])
def model(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("spm") / "a.model"
    spm.train(words(300), path, vocab=80, kind=request.param)
    return path


def test_special_tokens_round_trip_and_pickle(model):
    tokenizer = spm.load(model)
    assert [tokenizer.pad, tokenizer.unk, tokenizer.cls, tokenizer.sep, tokenizer.mask] == [0, 1, 2, 3, 4]
    assert tokenizer.vocab_size == 80 and tokenizer.piece(4) == "[MASK]"
    texts = words(20)
    ids = tokenizer.encode(texts)
    assert [tokenizer.decode(row) for row in ids] == texts
    assert min(map(min, ids)) > 4
    assert tokenizer.decode([2, *ids[0], 4, *ids[1], 3]) == f"[CLS] {texts[0]} [MASK] {texts[1]} [SEP]"
    assert 4 not in tokenizer.encode(["a [MASK] b"])[0]
    copy = pickle.loads(pickle.dumps(tokenizer))
    assert copy.encode(texts) == ids and copy.digest == tokenizer.digest


def test_same_text_gives_same_bytes_in_another_process(model, tmp_path):
    kind = json.loads(model.with_suffix(".json").read_text())["kind"]
    (tmp_path / "text.json").write_text(json.dumps(words(300)))
    code = (
        "import json, sys; from pathlib import Path; from dltrain.tokenizers import spm; folder = Path(sys.argv[1]);"
        "spm.train(json.loads((folder / 'text.json').read_text()), folder / 'a.model', vocab=80, kind=sys.argv[2])"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path), kind], check=True)
    for suffix in (".model", ".json"):
        assert (tmp_path / "a").with_suffix(suffix).read_bytes() == model.with_suffix(suffix).read_bytes()


def test_lowercase(tmp_path):
    tokenizer = spm.train(words(300), tmp_path / "l.model", vocab=60, kind="unigram", lowercase=True)
    assert tokenizer.encode(["Kato RENSOL"]) == tokenizer.encode(["kato rensol"])


def test_vocabulary_that_the_text_cannot_fill(tmp_path):
    cases: list[tuple[Literal["unigram", "bpe"], int, str]] = [
        ("unigram", 50_000, "the largest possible is"),
        ("bpe", 10, "the smallest possible is"),
    ]
    for kind, vocab, message in cases:
        with pytest.raises(UserError, match=f"{vocab} .* {message}") as error:
            spm.train(words(300), tmp_path / "x.model", vocab=vocab, kind=kind)
        largest = int(str(error.value).split()[-1])
        assert spm.train(words(300), tmp_path / "fits.model", vocab=largest, kind=kind).vocab_size == largest
    with pytest.raises(UserError, match="no text"):
        spm.train(["", "\n"], tmp_path / "x.model", vocab=50, kind="bpe")
    assert not list(tmp_path.glob("x.*")) and not list(tmp_path.glob(".*"))


def test_sampling_is_even_and_bounded(monkeypatch):
    monkeypatch.setattr(spm, "SAMPLE", 1000)
    lines = [f"{i:09d}" for i in range(10_000)]
    kept = spm._sample(lines)
    assert 50 <= len(kept) <= 112 and {int(b) - int(a) for a, b in itertools.pairwise(kept)} == {128}
    assert spm._sample(["a\nb", "", "c"]) == ["a", "b", "c"]


def test_damaged_tokenizers_are_named(model, tmp_path):
    copy = tmp_path / "c.model"
    spec = model.with_suffix(".json").read_text()

    def refused(content: bytes, spec: str, words: str) -> None:
        copy.write_bytes(content)
        copy.with_suffix(".json").write_text(spec)
        with pytest.raises(UserError, match=words) as error:
            spm.load(copy)
        assert "c." in str(error.value) and "\n" not in str(error.value)

    refused(model.read_bytes()[:-1], spec, "SHA-256")
    refused(model.read_bytes(), "{}", "not a tokenizer's spec")
    digest = "a9d8fb5b9d9e0f9b0c5e3b4e0dd3ba9b"  # any other
    refused(model.read_bytes(), json.dumps({"kind": "bpe", "sha256": digest}), "SHA-256")
    copy.with_suffix(".json").unlink()
    with pytest.raises(UserError, match=r"c.json: No such file"):
        spm.load(copy)
    with pytest.raises(UserError, match=r"d.model: No such file"):
        spm.load(tmp_path / "d.model")


def test_models_without_special_tokens_are_refused(tmp_path):
    import io

    import sentencepiece

    plain = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words(50)), model_writer=plain, vocab_size=50, model_type="bpe", minloglevel=2
    )
    for content, message in (
        (plain.getvalue(), r"no special token \[PAD\]"),
        (b"junkjunk", "not a sentencepiece model"),
        (b"", "p.model"),
    ):
        with pytest.raises(UserError, match=message):
            spm.Tokenizer(content, "bpe", tmp_path / "p.model")
