import pytest
import torch
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.optim import Builder, adamw, lamb, lars, sgd, take_turns


class Holder(nn.Module):
    def __init__(self, **values: Tensor):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value.clone()))


def trained(build: Builder, value: Tensor, grads: list[Tensor]) -> Tensor:
    module = Holder(weight=value)
    optimizer, weight = build(module), module.get_parameter("weight")
    for grad in grads:
        weight.grad = grad.clone()
        optimizer.step()
    return weight.detach()


def test_groups():
    net = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    optimizer = adamw(1e-3, decay=0.1)(net)
    decayed, kept = optimizer.param_groups
    assert [id(p) for p in decayed["params"]] == [id(net[0].weight), id(net[2].weight)]
    assert [id(p) for p in kept["params"]] == [id(net[1].bias), id(net[1].weight), id(net[2].bias)]
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert decayed["base_lr"] == kept["base_lr"] == 1e-3


def test_mup_scales_the_rate_of_hidden_weights_and_not_their_decay():
    net = nn.Sequential(nn.Embedding(7, 4), nn.LayerNorm(4), nn.Linear(4, 3))
    groups = adamw(1e-3, decay=0.1, hidden_rate=0.25)(net).param_groups
    assert [[id(p) for p in group["params"]] for group in groups] == [
        [id(net[0].weight)], [id(net[1].bias), id(net[1].weight), id(net[2].bias)], [id(net[2].weight)]
    ]  # fmt: skip
    assert [group["base_lr"] for group in groups] == [1e-3, 1e-3, 0.25e-3]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0, 0.4]


