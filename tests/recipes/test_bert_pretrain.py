"""What the paper says of masks and pairs, and weights that come and go in Hugging Face's layout."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from dltrain import checkpoint, rundir
from dltrain.commands.trained import trained
from dltrain.data.text import TokenStore
from dltrain.recipes import bert_pretrain
from dltrain.recipes.bert_pretrain import PRESETS, BertRows, Config, PretrainBert, claim, data, main, model_config
from dltrain.seeds import key

WIDE = dataclasses.replace(PRESETS["debug"], row=128)  # rows long enough for a share of 15%
SHORT = dataclasses.replace(PRESETS["debug"], steps=3, lanes=2, eval_every=0, save_every=0)


class Spy:
    """A store that notes which sentences were asked for."""

    def __init__(self, store: TokenStore):
        self.store, self.spans = store, []
        self.sentence_ends, self.document_ends = store.sentence_ends, store.document_ends

    def span(self, first: int, last: int) -> np.ndarray:
        self.spans.append((int(first), int(last)))
        return self.store.span(first, last)

    def document(self, sentence: int) -> int:
        return int(np.searchsorted(self.document_ends, sentence, side="right"))


def rows_of(cfg: Config) -> BertRows:
    """Of all documents: none held out."""
    part, _ = data(cfg)
    return BertRows(cfg, part.tokenizer, part.store, np.arange(part.store.n_documents))


@pytest.fixture(scope="module")
def bert() -> BertRows:
    return rows_of(WIDE)


@pytest.fixture(scope="module")
def roberta() -> BertRows:
    return rows_of(dataclasses.replace(WIDE, objective="roberta"))


def every_row(rows: BertRows, epoch: int = 0) -> dict[str, np.ndarray]:
    index_N = np.arange(len(rows))
    return {k: v.numpy() for k, v in rows.batch(np.full_like(index_N, epoch), index_N).items()}


def unmasked(rows: BertRows, row: int, epoch: int = 0) -> np.ndarray:
    random = np.random.Generator(np.random.Philox(key=key("row", rows.cfg.seed, epoch, row)))
    return rows.text.row(row, random)[0]


def masks(rows: BertRows, epoch: int = 0) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """(tokens, what the model sees, predicted positions) of every row."""
    batch = every_row(rows, epoch)
    for row in range(len(rows)):
        length, n = int(batch["lengths_B"][row]), int((batch["targets_BP"][row] >= 0).sum())
        positions = batch["positions_BP"][row, :n]
        truth = unmasked(rows, row, epoch)
        assert len(truth) == length
        assert (batch["targets_BP"][row, :n] == truth[positions]).all()
        yield truth, batch["ids_BL"][row, :length], positions


@pytest.mark.parametrize("objective", ["bert", "roberta"])
def test_fifteen_percent_are_predicted_in_the_papers_shares(objective, request):
    rows: BertRows = request.getfixturevalue(objective)
    t = rows.tokenizer
    tokens = predicted = masked = kept = 0
    for truth, seen, positions in masks(rows):
        assert (np.diff(positions) > 0).all()  # no position twice
        assert not np.isin(truth[positions], [t.cls, t.sep]).any()
        others = np.ones(len(truth), bool)
        others[positions] = False
        assert (seen[others] == truth[others]).all()
        assert not np.isin(seen[positions], [t.pad, t.cls, t.sep]).any()
        tokens, predicted = tokens + len(truth), predicted + len(positions)
        masked += int((seen[positions] == t.mask).sum())
        kept += int((seen[positions] == truth[positions]).sum())
    assert predicted > 10_000
    assert predicted / tokens == pytest.approx(0.15, abs=0.005)
    assert masked / predicted == pytest.approx(0.8, abs=0.015)
    assert kept / predicted == pytest.approx(0.1, abs=0.015)  # and a random one is the same one time in 500
    assert 1 - (masked + kept) / predicted == pytest.approx(0.1, abs=0.015)


def test_masks_are_drawn_anew_in_every_epoch_and_are_a_function_of_seed_epoch_and_row(bert):
    index = np.arange(50)

    def positions(rows: BertRows, epoch: int) -> np.ndarray:
        return rows.batch(np.full_like(index, epoch), index)["positions_BP"].numpy()

    assert (positions(bert, 0) == positions(bert, 0)).all()
    other = rows_of(dataclasses.replace(WIDE, seed=1))
    for a, b in [(positions(bert, 0), positions(bert, 1)), (positions(bert, 0), positions(other, 0))]:
        assert (a != b).any(1).all()
    alone = [bert.batch(np.array([3]), np.array([row])) for row in index]
    together = bert.batch(np.full_like(index, 3), index)
    for name in together:
        if name != "count":
            assert torch.equal(torch.cat([batch[name] for batch in alone]), together[name])
    assert sum(int(batch["count"]) for batch in alone) == int(together["count"])


def test_padding_rows_weigh_nothing(bert):
    batch = bert.batch(np.zeros(3, np.int64), np.array([5, -1, -1]))
    assert int(batch["count"]) == int((batch["targets_BP"][0] >= 0).sum()) > 0
    assert (batch["targets_BP"][1:] == -100).all()
    assert (batch["ids_BL"][1:] == bert.tokenizer.pad).all()


def test_pairs(bert):
    """[CLS] A [SEP] B [SEP]: B goes on after A, or comes from another document; half and half where A can be cut."""
    spy, rows, t = Spy(bert.store), rows_of(WIDE), bert.tokenizer
    rows.text.store = spy  # type: ignore[assignment]
    labels, lengths = [], []  # of pairs that could be either
    for row, (first, last) in enumerate(rows.text.chunks_N2.tolist()):
        spy.spans.clear()
        random = np.random.Generator(np.random.Philox(key=key("row", WIDE.seed, 0, row)))
        ids, segments, label = rows.text.row(row, random)
        (a, cut), *_, (b, end) = spy.spans
        assert a == first and first < cut <= last
        seps = np.flatnonzero(ids == t.sep)
        assert ids[0] == t.cls and len(seps) == 2 and seps[1] == len(ids) - 1
        assert 4 <= len(ids) <= WIDE.row and seps[0] > 1 and seps[1] > seps[0] + 1
        assert (segments == (np.arange(len(ids)) > seps[0])).all()
        assert (ids[1 : seps[0]] == bert.store.span(a, cut)[: seps[0] - 1]).all()
        assert (ids[seps[0] + 1 : -1] == bert.store.span(b, end)[: seps[1] - seps[0] - 1]).all()
        if label:
            assert spy.document(b) == spy.document(end - 1) != spy.document(a)
        else:
            assert (b, end) == (cut, last)
        if last - first > 1:
            labels.append(label)
            lengths.append(seps[1] - seps[0] - 1)
        else:
            assert label == 1  # one sentence has no second half
    is_random, length = np.array(labels) == 1, np.array(lengths)
    assert len(labels) > 1000
    assert is_random.mean() == pytest.approx(0.5, abs=0.04)
    assert length[is_random].mean() == pytest.approx(length[~is_random].mean(), rel=0.1)  # length tells nothing
    assert every_row(bert)["next_B"].mean() == pytest.approx(0.5, abs=0.1)  # of all rows


def test_full_sentences_run_over_documents(roberta):
    """RoBERTa: each token once; [SEP] at the end, and wherever a document ends inside."""
    t, store, crossing, tokens = roberta.tokenizer, roberta.store, 0, []
    batch = every_row(roberta)
    assert (batch["next_B"] == 0).all() and (batch["segments_BL"] == 0).all()
    for row, (first, last) in enumerate(roberta.text.chunks_N2.tolist()):
        ids = unmasked(roberta, row)
        documents = len(np.unique(np.searchsorted(store.document_ends, np.arange(first, last), side="right")))
        assert ids[0] == t.cls and ids[-1] == t.sep and len(ids) <= WIDE.row
        assert int((ids == t.sep).sum()) == documents
        crossing += documents > 1
        inner = ids[(ids != t.cls) & (ids != t.sep)]
        assert (inner == store.span(first, last)).all()
        tokens.append(len(inner))
    assert crossing > 10
    covered = sum(
        int(store.sentence_ends[b - 1] - (store.sentence_ends[a - 1] if a else 0)) for a, b in roberta.text.chunks_N2
    )
    assert sum(tokens) == covered == store.n_tokens


def train(cfg: Config) -> dict[str, torch.Tensor]:
    """The weights after a run in this process."""
    threads, deterministic = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    try:
        main(cfg)
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)
    (newest,) = checkpoint.steps(Path(cfg.out) / "checkpoints")
    return checkpoint.read(newest)


def test_roberta_trains(tmp_path, capsys):
    cfg = dataclasses.replace(SHORT, objective="roberta", tokenizer_kind="bpe", out=str(tmp_path / "run"))
    weights = train(cfg)
    assert not any("next" in name for name in weights)
    assert "3/3  loss" in capsys.readouterr().out
    assert all(bool(torch.isfinite(w).all()) for w in weights.values())


def test_export_to_transformers_and_import_from_it(tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    cfg = dataclasses.replace(SHORT, out=str(tmp_path / "run"))
    weights = train(cfg)
    recipe, of_run, newest = trained(tmp_path / "run", "export")
    recipe.export(of_run, newest, tmp_path / "hf")
    theirs = transformers.BertForPreTraining.from_pretrained(tmp_path / "hf").eval()
    ours = PretrainBert(model_config(cfg)).eval()
    ours.load_state_dict(weights)
    rows, _ = data(cfg)
    batch = rows.batch(np.zeros(8, np.int64), np.arange(8))
    seen_BL = torch.arange(cfg.row) < batch["lengths_B"][:, None]
    with torch.no_grad():
        mlm, next_B2 = ours.model(
            batch["ids_BL"], batch["segments_BL"], batch["lengths_B"], torch.arange(cfg.row).expand(8, -1)
        )
        out = theirs(input_ids=batch["ids_BL"], token_type_ids=batch["segments_BL"], attention_mask=seen_BL.long())
    torch.testing.assert_close(mlm[seen_BL], out.prediction_logits[seen_BL], rtol=0, atol=1e-5)
    torch.testing.assert_close(next_B2, out.seq_relationship_logits, rtol=0, atol=1e-5)

    torch.manual_seed(1)
    for p in theirs.parameters():
        p.data += 0.1 * torch.randn_like(p)  # another model than any of ours
    theirs.save_pretrained(tmp_path / "other")
    still = dataclasses.replace(
        SHORT, steps=1, warmup=0, lr=0.0, init=str(tmp_path / "other"), out=str(tmp_path / "from")
    )
    ours.load_state_dict(train(still))
    with torch.no_grad():
        got, _ = ours.model(batch["ids_BL"], batch["segments_BL"], batch["lengths_B"], batch["positions_BP"])
        out = theirs(input_ids=batch["ids_BL"], token_type_ids=batch["segments_BL"], attention_mask=seen_BL.long())
    want = out.prediction_logits.gather(1, batch["positions_BP"][..., None].expand(-1, -1, cfg.vocab))
    predicted = batch["targets_BP"] >= 0
    torch.testing.assert_close(got[predicted], want[predicted], rtol=0, atol=1e-5)
    assert not torch.allclose(got, mlm.gather(1, batch["positions_BP"][..., None].expand(-1, -1, cfg.vocab)), atol=0.1)
    capsys.readouterr()


def test_the_checklist_passes_on_the_debug_preset(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    try:
        main(dataclasses.replace(PRESETS["debug"], debug=True, out="unused"))
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(threads)
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if line.startswith("FAIL")] == []
    assert sum(line.startswith("ok  ") for line in lines) == 7
    assert any("[MASK]" in line and "<-" in line for line in lines)


@pytest.mark.parametrize(("left", "shown"), [(3.3, True), (3.0, False)])
def test_the_claim_is_that_both_sides_beat_the_left_alone(left, shown, tmp_path, monkeypatch, capsys):
    asked = []

    def trained(cfg: Config) -> None:
        asked.append((cfg.seed, cfg.left_only))
        Path(cfg.out).mkdir(parents=True)
        loss = left if cfg.left_only else 2.9
        row = {"step": 1, "eval/mlm_loss": loss, "eval/mlm_accuracy": 1 - loss / 5}
        (Path(cfg.out) / "metrics.jsonl").write_text(f"{json.dumps(row)}\n")

    monkeypatch.setattr(bert_pretrain, "main", trained)
    monkeypatch.setattr(rundir, "environment", lambda: ({}, b""))
    with contextlib.nullcontext() if shown else pytest.raises(SystemExit):
        claim(dataclasses.replace(PRESETS["claim"], seed=5, out=str(tmp_path / "out")))
    assert asked == [(5, False), (5, True), (6, False), (6, True)]
    figures = rundir.read_json(tmp_path / "out" / "claim.json")["figures"]
    assert figures[0]["values"] == pytest.approx({"5": left - 2.9, "6": left - 2.9})
    assert [figure["shown"] for figure in figures] == [shown, shown]
    assert ("NOT shown" in capsys.readouterr().out) is not shown
