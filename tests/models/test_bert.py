from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.models.bert import BASE, LARGE, TINY, BertConfig, BertPretraining

SMALL = BertConfig(vocab=61, layers=2, width=16, heads=2, mlp=32, positions=12)
ROBERTA = replace(SMALL, segments=1, next_sentence=False)


def inputs(B: int = 3, L: int = 10, P: int = 4, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids_BL, segments_BL, lengths_B, positions_BP"""
    g = torch.Generator().manual_seed(seed)
    lengths = torch.tensor([L, L - 3, 1])[:B]
    positions = torch.stack([torch.randint(int(n), (P,), generator=g) for n in lengths])
    return torch.randint(61, (B, L), generator=g), torch.randint(2, (B, L), generator=g), lengths, positions


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (BASE, 110_106_428),
        (LARGE, 336_226_108),
        (TINY, 4_433_468),
        (replace(BASE, vocab=50265, segments=1, next_sentence=False), 124_697_433 - 2 * 768),
    ],
)
def test_parameter_counts(cfg: BertConfig, count: int):
    # The last is RoBERTa-base, whose position table on Hugging Face has two rows that are never used.
    with torch.device("meta"):
        assert sum(p.numel() for p in BertPretraining(cfg).parameters()) == count


def test_outputs():
    ids, segments, lengths, positions = inputs()
    model = BertPretraining(SMALL)
    assert model.bert(ids, segments, lengths).shape == (3, 10, 16)
    masked_lm, next_sentence = model(ids, segments, lengths, positions)
    assert masked_lm.shape == (3, 4, 61)
    assert next_sentence is not None
    assert next_sentence.shape == (3, 2)
    assert BertPretraining(ROBERTA)(ids, torch.zeros_like(ids), lengths, positions)[1] is None


def test_every_module_with_parameters_resets_them_after_the_meta_device():
    with torch.device("meta"):
        model = BertPretraining(SMALL)
    assert not list(model.named_buffers())
    assert len(list(model.named_parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, torch.nan)
    for module in model.modules():
        if module._parameters:
            module.reset_parameters()  # type: ignore[operator]
    for name, p in model.named_parameters():
        if p.ndim == 2:
            assert 0.0 < p.abs().max() <= 0.04, name
            assert 0.015 < p.std() < 0.02 or p.numel() < 200, name  # a normal cut at two deviations has 0.88 of 0.02
        else:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("norm.weight") else torch.zeros_like(p)), name


def test_padding_does_not_matter_and_a_row_of_padding_is_finite():
    ids, segments, lengths, _ = inputs()
    bert = BertPretraining(SMALL).bert.eval()
    want = bert(ids, segments, lengths)
    beyond = torch.arange(10) >= lengths[:, None]
    got = bert(torch.where(beyond, 60 - ids, ids), torch.where(beyond, 1 - segments, segments), lengths)
    assert torch.equal(got[~beyond], want[~beyond])
    alone = bert(ids[1:2, :7], segments[1:2, :7], lengths[1:2])  # the row without its padding
    torch.testing.assert_close(alone[0], want[1, :7], rtol=1e-5, atol=1e-6)
    empty = bert(ids, segments, torch.tensor([10, 0, 0]))
    assert empty.isfinite().all()
    empty.sum().backward()
    assert all(p.grad.isfinite().all() for p in bert.parameters() if p.grad is not None)


def test_every_parameter_gets_a_gradient():
    for cfg in (SMALL, ROBERTA):
        model = BertPretraining(cfg)
        ids, segments, lengths, positions = inputs()
        masked_lm, next_sentence = model(ids, segments if cfg.segments == 2 else 0 * segments, lengths, positions)
        loss = masked_lm.logsumexp(-1).sum()
        if next_sentence is not None:
            loss = loss + next_sentence[:, 0].sum()
        loss.backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_dropout_follows_the_seed_and_the_mode():
    model, batch = BertPretraining(SMALL), inputs()

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(*batch)[0]

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


def test_runs_in_bfloat16():
    model, batch = BertPretraining(SMALL).eval(), inputs()
    want = model(*batch)[0]
    got = model.to(torch.bfloat16)(*batch)[0]
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got.float(), want, rtol=0, atol=0.03)


def test_user_errors():
    ids, segments, lengths, _ = inputs(L=10)
    with pytest.raises(UserError, match=r"10 tokens.*8 positions"):
        BertPretraining(replace(SMALL, positions=8)).bert(ids, segments, lengths)
    with pytest.raises(UserError, match=r"width \(10\).*heads \(3\)"):
        BertConfig(width=10, heads=3)


def test_a_causal_model_sees_nothing_to_the_right():
    cfg = replace(TINY, vocab=31, width=16, mlp=32, causal=True, dropout=0.0)
    torch.manual_seed(0)
    model = BertPretraining(cfg).eval()
    ids_BL, other_BL = torch.randint(31, (2, 1, 9))
    positions_BP = torch.arange(9)[None]

    def logits(ids_BL: Tensor, model: BertPretraining = model) -> Tensor:
        return model(ids_BL, torch.zeros_like(ids_BL), torch.tensor([9]), positions_BP)[0][0]

    with torch.no_grad():
        mixed_BL = torch.cat([ids_BL[:, :5], other_BL[:, 5:]], 1)
        assert torch.equal(logits(ids_BL)[:5], logits(mixed_BL)[:5])
        assert not torch.allclose(logits(ids_BL)[5:], logits(mixed_BL)[5:])
        both = BertPretraining(replace(cfg, causal=False)).eval()
        both.load_state_dict(model.state_dict())
        assert not torch.allclose(logits(ids_BL, both)[:5], logits(mixed_BL, both)[:5])
