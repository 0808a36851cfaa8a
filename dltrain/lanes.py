"""The fixed tree: which lane is whose, and the sum of all lanes in one order, whatever the number of processes.

A step is n lanes. Their gradients combine in one binary tree over 0 .. n-1: (0 1) (2 3) ..., an odd one out moves up
alone. a + b is commutative in floating point, so the tree's shape alone fixes the bits: who adds, and when, does not.

Legend: n lanes, W processes, r a rank, P elements of a flat gradient padded to a multiple of W.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

T = TypeVar("T")
all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


class Tree(Generic[T]):
    """Sum of n leaves in the fixed tree. Leaves pushed in order leave at most log2(n) + 1 nodes waiting."""

    def __init__(self, n: int, add: Callable[[T, T], T]):
        self.add = add
        self.widths = [n]  # nodes per level
        while self.widths[-1] > 1:
            self.widths.append(-(-self.widths[-1] // 2))
        self.nodes: dict[tuple[int, int], T] = {}

    def push(self, level: int, at: int, value: T) -> None:
        """Add node `at` of `level` (0: a leaf); merge it with its sibling, and so on up, as far as they have come."""
        while level < len(self.widths) - 1:
            if at ^ 1 < self.widths[level]:  # an odd one out has no sibling
                if (level, at ^ 1) not in self.nodes:
                    break
                value = self.add(self.nodes.pop((level, at ^ 1)), value)
            level, at = level + 1, at >> 1
        self.nodes[level, at] = value

    def root(self) -> T:
        """The sum of all leaves, which must all have come. The tree is empty again."""
        return self.nodes.pop((len(self.widths) - 1, 0))


def blocks(n: int, world: int, rank: int) -> list[int]:
    """Lanes dealt in blocks: a process merges its own and exchanges once (ddp)."""
    return list(range(rank * n // world, (rank + 1) * n // world))


def rounds(n: int, world: int, rank: int) -> list[int]:
    """Lanes dealt in rounds: one exchange a round, so only shards wait (fsdp). Those past n are not counted."""
    return [k * world + rank for k in range(-(-n // world))]


def subtrees(n: int, world: int, rank: int) -> list[tuple[int, int]]:
    """The nodes (level, at) that are left when a process has merged its block of lanes, in order."""
    tree: Tree[None] = Tree(n, lambda a, b: None)
    for lane in blocks(n, world, rank):
        tree.push(0, lane, None)
    return sorted(tree.nodes)


class TreeAllReduce:
    """ddp: every process's merged nodes -> the sum over all lanes, on every process.

    Each node is cut into W pieces; all-to-all brings the pieces of one index to one process, which finishes the tree
    for them; an all-gather returns them. That moves the bytes of a ring all-reduce (2 (W - 1) / W of the gradient).
    """

    def __init__(self, params: list[Tensor], n: int, bucket_bytes: int = 1 << 25):
        self.world, self.rank, self.n = dist.get_world_size(), dist.get_rank(), n
        self.nodes = [subtrees(n, self.world, r) for r in range(self.world)]
        self.buckets: list[list[int]] = [[]]  # indices of parameters
        size = 0
        for i, p in enumerate(params):
            if self.buckets[-1] and size + p.nbytes > bucket_bytes:
                self.buckets.append([])
                size = 0
            self.buckets[-1].append(i)
            size += p.nbytes

    def __call__(self, mine: dict[tuple[int, int], list[Tensor]]) -> list[Tensor]:
        """`mine`: this process's nodes, each a list of gradients in the order of the parameters. Returns the sums."""
        order = [mine[node] for node in self.nodes[self.rank]]
        like = order[0]
        flights = [self._send(bucket, order) for bucket in self.buckets]
        arrivals = [self._merge(*flight) for flight in flights]
        sums: list[Tensor] = []
        for bucket, (work, flat_P) in zip(self.buckets, arrivals, strict=True):
            work.wait()
            pieces = flat_P[: sum(like[i].numel() for i in bucket)].split([like[i].numel() for i in bucket])
            sums += [piece.view_as(like[i]) for i, piece in zip(bucket, pieces, strict=True)]
        return sums

    def _send(self, bucket: list[int], order: list[list[Tensor]]) -> tuple:
        W, size = self.world, sum(order[0][i].numel() for i in bucket)
        piece = -(-size // W)
        first = order[0][bucket[0]]
        out_WMp = first.new_zeros(W, len(order), piece) if size % W else first.new_empty(W, len(order), piece)
        for m, grads in enumerate(order):
            flat = torch.cat([grads[i].reshape(-1) for i in bucket])
            for w in range(W):
                part = flat[w * piece : (w + 1) * piece]
                out_WMp[w, m, : part.numel()] = part
        counts = [len(nodes) for nodes in self.nodes]
        got = first.new_empty(sum(counts) * piece)
        splits_in, splits_out = [len(order) * piece] * W, [c * piece for c in counts]
        work = dist.all_to_all_single(got, out_WMp.view(-1), splits_out, splits_in, async_op=True)
        return work, got, out_WMp, piece

    def _merge(self, work, got: Tensor, sent: Tensor, piece: int) -> tuple:
        work.wait()
        tree: Tree[Tensor] = Tree(self.n, Tensor.add_)
        leaves = iter(got.split(piece))
        for nodes in self.nodes:
            for level, at in nodes:
                tree.push(level, at, next(leaves))
        flat_P = got.new_empty(piece * self.world)
        return all_gather(flat_P, tree.root(), async_op=True), flat_P


class TreeReduceScatter(ReduceScatter):
    """fsdp: FSDP2's reduce-scatter as an all-to-all after which the owner of a shard adds the lanes in the tree.

    Called once a round; gives zeros until the last lane has come, then the sum. With `replicas` (hybrid sharding) the
    shard's copies on other nodes send theirs too; the sum is given on the first replica and zeros on the others, since
    FSDP2 adds the replicas up afterwards.
    """

    def __init__(self, n: int, world: int, replicas: dist.ProcessGroup | None = None):
        self.n, self.world, self.replicas = n, world, replicas
        self.tree: Tree[Tensor] = Tree(n, torch.add)
        self.round = 0

    def allocate(self, size, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group, op, async_op: bool = False) -> None:
        got = torch.empty_like(input_tensor)
        dist.all_to_all_single(got, input_tensor, group=group)
        if self.replicas is not None:
            here, got = got, got.new_empty(self.replicas.size() * got.numel())
            all_gather(got, here, group=self.replicas)
        for r, leaf in enumerate(got.view(self.world, -1)):
            if (lane := self.round * self.world + r) < self.n:
                self.tree.push(0, lane, leaf)
        self.round += 1
        output_tensor.zero_()
        if self.round * self.world >= self.n:
            root, self.round = self.tree.root(), 0
            if self.replicas is None or self.replicas.rank() == 0:
                output_tensor.copy_(root)


def fold_rows(grad: Tensor) -> Tensor:
    """Squares of a gradient summed over each row of dimension 0 -> float64, one value a row.

    A row's sum must have the same bits however many rows a process holds. torch's sum does that on a CPU, where each of
    two or more rows is added up by itself, but not on a GPU, whose kernel shares its threads out by the shape: there
    rows are folded by halves, elementwise.
    """
    sq = grad.float().square()
    if sq.ndim < 2:
        return sq.reshape(-1).double()
    sq = sq.flatten(1)
    if sq.device.type == "cpu":
        return (sq if sq.shape[0] != 1 else torch.cat([sq, sq])).sum(1)[: grad.shape[0]].double()
    while (width := sq.shape[1]) > 1:
        half = width // 2
        sq[:, :half] += sq[:, width - half :]
        sq = sq[:, : width - half]
    return sq[:, 0].double()
