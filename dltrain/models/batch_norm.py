"""Batch normalisation whose running statistics do not depend on who computed which rows.

Ioffe and Szegedy 2015, https://arxiv.org/abs/1502.03167, algorithm 1. In training every micro-batch is normalised by
itself ("ghost" batches, Hoffer et al. 2017, https://arxiv.org/abs/1705.08741, algorithm 1); its mean and variance wait
in a buffer. Once an optimizer step the trainer adds up those of all lanes in order and blends their mean into the
running statistics: one update a step, the same bits on any number of processes, sharded or not.

Legend: B rows, C channels, K running numbers of all layers; `...` is nothing or the height and width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class BatchNorm(nn.Module):
    """h_BC... -> h_BC..., for 1d and 2d alike. State by the names of torch.nn.BatchNorm2d, so that weights travel.

    `momentum` is the share of a step's statistics in the running ones; `gamma` the initial scale. Statistics and their
    arithmetic are float32 at every precision. A layer takes part once in a micro-batch: of several forwards the last
    counts, a recomputed one is no other, and without a forward there is nothing to count. Rows that weigh nothing in
    the loss (padding, damaged samples) are in the statistics like all others.
    """

    running_mean: Tensor
    running_var: Tensor
    num_batches_tracked: Tensor  # steps
    batch_3C: Tensor  # mean and variance of the micro-batch; 1: it was seen

    def __init__(self, channels: int, eps: float = 1e-5, momentum: float = 0.1, gamma: float = 1.0):
        super().__init__()
        self.eps, self.momentum, self.gamma = eps, momentum, gamma
        self.weight, self.bias = nn.Parameter(torch.empty(channels)), nn.Parameter(torch.empty(channels))
        self.register_buffer("running_mean", torch.empty(channels))
        self.register_buffer("running_var", torch.empty(channels))
        self.register_buffer("num_batches_tracked", torch.empty((), dtype=torch.int64))
        self.register_buffer("batch_3C", torch.empty(3, channels), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.constant_(self.weight, self.gamma)
        nn.init.ones_(self.running_var)
        for zero in (self.bias, self.running_mean, self.num_batches_tracked, self.batch_3C):
            nn.init.zeros_(zero)

    def forward(self, h: Tensor) -> Tensor:
        weight, bias = self.weight.float(), self.bias.float()
        if not self.training:
            return F.batch_norm(h, self.running_mean, self.running_var, weight, bias, eps=self.eps)
        mean_C, var_C, seen_C = self.batch_3C
        seen_C.fill_(1.0)
        return F.batch_norm(h, mean_C, var_C, weight, bias, training=True, momentum=1.0, eps=self.eps)  # 1: overwrite

    def extra_repr(self) -> str:
        return f"{self.weight.numel()}, eps={self.eps}, momentum={self.momentum}"


class Statistics:
    """The batch norms of a module, for its trainer: take() after every micro-batch, update() once a step."""

    def __init__(self, module: nn.Module):
        self.norms = [m for m in module.modules() if isinstance(m, BatchNorm)]
        self.running = [r for norm in self.norms for r in (norm.running_mean, norm.running_var)]
        shares = [torch.full_like(norm.batch_3C[:2].flatten(), norm.momentum) for norm in self.norms]
        self.share_K = torch.cat(shares) if shares else None

    def take(self) -> list[Tensor]:
        """The layers' sums over the micro-batch just done, flat [3 C] one after the other, float64; then cleared."""
        waiting = [norm.batch_3C for norm in self.norms]
        if not waiting:
            return []
        taken = torch.cat([sums_3C.flatten() for sums_3C in waiting]).double()
        torch._foreach_zero_(waiting)
        return [taken]

    @torch.no_grad()
    def update(self, added: Tensor) -> None:
        """Blend the mean of the step's micro-batches into the running statistics; `added`: the sum of all taken."""
        if self.share_K is None:
            return
        layers = [s.view(3, -1) for s in added.split([norm.batch_3C.numel() for norm in self.norms])]
        sums = torch.cat([s[:2].flatten() for s in layers])
        counts = torch.cat([c for s in layers for c in (s[2], s[2])])
        before = torch.cat(self.running).double()
        after = torch.where(counts > 0, before + self.share_K * (sums / counts - before), before).float()
        torch._foreach_copy_(self.running, list(after.split([r.numel() for r in self.running])))
        seen = (torch.stack([s[2, 0] for s in layers]) > 0).long()
        torch._foreach_add_([norm.num_batches_tracked for norm in self.norms], list(seen))
