"""LAMB. You et al. 2020, https://arxiv.org/abs/1904.00962, algorithm 2, with phi the identity.

    g = scale grad;  m += (1 - b1) (g - m);  v = b2 v + (1 - b2) g^2
    u = m / (1 - b1^t) / (sqrt(v) / sqrt(1 - b2^t) + eps) + decay w
    w -= lr |w| / |u| u     for each tensor; the ratio is 1 where a norm is 0, and in groups whose `adapt` is false

The squares of a norm are summed over each row of dimension 0, and the rows in float64 in one order: a tensor that is
sharded along its rows has the bits of the whole one. Of a tensor with less than two dimensions each element is a row,
which is slow, and one more reason not to adapt biases and norms.
"""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from dltrain.errors import UserError
from dltrain.kernels import multi_tensor
from dltrain.kernels.adamw import local
from dltrain.kernels.dispatch import use_kernel
from dltrain.kernels.registration import register

_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # renamed in torch 2.13


class Lamb(torch.optim.Optimizer):
    """The kernel where it can run, elsewhere plain torch. The state has AdamW's names: `step`, `exp_avg`, `exp_avg_sq`.

    Parameters may be DTensors that are sharded along dimension 0. Raises UserError for others, and for parameters
    that it was not made with, such as DeepSpeed's flat partitions, which have no norm of a tensor.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 1e-2,
        adapt: bool = True,
    ):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "adapt": adapt})
        self.known = {id(p) for group in self.param_groups for p in group["params"]}

    @torch.no_grad()
    def step(
        self,
        closure: Callable[[], float] | None = None,
        *,
        scale: Tensor | None = None,
        good: Tensor | None = None,
    ) -> float | None:
        """One step with `scale` (a scalar tensor; None: 1) times the gradients; `good` as of `AdamW.step`."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            buckets: dict[Any, list[Any]] = {}
            for p in group["params"]:
                if id(p) not in self.known:
                    raise UserError("LAMB needs whole tensors for its norms: take another strategy than zero1 to zero3")
                if p.grad is None:
                    continue
                state = self.state[p]
                if not state:
                    state["step"] = torch.tensor(0.0)
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                state["step"] += 1
                if p.numel():
                    key = p.device, p.dtype, p.grad.dtype, _mesh(p), _width(p) % 16 == 0
                    buckets.setdefault(key, []).append(p)
            for members in buckets.values():
                self._step(group, members, scale, good)
        return loss

    def _step(self, group: dict[str, Any], params: list[Any], scale: Tensor | None, good: Tensor | None) -> None:
        states, parts = [self.state[p] for p in params], [local(p) for p in params]
        beta1, beta2 = group["betas"]
        hyper = float(group["lr"]), beta1, beta2, group["eps"], group["weight_decay"]
        steps = [int(s["step"]) for s in states]
        m, v = ([local(s[name]) for s in states] for name in ("exp_avg", "exp_avg_sq"))
        grads = [multi_tensor.like(local(p.grad), part) for p, part in zip(params, parts)]
        widths = [_width(p) for p in params] if group["adapt"] else []
        lacking = "weights with gaps in memory" if not all(map(multi_tensor.dense, parts)) else ""
        if use_kernel("lamb", lacking, parts[0]):
            if widths and widths[0] % 16 == 0:  # one layout, so one order of summation, wherever gradients lie
                grads = [g if multi_tensor.aligned(g) else g.clone() for g in grads]
            good = None if good is None else good.long()
            squares = moments(parts, grads, m, v, steps, scale, *hyper, widths, good)
            if widths:
                whole = gather(squares, params)
                apply(parts, m, v, whole, [_rows(p) for p in params], steps, *hyper, widths, good)
            return
        if good is not None and not bool(good):
            return
        u = [direction(w, g, a, b, t, scale, *hyper[1:]) for w, g, a, b, t in zip(parts, grads, m, v, steps)]
        ratios: Sequence[Tensor | float] = [1.0] * len(params)
        if widths:
            sums = torch.cat([torch.stack((row_squares(w), row_squares(d)), 1) for w, d in zip(parts, u)])
            whole = gather(sums, params).split([_rows(p) for p in params])
            ratios = [trust_ratio(*squares.sum(0)) for squares in whole]
        for w, d, ratio in zip(parts, u, ratios):
            w.sub_(d * (hyper[0] * ratio))


# ---- the reference ----


