"""A linear probe and nearest neighbours on features whose answer is known."""

import pytest
import torch
import torch.nn.functional as F

from dltrain.probe import linear, nearest, neighbours


def blobs(n: int, seed: int, spread: float = 0.5) -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    return F.one_hot(labels, 4).float() * 3 + spread * torch.randn(n, 4, generator=random), labels


def test_separable_features_are_told_apart_and_noise_is_not():
    train, test = blobs(300, 0), blobs(90, 1)
    assert linear(train, test) == 1.0
    assert nearest(train, test, k=20) == 1.0
    noise = torch.randn(390, 4, generator=torch.Generator().manual_seed(2)).split([300, 90])
    assert linear((noise[0], train[1]), (noise[1], test[1])) < 0.5


def test_linear_puts_the_border_where_symmetry_has_it():
    x, labels = torch.tensor([[-2.0], [-1.0], [0.5], [-0.5], [1.0], [2.0]]), torch.tensor([0, 0, 0, 1, 1, 1])
    assert linear((x, labels), (torch.tensor([[-0.01], [0.01]]), torch.tensor([0, 1])), l2=1e-2) == 1.0
    assert linear((x, labels), (x, labels)) == pytest.approx(4 / 6)


def test_a_heavy_penalty_leaves_the_prior():
    x = torch.randn(100, 5, generator=torch.Generator().manual_seed(0))
    labels = (torch.arange(100) % 10 == 0).long()
    assert linear((x, labels), (x, labels), l2=1e6) == pytest.approx(0.9)


def test_neighbours_are_by_cosine_and_votes_by_distance():
    train = torch.tensor([[1.0, 0.0], [9.0, 1.0], [0.0, 1.0], [-1.0, 0.0]])
    cosine, index = neighbours(train, torch.tensor([[5.0, 0.0]]), 3)
    assert index.tolist() == [[0, 1, 2]]
    assert cosine[0].tolist() == pytest.approx([1.0, 9 / 82**0.5, 0.0], abs=1e-6)
    # One near row outvotes two far ones at a low temperature alone.
    labels, query = torch.tensor([1, 0, 0, 0]), (torch.tensor([[1.0, 0.0]]), torch.tensor([1]))
    far = torch.tensor([[1.0, 0.0], [1.0, 1.0], [1.0, -1.0], [-1.0, 0.0]])
    assert nearest((far, labels), query, k=3, temperature=0.1) == 1.0
    assert nearest((far, labels), query, k=3, temperature=10.0) == 0.0


def test_rows_of_unknown_label_neither_teach_nor_count():
    (h, labels), test = blobs(300, 0), blobs(90, 1)
    spoilt = labels.clone()
    spoilt[::2] = -1
    wrong = test[1].clone()
    wrong[:30] = -1
    for judge in (linear, nearest):
        assert judge((h, spoilt), (test[0], wrong)) == 1.0
