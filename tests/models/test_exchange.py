import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dltrain.errors import UserError
from dltrain.models.bert import BertConfig, BertPretraining
from dltrain.models.exchange import from_huggingface, to_huggingface, write_huggingface

SMALL = BertConfig(vocab=61, layers=2, width=16, heads=2, mlp=32, positions=12)
ROBERTA = replace(SMALL, segments=1, next_sentence=False)


def model_of(cfg: BertConfig) -> BertPretraining:
    """Weights large enough, biases included, for a swapped or forgotten one to show."""
    torch.manual_seed(1)
    model = BertPretraining(cfg).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def batch(cfg: BertConfig) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    g = torch.Generator().manual_seed(2)
    ids = torch.randint(cfg.vocab, (2, 9), generator=g)
    every = torch.arange(9).expand(2, 9)
    return ids, torch.randint(cfg.segments, (2, 9), generator=g), torch.tensor([9, 5]), every


def logits_of(model: BertPretraining, cfg: BertConfig) -> tuple[Tensor, Tensor | None]:
    with torch.no_grad():
        return model(*batch(cfg))


def their_logits(model, cfg: BertConfig) -> tuple[Tensor, Tensor | None]:
    ids, segments, lengths, _ = batch(cfg)
    mask = (torch.arange(9) < lengths[:, None]).long()
    with torch.no_grad():
        out = model.eval()(input_ids=ids, token_type_ids=segments, attention_mask=mask)
    return (out.prediction_logits, out.seq_relationship_logits) if cfg.next_sentence else (out.logits, None)


def assert_same_logits(ours: tuple[Tensor, Tensor | None], theirs: tuple[Tensor, Tensor | None]) -> None:
    seen = torch.arange(9) < torch.tensor([9, 5])[:, None]
    torch.testing.assert_close(ours[0][seen], theirs[0][seen], rtol=0, atol=1e-5)
    assert ours[0][seen].std() > 0.5
    assert (ours[1] is None) == (theirs[1] is None)
    if ours[1] is not None and theirs[1] is not None:
        torch.testing.assert_close(ours[1], theirs[1], rtol=0, atol=1e-5)


def exported(folder: Path, cfg: BertConfig) -> BertPretraining:
    model = model_of(cfg)
    write_huggingface(folder, *to_huggingface(model.state_dict(), cfg))
    return model


@pytest.mark.parametrize("cfg", [SMALL, ROBERTA, replace(ROBERTA, causal=True)])
def test_transformers_reads_what_we_write(tmp_path: Path, cfg: BertConfig):
    transformers = pytest.importorskip("transformers")
    model = exported(tmp_path / "out", cfg)
    kind = transformers.BertForPreTraining if cfg.next_sentence else transformers.BertForMaskedLM
    theirs, info = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_logits(logits_of(model, cfg), their_logits(theirs, cfg))


@pytest.mark.parametrize("next_sentence", [True, False])
def test_we_read_what_transformers_writes(tmp_path: Path, next_sentence: bool):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    kind = transformers.BertForPreTraining if next_sentence else transformers.BertForMaskedLM
    theirs = kind(
        transformers.BertConfig(
            vocab_size=61,
            hidden_size=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=12,
        )
    )
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    cfg, state = from_huggingface(tmp_path)
    assert cfg == replace(SMALL, next_sentence=next_sentence)
    model = BertPretraining(cfg).eval()
    model.load_state_dict(state)
    assert_same_logits(logits_of(model, cfg), their_logits(theirs, cfg))


@pytest.mark.parametrize("cfg", [SMALL, ROBERTA])
def test_out_and_back_is_the_same_bits(tmp_path: Path, cfg: BertConfig):
    model = exported(tmp_path / "out", cfg)
    back, state = from_huggingface(tmp_path / "out")
    assert back == cfg
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_names_of_old_files(tmp_path: Path):
    tensors, config = to_huggingface(model_of(SMALL).state_dict(), SMALL)
    old = {
        k.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): v
        for k, v in tensors.items()
    }
    write_huggingface(tmp_path / "new", tensors, config)
    write_huggingface(tmp_path / "old", old, config)
    new_state, old_state = from_huggingface(tmp_path / "new")[1], from_huggingface(tmp_path / "old")[1]
    assert all(torch.equal(old_state[k], v) for k, v in new_state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hidden_act": "relu"}, "hidden_act is 'relu'"),
        ({"model_type": "roberta"}, "model_type is 'roberta'"),
        ({"tie_word_embeddings": False}, "tie_word_embeddings is False"),
        ({"attention_probs_dropout_prob": 0.0}, "attention_probs_dropout_prob"),
        ({"vocab_size": 60}, "masked_lm.decoder.bias|bert.embed.token.weight"),
        ({"num_hidden_layers": 3}, r"encoder\.layer\.2.* is missing"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, change: dict, message: str):
    exported(tmp_path / "out", SMALL)
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        from_huggingface(tmp_path / "out")


def test_missing_and_damaged_files_are_named(tmp_path: Path):
    with pytest.raises(UserError, match=r"config\.json is missing"):
        from_huggingface(tmp_path)
    exported(tmp_path / "out", SMALL)
    weights = tmp_path / "out" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match=r"model\.safetensors is damaged"):
        from_huggingface(tmp_path / "out")
    (tmp_path / "out" / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        from_huggingface(tmp_path / "out")


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tensors, config = to_huggingface(model_of(SMALL).state_dict(), SMALL)

    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        with pytest.raises(UserError, match="No space left"):
            write_huggingface(tmp_path / "out", tensors, config)
    assert list(tmp_path.iterdir()) == []
    write_huggingface(tmp_path / "out", tensors, config)
    with pytest.raises(UserError, match="exists"):
        write_huggingface(tmp_path / "out", tensors, config)
    assert from_huggingface(tmp_path / "out")[0] == SMALL


def test_the_state_of_another_config_is_refused():
    with pytest.raises(UserError, match=r"bert\.embed\.position\.weight has shape \(12, 16\)"):
        to_huggingface(model_of(SMALL).state_dict(), replace(SMALL, positions=13))