def direction(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: int,
    scale: Tensor | None,
    beta1: float,
    beta2: float,
    eps: float,
    decay: float,
) -> Tensor:
    """Step the moments in place; returns u."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    g = grad.to(wide) if scale is None else grad.to(wide) * scale.to(wide)
    exp_avg.copy_(exp_avg.to(wide).lerp_(g, 1.0 - beta1))
    exp_avg_sq.copy_(exp_avg_sq.to(wide).mul_(beta2).addcmul_(g, g, value=1.0 - beta2))
    root = (exp_avg_sq.to(wide).sqrt() / (1.0 - beta2**step) ** 0.5).add_(eps)
    return (exp_avg.to(wide) / (1.0 - beta1**step)).div_(root).add_(weight, alpha=decay)


def row_squares(tensor: Tensor) -> Tensor:
    """Squares summed over each row of dimension 0, float64 [rows]; a row's bits do not depend on how many there are.

    On a CPU torch adds up each of two or more rows by itself, so that one alone gets company; on a GPU its kernel deals
    threads out by the shape, so there rows are folded by halves.
    """
    squares = tensor.square() if tensor.dtype == torch.float64 else tensor.float().square()
    if squares.ndim < 2:
        return squares.reshape(-1).double()
    squares = squares.flatten(1)
    if not squares.is_cuda:
        return (squares if len(squares) != 1 else squares.expand(2, -1).contiguous()).sum(1)[: len(squares)].double()
    while (width := squares.shape[1]) > 1:
        half = width // 2
        squares[:, :half] += squares[:, width - half :]
        squares = squares[:, : width - half]
    return squares[:, 0].double()


def trust_ratio(weights: Tensor, directions: Tensor) -> Tensor:
    """The quotient of two norms from their squares; 1 where either is 0."""
    return torch.where((weights > 0) & (directions > 0), weights.sqrt() / directions.sqrt(), 1.0)


# ---- rows of sharded tensors ----


def _rows(p: Tensor) -> int:
    """Rows of the whole tensor."""
    return p.shape[0] if p.ndim else 1


def _width(p: Tensor) -> int:
    """Elements of a row."""
    return p.numel() // p.shape[0] if p.ndim > 1 and p.numel() else 1


def _mesh(p: Tensor) -> Any:
    """Of a DTensor, its mesh, which is sharded along the last dimension; None of any other."""
    if not isinstance(p, DTensor):
        return None
    *others, last = p.placements
    if last != Shard(0) or any(other != Replicate() for other in others):
        raise UserError(f"LAMB needs parameters sharded along dimension 0, not {p.placements}")
    return p.device_mesh


def gather(squares: Tensor, params: Sequence[Tensor]) -> Tensor:
    """[rows of this process, k] of tensors one after the other -> [rows of all, k], of the whole tensors."""
    mesh = _mesh(params[0])
    if mesh is None or mesh.size(mesh.ndim - 1) == 1:
        return squares
    group, world = mesh.get_group(mesh.ndim - 1), mesh.size(mesh.ndim - 1)
    rows = [_rows(p) for p in params]
    chunks = [-(-count // world) for count in rows]  # rows of a shard, the last ones shorter or empty
    mine = [local(p).shape[0] if p.ndim else 1 for p in params]
    padded = [
        torch.nn.functional.pad(part, (0, 0, 0, chunk - count))
        for part, chunk, count in zip(squares.split(mine), chunks, mine)
    ]
    sent = torch.cat(padded)
    everyone = sent.new_empty(world * len(sent), sent.shape[1])
    _all_gather(everyone, sent, group=group)
    return everyone[_places(tuple(rows), world, everyone.device)]


@functools.lru_cache(maxsize=64)
def _places(rows: tuple[int, ...], world: int, device: torch.device) -> Tensor:
    """Where the rows of the whole tensors lie among the gathered, padded shards of `world` processes."""
    chunks = [-(-count // world) for count in rows]
    places, start = [], 0
    for count, chunk in zip(rows, chunks):
        row = torch.arange(count)
        places.append(row // chunk * sum(chunks) + start + row % chunk)
        start += chunk
    return torch.cat(places).to(device)


# ---- the ops ----


def _run_moments(*inputs: Any) -> Tensor:
    from dltrain.kernels import lamb_triton

    return lamb_triton.moments(*inputs)


def _fake_moments(params: list[Tensor], *rest: Any) -> Tensor:
    widths = rest[-1]
    rows = sum(p.numel() // width for p, width in zip(params, widths)) if widths else 0
    return params[0].new_empty(rows, 2, dtype=torch.float64)


def _run_apply(*inputs: Any) -> None:
    from dltrain.kernels import lamb_triton

    lamb_triton.apply(*inputs)


_HYPER = "float lr, float beta1, float beta2, float eps, float decay, SymInt[] widths"
moments = register(
    "lamb_moments(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, int[] steps,"
    f" Tensor? scale, {_HYPER}, Tensor? good=None) -> Tensor",
    _run_moments,
    _fake_moments,
)
apply = register(
    "lamb_apply(Tensor(a!)[] params, Tensor[] exp_avgs, Tensor[] exp_avg_sqs, Tensor squares, SymInt[] rows,"
    f" int[] steps, {_HYPER}, Tensor? good=None) -> ()",
    _run_apply,
    lambda *_: None,
)
