"""Copies of the weights that should have the same bits on several ranks, compared on request.

A bit that memory or a device has turned on one rank is no error to any library: the copies go apart in silence. Every
tensor is summed up as integers, which is exact whatever the order, and changes with any one bit; the sums are compared.
"""

from collections import Counter

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor

from dltrain.errors import UserError
from dltrain.lanes import all_gather
from dltrain.world import World

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes an element


def sums(tensors: dict[str, Tensor]) -> Tensor:
    """Each tensor's (or shard's) bits as integers, summed -> int64, one a tensor, on the tensors' device."""
    found = []
    for tensor in tensors.values():
        local = (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach().contiguous()
        found.append(local.view(_INTEGERS[local.element_size()]).sum(dtype=torch.int64))
    device = next((s.device for s in found if s.device.type != "cpu"), torch.device("cpu"))
    return torch.stack([s.to(device) for s in found])


def compare(tensors: dict[str, Tensor], copies: dist.ProcessGroup | None) -> str:
    """Compare this rank's tensors with those of the other ranks of `copies` (None: all), which all call this.

    Returns a sentence that names the ranks that differ from most, and the first tensor; empty if all are the same.
    """
    mine = sums(tensors)
    ranks = dist.get_process_group_ranks(copies)
    everyone = mine.new_empty(len(ranks) * mine.numel())
    all_gather(everyone, mine, group=copies)
    rows = [tuple(row) for row in everyone.view(len(ranks), -1).tolist()]
    (most, n), *others = Counter(rows).most_common()
    if not others:
        return ""
    if n == others[0][1]:
        who, odd = f"the copies on ranks {', '.join(map(str, ranks))} differ", rows
    else:
        strays = [rank for rank, row in zip(ranks, rows, strict=True) if row != most]
        several = len(strays) > 1
        who = f"the cop{'ies' if several else 'y'} on rank{'s' if several else ''} {', '.join(map(str, strays))} differ"
        who, odd = f"{who}{'' if several else 's'} from the other {n}", [row for row in rows if row != most]
    names = [name for i, name in enumerate(tensors) if any(row[i] != most[i] for row in odd)]
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{who} in {names[0]}{more}"


def check(world: World, tensors: dict[str, Tensor], copies: dist.ProcessGroup | None, step: int) -> None:
    """All ranks call this after `step`. Raises UserError on all of them where copies differ."""
    if found := [said for said in world.gather(compare(tensors, copies)) if said]:
        raise world.alike(
            UserError(
                f"after step {step}, {'; '.join(sorted(set(found)))}: memory or a device there has changed bits, "
                "or the code depends on the rank; earlier checkpoints may have it too"
            )
        )
