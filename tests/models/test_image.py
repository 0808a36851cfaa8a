"""Sizes as the papers print them, and what each network does that a network by the same name might not."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dltrain.errors import UserError
from dltrain.initial import fill, leaves
from dltrain.models.alexnet import across_channels
from dltrain.models.batch_norm import BatchNorm
from dltrain.models.highway import Highway
from dltrain.models.image import image_model
from dltrain.models.lenet import TableConv
from dltrain.models.resnet import Block

SIZES = [
    ("lenet", 10, 28, 60_850),  # LeCun et al.'s 60,000 and a linear layer of 850
    ("alexnet", 1000, 224, 60_965_224),
    ("alexnet-owt", 1000, 224, 61_100_840),
    ("fig1", 10, 32, 89_578),
    ("vgg11", 1000, 224, 132_863_336),
    ("vgg13", 1000, 224, 133_047_848),
    ("vgg16", 1000, 224, 138_357_544),
    ("vgg19", 1000, 224, 143_667_240),
    ("googlenet", 1000, 224, 13_378_280),
    ("googlenet-bn", 1000, 224, 13_004_888),
    ("inception-bn", 1000, 224, 11_194_984),
    ("highway-19", 10, 32, 2_032_138),
    ("highway-32", 10, 32, 3_600_714),
    ("resnet-18", 1000, 224, 11_689_512),
    ("resnet-34", 1000, 224, 21_797_672),
    ("resnet-50", 1000, 224, 25_557_032),
    ("resnet-101", 1000, 224, 44_549_160),
    ("resnet-152", 1000, 224, 60_192_808),
    ("resnet-18", 10, 32, 11_173_962),
    ("resnet-20", 10, 32, 269_722),  # table 6: 0.27 million
    ("resnet-32", 10, 32, 464_154),
    ("resnet-44", 10, 32, 658_586),
    ("resnet-56", 10, 32, 853_018),
    ("resnet-110", 10, 32, 1_727_962),
    ("resnet-1202", 10, 32, 19_421_274),
    ("plain-18", 1000, 224, 11_515_688),
    ("plain-34", 1000, 224, 21_623_848),
    ("plain-20", 10, 32, 269_722),
    ("plain-56", 10, 32, 853_018),
]
SMALL = {  # of each kind one that trains here in a moment: side, options
    "lenet": (28, {}), "alexnet": (63, {}), "alexnet-owt": (63, {}), "fig1": (16, {"width": 4}), "vgg11": (32, {}),
    "googlenet": (79, {}), "googlenet-bn": (79, {}), "inception-bn": (64, {}), "highway-7": (16, {"width": 4}),
    "resnet-18": (64, {"width": 4}), "resnet-50": (65, {"width": 4}), "resnet-14": (16, {"width": 4}),
    "plain-18": (65, {"width": 4}), "plain-14": (16, {"width": 4}),
}  # fmt: skip


def built(name: str, classes: int, side: int, **options) -> nn.Module:
    """With initial weights by (seed, name), as a run makes them."""
    with torch.device("meta"):
        model = image_model(name, classes, side, **options)
    originals = leaves(model)
    model.to_empty(device="cpu")
    fill(model, originals, seed=1)
    return model


def images(side: int, n: int = 3) -> Tensor:
    return torch.randn(n, 3, side, side, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "classes", "side", "parameters"), SIZES)
def test_parameters_are_as_many_as_published(name, classes, side, parameters):
    with torch.device("meta"):
        model = image_model(name, classes, side).eval()
        assert model(torch.empty(2, 3, side, side)).shape == (2, classes)
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize("name", SMALL)
def test_every_parameter_learns_in_either_memory_format(name):
    """A loss of about chance at first, a gradient for every parameter, and the same loss with channels last."""
    side, options = SMALL[name]
    model = built(name, 5, side, **options)
    labels_B = torch.arange(3)
    torch.manual_seed(0)
    outputs = model(images(side))
    heads = outputs if isinstance(outputs, tuple) else (outputs,)
    assert len(heads) == (3 if name.startswith("googlenet") else 1)
    losses = [F.cross_entropy(logits_BK, labels_B) for logits_BK in heads]
    torch.stack(losses).sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert 0.5 < float(losses[0].detach()) < 6.5  # ln 5 = 1.6
    torch.manual_seed(0)
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    other = model(images(side).to(memory_format=torch.channels_last))
    other = other[0] if isinstance(other, tuple) else other
    torch.testing.assert_close(other, heads[0], rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["alexnet", "vgg11", "googlenet", "fig1"])
def test_dropout_is_off_in_evaluation_and_on_in_training(name):
    side, options = SMALL[name]
    model = built(name, 5, side, **options, dropout=0.5)
    first, again = (model(images(side))[0] for _ in range(2))
    assert not torch.equal(first, again)
    model.eval()
    assert torch.equal(model(images(side)), model(images(side)))


def test_normalisation_across_channels_is_the_papers_sum():
    """Section 3.3: b_i = a_i / (k + alpha sum of a_j^2 over j from i - 2 to i + 2)^beta."""
    h = torch.rand(2, 7, 3, 3) * 30
    want = torch.empty_like(h)
    for i in range(7):
        want[:, i] = h[:, i] / (2 + 1e-4 * h[:, max(i - 2, 0) : i + 3].square().sum(1)) ** 0.75
    torch.testing.assert_close(across_channels(h), want)
    torch.testing.assert_close(across_channels(h), F.local_response_norm(h, 5, 5e-4, 0.75, 2.0))  # torch's is a mean


def test_alexnets_columns_meet_where_figure_2_says():
    model = built("alexnet", 10, 63)
    assert [conv.groups for conv in model.convs] == [1, 2, 1, 2, 2]  # type: ignore[union-attr]
    ones = [bool((conv.bias == 1).all()) for conv in model.convs]  # type: ignore[union-attr]
    assert ones == [False, True, False, True, True]


def test_lenets_third_layer_is_a_convolution_with_most_kernels_zero():
    layer = TableConv()
    h = torch.randn(2, 6, 9, 9)
    for i, maps in {0: (0, 1, 2), 5: (5, 0, 1), 8: (2, 3, 4, 5), 12: (0, 1, 3, 4), 15: range(6)}.items():
        seen = torch.zeros(6, dtype=torch.bool)
        for j in range(6):
            changed = h.clone()
            changed[:, j] += 1
            seen[j] = not torch.allclose(layer(changed)[:, i], layer(h)[:, i])
        assert seen.nonzero().flatten().tolist() == sorted(maps)
    assert layer.weight.shape == (60, 5, 5)


def test_a_highway_with_a_closed_gate_carries():
    h = torch.randn(2, 4, 5, 5)
    torch.testing.assert_close(Highway(4, -50.0)(h), h)
    assert not torch.allclose(Highway(4, 50.0)(h), h)
    model = built("highway-7", 5, 16, width=4)
    gates = [layer.gate.bias for layer in model.layers if isinstance(layer, Highway)]  # type: ignore[union-attr]
    assert len(gates) == 3 and all(bool((gate == -2).all()) for gate in gates if gate is not None)


@pytest.mark.parametrize("bottleneck", [False, True])
def test_a_residual_block_with_a_scale_of_zero_is_its_shortcut(bottleneck):
    width = 2 if bottleneck else 8
    h = torch.rand(3, 8, 6, 6)
    block = Block(8, width, 1, bottleneck, "projection", gamma=0.0)
    assert block.project is None and torch.equal(block(h), h)
    wider = Block(8, 2 * width, 2, bottleneck, "zeros", gamma=0.0)
    want = torch.cat([h[:, :, ::2, ::2], torch.zeros(3, 8, 3, 3)], 1)  # option A
    assert torch.equal(wider(h), want)
    assert not Block(8, width, 1, bottleneck, "none", gamma=0.0)(h).any()


def test_zero_gamma_is_the_last_norm_of_every_block_alone():
    model = built("resnet-50", 5, 65, width=4, zero_gamma=True)
    zero = [name for name, m in model.named_modules() if isinstance(m, BatchNorm) and not m.weight.any()]
    assert zero == [f"blocks.{i}.norms.2" for i in range(16)]


def test_weights_begin_as_he_et_al_have_them():
    weight = built("resnet-20", 10, 32).get_parameter("blocks.8.convs.1.weight")
    assert float(weight.detach().std()) == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.02)


def test_large_images_meet_the_stem_of_imagenet():
    with torch.device("meta"):
        models = {side: image_model("resnet-18", 10, side) for side in (32, 64, 128)}
    shapes = {side: model.get_parameter("conv.weight").shape[-1] for side, model in models.items()}
    assert shapes == {32: 3, 64: 3, 128: 7}


@pytest.mark.parametrize(
    ("name", "side", "options", "message"),
    [
        ("resnet", 32, {}, "there is no image model 'resnet'"),
        ("resnet-19", 32, {}, "19 is none of 18, 34"),
        ("vgg15", 32, {}, "there is no image model"),
        ("vgg11", 31, {}, "32 pixels or more"),
        ("googlenet", 78, {}, "79 pixels or more"),
        ("alexnet", 62, {}, "63 pixels or more"),
        ("lenet", 33, {}, "at most 32"),
        ("highway-3", 32, {}, "at least 4 layers"),
        ("resnet-20", 32, {"dropout": 0.5}, "resnet-20 has no dropout"),
    ],
)
def test_what_there_is_not_is_said(name, side, options, message):
    with pytest.raises(UserError, match=message):
        image_model(name, 10, side, **options)
