import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dltrain.errors import UserError
from dltrain.models.exchange import write_huggingface
from dltrain.models.gpt import Gpt, GptConfig
from dltrain.models.gpt_exchange import from_huggingface, to_huggingface, weights_for

SMALL = GptConfig(vocab=61, layers=2, width=16, heads=2, positions=12, dropout=0.0)
IDS = torch.randint(61, (2, 12), generator=torch.Generator().manual_seed(2))


def model_of(cfg: GptConfig) -> Gpt:
    """Weights large enough, biases included, for a swapped or forgotten one to show."""
    torch.manual_seed(1)
    model = Gpt(cfg).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def exported(folder: Path) -> Gpt:
    model = model_of(SMALL)
    write_huggingface(folder, *to_huggingface(model.state_dict(), SMALL))
    return model


def assert_same_logits(ours: Gpt, theirs) -> None:
    with torch.no_grad():
        want = theirs.eval()(input_ids=IDS).logits
        torch.testing.assert_close(ours(IDS), want, rtol=0, atol=1e-5)
    assert want.std() > 0.5


def test_transformers_reads_what_we_write(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    model = exported(tmp_path / "out")
    theirs, info = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_same_logits(model, theirs)


def test_we_read_what_transformers_writes(tmp_path: Path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(3)
    config = transformers.GPT2Config(
        vocab_size=61, n_embd=16, n_layer=2, n_head=2, n_positions=12, resid_pdrop=0.0, bos_token_id=0, eos_token_id=0
    )
    theirs = transformers.GPT2LMHeadModel(config)
    for p in theirs.parameters():
        p.data += 0.2 * torch.randn_like(p)
    theirs.save_pretrained(tmp_path)
    cfg, state = from_huggingface(tmp_path)
    assert cfg == SMALL
    model = Gpt(cfg).eval()
    model.load_state_dict(state)
    assert_same_logits(model, theirs)


def test_out_and_back_is_the_same_bits(tmp_path: Path):
    model = exported(tmp_path / "out")
    cfg, state = from_huggingface(tmp_path / "out")
    assert cfg == SMALL
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_files_as_openai_published_them(tmp_path: Path):
    """No "transformer." before the names, and each layer's causal mask among the weights."""
    tensors, config = to_huggingface(model_of(SMALL).state_dict(), SMALL)
    old = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    write_huggingface(tmp_path / "old", old | {"h.0.attn.bias": torch.ones(1, 1, 12, 12).tril()}, config)
    exported(tmp_path / "new")
    new_state, old_state = from_huggingface(tmp_path / "new")[1], from_huggingface(tmp_path / "old")[1]
    assert new_state.keys() == old_state.keys()
    assert all(torch.equal(old_state[k], v) for k, v in new_state.items())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "bert"}, "model_type is 'bert'"),
        ({"activation_function": "relu"}, "activation_function is 'relu'"),
        ({"n_inner": 32}, "n_inner is 32"),
        ({"vocab_size": 60}, r"token\.weight has shape"),
        ({"n_layer": 3}, r"h\.2\..* is missing"),
    ],
)
def test_another_network_is_refused(tmp_path: Path, change: dict, message: str):
    exported(tmp_path / "out")
    path = tmp_path / "out" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError, match=message):
        from_huggingface(tmp_path / "out")


def test_weights_of_another_model_are_refused_and_another_dropout_is_not(tmp_path: Path):
    exported(tmp_path / "out")
    assert weights_for(replace(SMALL, dropout=0.5), tmp_path / "out").keys() == model_of(SMALL).state_dict().keys()
    with pytest.raises(UserError, match="positions is 12 there, 13 here"):
        weights_for(replace(SMALL, positions=13), tmp_path / "out")


def test_what_is_no_gpt2_is_not_exported():
    with pytest.raises(UserError, match="no GPT-2"):
        to_huggingface(Gpt(replace(SMALL, post_norm=True)).state_dict(), replace(SMALL, post_norm=True))
    with pytest.raises(UserError, match="muP has multipliers"):
        to_huggingface(Gpt(SMALL).state_dict(), replace(SMALL, base_width=8))
    with pytest.raises(UserError, match=r"position\.weight has shape \(12, 16\)"):
        to_huggingface(model_of(SMALL).state_dict(), replace(SMALL, positions=13))