def test_lamb_adapts_what_decays():
    net = nn.Sequential(nn.Linear(4, 3), nn.LayerNorm(3))
    adapted, plain = lamb(1e-3, decay=0.1)(net).param_groups
    assert [p.ndim for p in adapted["params"]] == [2] and [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (adapted["adapt"], plain["adapt"]) == (True, False)
    assert (adapted["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)
    assert adapted["base_lr"] == plain["base_lr"] == 1e-3


def test_order_is_by_name_and_frozen_parameters_are_left_out():
    a, b, c = (torch.full((2, 2), float(i)) for i in range(3))
    module = Holder(z=a, y=b, x=c)
    module.y.requires_grad_(False)
    (group,) = adamw(1e-3)(module).param_groups
    assert [p.mean().item() for p in group["params"]] == [2.0, 0.0]


def test_adamw_is_the_formula():
    lr, b1, b2, eps, decay = 0.1, 0.8, 0.9, 1e-6, 0.5
    w = torch.tensor([[1.0, -2.0]], dtype=torch.float64)
    grads = [torch.tensor([[0.3, -0.1]], dtype=torch.float64), torch.tensor([[-0.2, 0.4]], dtype=torch.float64)]
    got = trained(adamw(lr, (b1, b2), eps, decay), w, grads)
    m = v = torch.zeros_like(w)
    for t, g in enumerate(grads, start=1):
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g * g
        w = w - lr * ((m / (1 - b1**t)) / ((v / (1 - b2**t)).sqrt() + eps) + decay * w)
    torch.testing.assert_close(got, w, rtol=1e-12, atol=0)


def test_sgd_is_the_formula():
    w, grads = (
        torch.tensor([[1.0]], dtype=torch.float64),
        [torch.tensor([[g]], dtype=torch.float64) for g in (0.5, -0.2)],
    )
    got = trained(sgd(0.1, momentum=0.9, decay=0.01), w, grads)
    v = torch.zeros_like(w)
    for g in grads:
        v = 0.9 * v + g + 0.01 * w
        w = w - 0.1 * v
    torch.testing.assert_close(got, w, rtol=1e-12, atol=0)


@pytest.mark.parametrize("nesterov", [False, True])
def test_lars_is_the_formula(nesterov: bool):
    lr, m, decay, trust = 0.5, 0.9, 0.01, 0.1
    w = torch.tensor([[3.0, -4.0], [0.0, 0.5]], dtype=torch.float64)
    grads = [torch.tensor([[g, 0.1], [-0.2, g]], dtype=torch.float64) for g in (0.5, -0.2, 0.0)]
    got = trained(lars(lr, m, decay, trust, nesterov), w, grads)
    v = torch.zeros_like(w)
    for g in grads:
        rate = lr * trust * w.norm() / (g.norm() + decay * w.norm())
        v = m * v + rate * (g + decay * w)
        w = w - (rate * (g + decay * w) + m * v if nesterov else v)
    torch.testing.assert_close(got, w, rtol=1e-12, atol=0)


def test_lars_leaves_biases_and_norms_to_plain_momentum():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    adapted, plain = lars(0.1, decay=0.5)(net).param_groups
    assert [p.ndim for p in adapted["params"]] == [4] and [p.ndim for p in plain["params"]] == [1, 1, 1]
    assert (adapted["weight_decay"], plain["weight_decay"]) == (0.5, 0.0)
    bias, grads = torch.tensor([1.0, -2.0]), [torch.tensor([0.3, 0.1]), torch.tensor([-0.2, 0.4])]
    torch.testing.assert_close(trained(lars(0.1, decay=0.5), bias, grads), trained(sgd(0.1, 0.9), bias, grads))


def test_lars_does_not_divide_by_a_norm_that_is_zero_and_refuses_what_is_no_tensor_of_its_own():
    for value in (torch.zeros(2, 2), torch.ones(2, 2)):
        got = trained(lars(0.1, decay=0.0), value, [torch.zeros(2, 2), torch.full((2, 2), 0.5)])
        assert torch.isfinite(got).all() and not torch.equal(got, value)
    optimizer = lars(0.1)(Holder(weight=torch.ones(2, 2)))
    optimizer.param_groups[0]["params"] = [nn.Parameter(torch.ones(4))]
    optimizer.param_groups[0]["params"][0].grad = torch.ones(4)
    with pytest.raises(UserError, match="zero1 to zero3"):
        optimizer.step()


@pytest.mark.parametrize("build", [adamw(1e-3), sgd(1e-2, momentum=0.9, decay=1e-4, nesterov=True)])
@pytest.mark.parametrize("rows", [2, 9, 33, 257])
def test_a_shard_gives_the_bits_of_the_whole(build: Builder, rows: int):
    torch.manual_seed(rows)
    value, grads = torch.randn(rows, 13), [torch.randn(rows, 13) for _ in range(4)]
    whole = trained(build, value, grads)
    for cut in sorted({1, rows // 2, rows - 1}):
        parts = [trained(build, value[s], [g[s] for g in grads]) for s in (slice(0, cut), slice(cut, rows))]
        assert torch.equal(torch.cat(parts), whole)
        assert not torch.equal(whole, value)


def test_who_takes_turns_moves_as_with_an_optimizer_of_its_own():
    """Momentum and Adam's count of steps too: two optimizers, stepped one at a time, give the same bits."""
    generator = torch.Generator().manual_seed(0)
    ours, theirs = [[nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2)]
    together = take_turns(torch.optim.Adam([{"params": [p], "turn": True} for p in ours], 0.1))
    apart = [torch.optim.Adam([p], 0.1) for p in theirs]
    for turn in (0, 0, 1, 0, 1, 1, 0):
        for group in together.param_groups:
            group["turn"] = group["params"][0] is ours[turn]
        for mine, other in zip(ours, theirs, strict=True):
            mine.grad = torch.randn(3, generator=generator)  # the idle one's is thrown away
            other.grad = mine.grad.clone()
        together.step()
        apart[turn].step()
    assert all(torch.equal(mine, other) for mine, other in zip(ours, theirs, strict=True))
    assert not torch.equal(ours[0], ours[1])
