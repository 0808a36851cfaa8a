"""NT-Xent beside the paper's equation, one pair after the other."""

import math

import pytest
import torch

from dltrain.models.simclr import ProjectionHead, nt_xent

B, Z, TEMPERATURE = 5, 7, 0.3


def z_B2Z() -> torch.Tensor:
    return torch.randn(B, 2, Z, generator=torch.Generator().manual_seed(0))


def pair_loss(views: list[torch.Tensor], i: int, j: int) -> float:
    """Equation 1."""
    similar = [float(torch.cosine_similarity(views[i], v, dim=0)) / TEMPERATURE for v in views]
    return -similar[j] + math.log(sum(math.exp(s) for k, s in enumerate(similar) if k != i))


def test_equation_1():
    z = z_B2Z()
    found = nt_xent(z, torch.ones(B), TEMPERATURE)
    views = [*z[:, 0], *z[:, 1]]
    for row in range(B):
        expected = (pair_loss(views, row, row + B) + pair_loss(views, row + B, row)) / 2
        assert float(found["loss"][row]) == pytest.approx(expected, rel=1e-5)


def test_rows_of_weight_0_are_as_if_they_were_not_there():
    z = z_B2Z().requires_grad_()
    weights = torch.tensor([1.0, 0, 1, 1, 0])
    found = nt_xent(z, weights, TEMPERATURE)
    (slope,) = torch.autograd.grad(found["loss"].sum(), z)
    few = z[weights > 0].detach().requires_grad_()
    alone = nt_xent(few, torch.ones(3), TEMPERATURE)
    (few_slope,) = torch.autograd.grad(alone["loss"].sum(), few)
    for name in ("loss", "top1"):
        torch.testing.assert_close(found[name][weights > 0], alone[name])
        assert not found[name][weights == 0].any()
    torch.testing.assert_close(slope[weights > 0], few_slope)
    assert not slope[weights == 0].any()


def test_a_step_of_padding_alone_has_no_loss_and_no_gradient():
    z = torch.zeros(B, 2, Z, requires_grad=True)
    found = nt_xent(z, torch.zeros(B), TEMPERATURE)
    (slope,) = torch.autograd.grad(found["loss"].sum(), z)
    assert not found["loss"].any() and not slope.any()


def test_who_is_found():
    z = torch.eye(B)[:, None].expand(B, 2, B)
    found = nt_xent(z, torch.ones(B), TEMPERATURE)
    assert found["top1"].tolist() == [1.0] * B
    expected = math.log(1 + (2 * B - 2) * math.exp(-1 / TEMPERATURE))
    torch.testing.assert_close(found["loss"], torch.full((B,), expected))


def test_the_head_has_one_hidden_layer_of_the_features_width():
    with torch.device("meta"):
        head = ProjectionHead(512, 128)
    assert {name: tuple(p.shape) for name, p in head.named_parameters()} == {
        "hidden.weight": (512, 512), "hidden.bias": (512,), "out.weight": (128, 512),
    }  # fmt: skip
