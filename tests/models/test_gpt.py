import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.models.gpt import Gpt, GptConfig, generate

SMALL = GptConfig(vocab=61, layers=3, width=16, heads=2, positions=12, dropout=0.0)
POST = replace(SMALL, post_norm=True)


def model_of(cfg: GptConfig) -> Gpt:
    """Weights large enough for tokens to matter."""
    torch.manual_seed(1)
    model = Gpt(cfg).eval()
    for p in model.parameters():
        p.data += 0.2 * torch.randn_like(p)
    return model


def ids_of(B: int = 2, L: int = 10) -> Tensor:
    return torch.randint(61, (B, L), generator=torch.Generator().manual_seed(2))


@pytest.mark.parametrize(
    ("cfg", "count"),
    [
        (GptConfig(), 124_439_808),  # what transformers counts for OpenAI's four GPT-2s
        (GptConfig(layers=24, width=1024, heads=16), 354_823_168),
        (GptConfig(layers=36, width=1280, heads=20), 774_030_080),
        (GptConfig(layers=48, width=1600, heads=25), 1_557_611_200),
        (GptConfig(vocab=40478, positions=512, post_norm=True), 116_534_784),  # and for its first GPT
    ],
)
def test_parameter_counts(cfg: GptConfig, count: int):
    with torch.device("meta"):
        assert sum(p.numel() for p in Gpt(cfg).parameters()) == count


@pytest.mark.parametrize("cfg", [SMALL, POST])
def test_every_module_with_parameters_resets_them_after_the_meta_device(cfg: GptConfig):
    wide = replace(cfg, width=64)
    with torch.device("meta"):
        model = Gpt(wide)
    assert len(list(model.named_parameters())) == len(list(model.named_parameters(remove_duplicate=False)))
    model.to_empty(device="cpu")
    for p in model.parameters():
        nn.init.constant_(p, torch.nan)
    for module in model.modules():
        if module._parameters:
            module.reset_parameters()  # type: ignore[operator]
    for name, p in model.named_parameters():
        if p.ndim == 2:
            residual = name.endswith(("out.weight", "down.weight")) and not cfg.post_norm
            assert float(p.detach().std()) == pytest.approx(0.02 / 6**0.5 if residual else 0.02, rel=0.1), name
        else:
            assert torch.equal(p, torch.ones_like(p) if name.endswith("norm.weight") else torch.zeros_like(p)), name


@pytest.mark.parametrize("cfg", [SMALL, POST])
def test_no_token_sees_a_later_one(cfg: GptConfig):
    model, ids = model_of(cfg), ids_of()
    with torch.no_grad():
        want = model(ids)
        for t in range(1, 10):
            other = ids.clone()
            other[:, t:] = 60 - ids[:, t:]
            got = model(other)
            assert torch.equal(got[:, :t], want[:, :t])
            assert not torch.allclose(got[:, t:], want[:, t:])


@pytest.mark.parametrize("cfg", [SMALL, POST])
def test_a_packed_row_is_its_documents_apart(cfg: GptConfig):
    """Losses add up over documents of 4 and 5 tokens; a token of padding behind them is finite and weighs nothing."""
    model, ids, targets = model_of(cfg), ids_of(1), ids_of(1).flip(1)
    targets[:, 9] = -100
    documents = torch.tensor([[0] * 4 + [1] * 5 + [-1]], dtype=torch.int32)
    positions = torch.tensor([[*range(4), *range(5), 0]])
    packed = model.loss(ids, targets, documents, positions)
    apart = model.loss(ids[:, :4], targets[:, :4]) + model.loss(ids[:, 4:9], targets[:, 4:9])
    torch.testing.assert_close(packed, apart)
    assert abs(float((packed - model.loss(ids, targets)).detach())) > 0.01
    packed.backward()
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in model.parameters())


def test_the_loss_is_that_of_the_logits():
    model, ids, targets = model_of(SMALL), ids_of(), ids_of().flip(0)
    targets[0, 3] = -100
    want = F.cross_entropy(model(ids).flatten(0, 1), targets.flatten(), reduction="sum")
    torch.testing.assert_close(model.loss(ids, targets), want)


def test_every_parameter_gets_a_gradient():
    for cfg in (SMALL, POST):
        model = Gpt(cfg)
        model.loss(ids_of(L=12), ids_of(L=12).flip(1)).backward()
        assert [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []


@pytest.mark.parametrize("cfg", [SMALL, POST])
def test_dropout_follows_the_seed_and_the_mode(cfg: GptConfig):
    model = Gpt(replace(cfg, dropout=0.1))

    def logits(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return model(ids_of())

    assert torch.equal(logits(1), logits(1))
    assert not torch.equal(logits(1), logits(2))
    model.eval()
    assert torch.equal(logits(1), logits(2))


def test_generate():
    model = model_of(SMALL)

    def first(n: int, **how) -> list[int]:
        return list(itertools.islice(generate(model, [3, 5], **how), n))

    likeliest = int(model(torch.tensor([[3, 5]]))[0, -1].argmax())
    assert first(5, temperature=0)[0] == likeliest
    assert first(20, top_k=1) == first(20, temperature=0)  # beyond the 12 positions too
    assert first(20, seed=1) == first(20, seed=1) != first(20, seed=2)
    assert first(20, temperature=0, eos=likeliest) == []
    drawn = {next(generate(model, [3, 5], seed=seed, top_k=3)) for seed in range(40)}
    assert drawn == set(model(torch.tensor([[3, 5]]))[0, -1].topk(3).indices.tolist())
    with pytest.raises(UserError, match="prompt of 0 tokens"):
        next(generate(model, []))
    with pytest.raises(UserError, match="temperature -1"):
        next(generate(model, [1], temperature=-1))


def test_tokens_are_drawn_with_the_models_probabilities():
    model, n = model_of(SMALL), 400
    logits = model(torch.tensor([[3, 5]]))[0, -1].detach()
    drawn = torch.tensor([next(generate(model, [3, 5], seed=seed, temperature=2.0)) for seed in range(n)])
    p, share = (logits / 2.0).softmax(-1), drawn.bincount(minlength=61) / n
    assert float((p - share).abs().max()) < 4 * float((p * (1 - p) / n).sqrt().max())


def test_user_errors():
    with pytest.raises(UserError, match=r"13 tokens.*12 positions"):
        Gpt(SMALL)(ids_of(L=13))
    with pytest.raises(UserError, match=r"width \(10\).*heads \(3\)"):
        GptConfig(width=10, heads=3)
