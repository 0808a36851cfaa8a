"""The fixed tree: one result in whatever order lanes come, and every lane computed once."""

import functools
import itertools
import random
from typing import Any

import pytest
import torch

from dltrain.lanes import Tree, blocks, fold_rows, rounds, subtrees

SIZES = [1, 2, 3, 4, 5, 6, 7, 8, 12, 13, 16, 31]


def expression(n: int, order: list[int], how) -> str:
    """The sum as text: its brackets are the tree's shape. Siblings are written in their own order."""

    def add(a, b):
        return tuple(sorted([a, b], key=str))

    tree = Tree(n, add)
    for lane in order:
        how(tree, lane)
    assert len(tree.nodes) == 1
    root = tree.root()
    assert tree.nodes == {}
    return str(root)


@pytest.mark.parametrize("n", SIZES)
def test_any_order_of_arrival_gives_one_tree(n):
    orders = [list(range(n)), list(range(n))[::-1], *(random.Random(i).sample(range(n), n) for i in range(20))]
    assert len({expression(n, order, lambda tree, lane: tree.push(0, lane, lane)) for order in orders}) == 1


def test_the_shape_is_that_of_the_document():
    tree = Tree(5, lambda a, b: f"({a} {b})")
    for lane in range(5):
        tree.push(0, lane, str(lane))
    assert tree.root() == "(((0 1) (2 3)) 4)"


def test_the_same_bits_in_any_order_but_not_of_any_shape():
    leaves = torch.randn(7, 1000, generator=torch.Generator().manual_seed(0)).unbind()
    sums = []
    for seed in range(10):
        tree = Tree(7, torch.add)
        for lane in random.Random(seed).sample(range(7), 7):
            tree.push(0, lane, leaves[lane])
        sums.append(tree.root())
    assert all(torch.equal(s, sums[0]) for s in sums)
    in_a_row = functools.reduce(torch.add, leaves)
    torch.testing.assert_close(sums[0], in_a_row, rtol=1e-5, atol=1e-5)
    assert not torch.equal(sums[0], in_a_row)  # one after the other has other bits: the tree is what fixes them


@pytest.mark.parametrize("n", SIZES)
def test_leaves_in_order_leave_few_nodes_waiting(n):
    tree = Tree(n, lambda a, b: a + b)
    for lane in range(n):
        tree.push(0, lane, 1)
        assert len(tree.nodes) <= n.bit_length()
    assert tree.root() == n


def test_the_sum_is_not_there_before_all_have_come():
    tree = Tree(3, lambda a, b: a + b)
    tree.push(0, 0, 1)
    tree.push(0, 2, 1)
    with pytest.raises(KeyError):
        tree.root()


@pytest.mark.parametrize(("n", "world"), [(n, w) for n in SIZES for w in (1, 2, 3, 4, 5, 8) if w <= n])
def test_every_lane_is_dealt_once(n, world):
    dealt = [blocks(n, world, rank) for rank in range(world)]
    assert list(itertools.chain(*dealt)) == list(range(n))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    in_rounds = [rounds(n, world, rank) for rank in range(world)]
    assert sorted(lane for lanes in in_rounds for lane in lanes if lane < n) == list(range(n))
    assert len(set(map(len, in_rounds))) == 1  # as many exchanges on every process


@pytest.mark.parametrize(("n", "world"), [(n, w) for n in SIZES for w in (1, 2, 3, 4, 5, 8) if w <= n])
def test_merged_blocks_finish_in_the_same_tree(n, world):
    """What ddp does: each process merges its lanes, and the nodes that are left are the leaves of the rest."""
    alone = expression(n, list(range(n)), lambda tree, lane: tree.push(0, lane, lane))
    left = []
    for rank in range(world):
        tree: Tree[Any] = Tree(n, lambda a, b: tuple(sorted([a, b], key=str)))
        for lane in blocks(n, world, rank):
            tree.push(0, lane, lane)
        assert sorted(tree.nodes) == subtrees(n, world, rank)
        left += tree.nodes.items()
    random.Random(n * world).shuffle(left)
    whole = Tree(n, lambda a, b: tuple(sorted([a, b], key=str)))
    for (level, at), value in left:
        whole.push(level, at, value)
    assert str(whole.root()) == alone


@pytest.mark.parametrize("shape", [(7,), (9, 1), (9, 2), (11, 37), (5, 3, 8), (4, 2, 3, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fold_rows_is_the_sum_of_squares(shape, dtype):
    grad = torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)
    before = grad.clone()
    rows = fold_rows(grad)
    assert rows.dtype == torch.float64
    torch.testing.assert_close(rows, grad.double().square().flatten(1).sum(1) if grad.ndim > 1 else grad.double() ** 2,
                               rtol=1e-6, atol=0)  # fmt: skip
    assert torch.equal(grad, before)


@pytest.mark.parametrize("width", [1, 2, 3, 64, 101, 1000])
def test_fold_rows_has_the_same_bits_for_any_slice(width):
    grad = torch.randn(23, width, generator=torch.Generator().manual_seed(2))
    whole = fold_rows(grad)
    for first, last in [(0, 1), (0, 12), (12, 23), (5, 6), (3, 20), (22, 23)]:
        assert torch.equal(fold_rows(grad[first:last]), whole[first:last])
    assert fold_rows(grad[:0]).numel() == 0
