"""Initial weights by (seed, module name), the same bits on any device, strategy and number of processes.

A task is built on the meta device, wrapped, and filled here one leaf at a time on the CPU, so that a process never
holds more than one whole leaf besides its shards. Every module that owns parameters has torch's `reset_parameters()`.
"""

import copy

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from dltrain.seeds import key


def leaves(module: nn.Module) -> dict[str, nn.Module]:
    """Shallow copies of the modules that own parameters or buffers, taken before the module is wrapped.

    Raises:
        TypeError: for one without reset_parameters(), or a parameter that two modules own.
    """
    found: dict[str, nn.Module] = {}
    seen: set[int] = set()
    for name, child in module.named_modules():
        own = [t for t in (*child._parameters.values(), *child._buffers.values()) if t is not None]
        if not own:
            continue
        if not hasattr(child, "reset_parameters"):
            raise TypeError(f"{name or type(child).__name__} owns parameters but has no reset_parameters()")
        if seen & {id(t) for t in own}:
            raise TypeError(f"{name} shares a parameter with another module: use it from the parent's forward instead")
        seen |= {id(t) for t in own}
        leaf = copy.copy(child)
        leaf._parameters, leaf._buffers = dict(child._parameters), dict(child._buffers)
        found[name] = leaf
    return found


@torch.no_grad()
def fill(module: nn.Module, originals: dict[str, nn.Module], seed: int) -> None:
    """Give a materialised (perhaps sharded) module its initial weights; `originals` are its `leaves` from before."""
    for name, leaf in originals.items():
        for kind in (leaf._parameters, leaf._buffers):
            for k, meta in kind.items():
                if meta is not None:
                    full = torch.empty_like(meta, device="cpu")
                    parameter = isinstance(meta, nn.Parameter)
                    kind[k] = nn.Parameter(full, meta.requires_grad) if parameter else full  # type: ignore
        torch.manual_seed(key("init", seed, name))
        leaf.reset_parameters()  # type: ignore[operator]
        target = module.get_submodule(name)
        for kind, filled in ((target._parameters, leaf._parameters), (target._buffers, leaf._buffers)):
            for k, full in filled.items():
                if full is not None:
                    assign(kind[k], full.detach())  # type: ignore[arg-type]


@torch.no_grad()
def assign(target: Tensor, full: Tensor) -> None:
    """Copy a whole tensor, the same on every rank, into a plain one or into this rank's shard of a DTensor."""
    if isinstance(target, DTensor):
        shard = distribute_tensor(full.to(target.device), target.device_mesh, target.placements, src_data_rank=None)
        target.to_local().copy_(shard.to_local())
    else:
        target.copy_(full)


def assign_named(module: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Give a materialised (perhaps sharded) module whole parameters and buffers by name."""
    found = dict(module.named_parameters()) | dict(module.named_buffers())
    for name, full in tensors.items():
        assign(found[name], full)
