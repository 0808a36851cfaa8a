"""single, ddp, fsdp and hybrid: how a task is wrapped, and how the lanes' gradients become one step.

The units of sharding, rematerialisation and compilation are the elements of every nn.ModuleList. In bf16 and fp16 all
four use one cast policy, FSDP2's, on a mesh of one process where nothing is sharded, so that they give the same bits.
"""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from dltrain.config import Config
from dltrain.gate import Gate
from dltrain.initial import assign_named, fill, leaves
from dltrain.kernels.adamw import AdamW
from dltrain.kernels.lamb import Lamb
from dltrain.lanes import Tree, TreeAllReduce, TreeReduceScatter, all_gather, blocks, fold_rows, rounds
from dltrain.launch import Launch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def units(module: nn.Module) -> list[nn.Module]:
    """The elements of every nn.ModuleList, inner ones first."""
    lists = [m for m in module.modules() if isinstance(m, nn.ModuleList)]
    return [unit for m in reversed(lists) for unit in m]


def remat(module: nn.Module, mode: str) -> None:
    """Recompute activations in backward, unit by unit: all of them (full), or all but matrix products (selective)."""
    kept = {torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default}

    def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    more = {"context_fn": lambda: create_selective_checkpoint_contexts(policy)} if mode == "selective" else {}
    for unit in units(module) if mode != "none" else []:
        forward = unit.forward
        unit.forward = lambda *a, f=forward, **k: checkpoint(f, *a, use_reentrant=False, **more, **k)  # type: ignore


def on_meta(cfg: Config, build_task: Callable[[], nn.Module]) -> tuple[nn.Module, dict[str, nn.Module]]:
    """A task without memory, its units rematerialised and compiled as asked, and the leaves to fill it from."""
    with torch.device("meta"):
        module = build_task()
    originals = leaves(module)
    remat(module, cfg.remat)
    if cfg.compile:
        for unit in units(module):
            unit.compile()
    return module, originals


class Lanes:
    """One task and its optimizer under single, ddp, fsdp or hybrid.

    `mine` are the lanes that this process computes, in order; one that is >= `lanes` is run for company (every process
    of a sharded model takes part in every exchange) and counts for nothing.
    """

    def __init__(self, cfg: Config, launch: Launch, device: torch.device):
        self.cfg, self.launch, self.device = cfg, launch, device
        world, rank = launch.world, launch.rank
        self.lanes = cfg.lanes or world
        self.sharded = cfg.strategy in ("fsdp", "hybrid")
        self.backend = cfg.lanes == 0 and world > 1  # the backend's own reduction
        self.deal = rounds if self.sharded and world > 1 else blocks
        self.mine = self.deal(self.lanes, world, rank)
        self.tree: Tree[list[Tensor]] = Tree(self.lanes, _add)
        self.scale, self.good_steps = (2.0**16 if cfg.precision == "fp16" else 1.0), 0

    def prepare(
        self,
        build_task: Callable[[], nn.Module],
        build_optimizer: Callable[[nn.Module], Optimizer],
        weights: Callable[[], dict[str, Tensor]] | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        """Build on the meta device, wrap, fill. Returns the module to call and its optimizer."""
        self.module, originals = on_meta(self.cfg, build_task)
        if self.sharded or self.cfg.precision != "fp32":
            self._shard()
        self.module.to_empty(device=self.device)
        fill(self.module, originals, self.cfg.seed)
        assign_named(self.module, weights() if weights else {})
        self.optimizer = build_optimizer(self.module)
        self.gate = Gate(self.module, self.optimizer)
        self.names, self.params = map(list, zip(*self.module.named_parameters(), strict=True))
        self.index = self._row_index()
        task = self.module
        if self.backend and not isinstance(task, FSDPModule):
            ids = [self.device] if self.device.type == "cuda" else None
            task = nn.parallel.DistributedDataParallel(task, device_ids=ids, gradient_as_bucket_view=True)
        elif self.launch.world > 1 and not self.sharded and not self.backend:
            self.all_reduce = TreeAllReduce(self.params, self.lanes)
        self.task = task
        return task, self.optimizer

    def _shard(self) -> None:
        dtype = DTYPES[self.cfg.precision]
        low = None if dtype == torch.float32 else dtype
        policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32, cast_forward_inputs=low is not None)
        self.mesh = mesh = self._mesh()
        several = mesh["shard"].size() > 1 if mesh.ndim > 1 else mesh.size() > 1
        for unit in [*units(self.module), self.module]:
            fully_shard(unit, mesh=mesh, mp_policy=policy, reshard_after_forward=several)
            assert isinstance(unit, FSDPModule)
            unit.set_gradient_divide_factor(1.0)  # sums: the division comes once, after the tree
            unit.set_force_sum_reduction_for_comms(True)
            if several and not self.backend:
                replicas = mesh["replicate"].get_group() if mesh.ndim > 1 else None
                unit.set_custom_reduce_scatter(TreeReduceScatter(self.lanes, self.launch.world, replicas))

    def _mesh(self) -> DeviceMesh:
        world, local, kind = self.launch.world, self.launch.local_world, self.device.type
        if self.cfg.strategy == "hybrid":
            return init_device_mesh(kind, (world // local, local), mesh_dim_names=("replicate", "shard"))
        if self.cfg.strategy == "fsdp":
            return init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
        both = init_device_mesh(kind, (world, 1), mesh_dim_names=("replicate", "shard"))
        return both if self.backend else both["shard"]

    def begin(self, count: int, stop: bool) -> bool:
        """A step begins; `count` are the items of this process's counted lanes. Whether all know by now that one of
        them asks to `stop` before it: they will know it before the update."""
        return False

    def forward_of(self, last: bool) -> None:
        """A micro-batch's forward comes; exchange gradients in its backward if it is the `last` of its lane."""
        if isinstance(self.task, FSDPModule):
            self.task.set_requires_gradient_sync(last)
        elif self.backend:
            self.task.require_backward_grad_sync = last  # type: ignore  # DDP.no_sync, for forward and backward

    def backward(self, loss: Tensor, lane: int, last: bool) -> None:
        """Add a micro-batch's gradients to its lane, and the lane to the tree."""
        (loss * self.scale if self.cfg.precision == "fp16" else loss).backward()
        if not last or self.backend:
            return
        if self.sharded and self.launch.world > 1:
            if lane != self.mine[-1]:  # zeros: the tree inside the reduce-scatter has not yet all lanes
                self.optimizer.zero_grad()
            return
        self.tree.push(
            0, lane, [_local(p.grad) if p.grad is not None else torch.zeros_like(_local(p)) for p in self.params]
        )
        self.optimizer.zero_grad()

    def reduce(self, count: Tensor, clip: float) -> Tensor:
        """Finish the tree; the gradient's norm (float64) after the one division by the global `count`, before the clip.

        Division and clip are one factor, by which the update multiplies.
        """
        self._combine()
        grads = [_local(p.grad) for p in self.params]
        per_item = 1.0 / (count * self.scale)
        if self.backend and not self.sharded and not isinstance(self.task, FSDPModule):
            per_item = per_item * self.launch.world  # DDP averages
        self.norm = self._square_sum(grads).sqrt() * per_item
        self.factor = per_item * torch.clamp(clip / self.norm, max=1.0) if clip > 0 else per_item
        return self.norm

    def step(self, good: Tensor | None = None) -> None:
        """Update, unless `good` (0-d bool on the device) is false: then weights, moments and counts keep their bits.

        A GPU is not waited for; `gate.take_back()` must follow such a step before the next one.
        """
        if good is not None and good.device.type != "cpu":
            self.gate.through(self._update, good)
        elif (good is None or bool(good)) and (self.cfg.precision != "fp16" or self._finite(self.norm)):
            self._update()
        self.optimizer.zero_grad()

    def _update(self, good: Tensor | None = None) -> None:
        if isinstance(self.optimizer, AdamW | Lamb):  # their kernels multiply as they read
            self.optimizer.step(scale=self.factor, good=good)
            return
        grads = [_local(p.grad) for p in self.params]
        torch._foreach_mul_(grads, self.factor.to(grads[0].dtype))
        self.optimizer.step()

    def _combine(self) -> None:
        if self.backend or (self.sharded and self.launch.world > 1):
            for p in self.params:
                if p.grad is None:  # in no lane's loss: zero, as the tree has it
                    p.grad = torch.zeros_like(p)
            return
        if self.launch.world > 1:
            nodes, self.tree.nodes = self.tree.nodes, {}
            sums = self.all_reduce(nodes)
        else:
            sums = self.tree.root()
        for p, total in zip(self.params, sums, strict=True):
            if isinstance(p, DTensor):
                total = DTensor.from_local(total, p.device_mesh, p.placements, run_check=False)
            p.grad = total

    def _square_sum(self, grads: list[Tensor]) -> Tensor:
        """Row sums of squares, gathered, added in one fixed order in float64."""
        rows = [fold_rows(g) for g in grads]
        if self.index is None:
            return torch.cat(rows).sum()
        pad = [nn.functional.pad(r, (0, c - r.numel())) for r, c in zip(rows, self.chunks, strict=True)]
        mine = torch.cat(pad)
        everyone = mine.new_empty(self.shards.size() * mine.numel())
        all_gather(everyone, mine, group=self.shards)
        return everyone[self.index].sum()

    def _row_index(self) -> Tensor | None:
        """Where row j of parameter i lies among the gathered, padded shards; None where nothing is sharded."""
        if not self.sharded or self.launch.world == 1:
            return None
        self.shards = self.mesh.get_group("shard")
        world, sizes = self.shards.size(), [p.shape[0] for p in self.params]
        self.chunks = [-(-size // world) for size in sizes]
        places, start = [], 0
        for size, chunk in zip(sizes, self.chunks, strict=True):
            row = torch.arange(size)
            places.append(row // chunk * sum(self.chunks) + start + row % chunk)
            start += chunk
        return torch.cat(places).to(self.device)

    def _finite(self, norm: Tensor) -> bool:
        """fp16's dynamic loss scale (Micikevicius et al. 2018, section 3.2): halve on overflow, double every 2000."""
        if bool(torch.isfinite(norm)):
            self.good_steps += 1
            if self.good_steps % 2000 == 0:
                self.scale *= 2.0
            return True
        self.scale, self.good_steps = max(self.scale / 2.0, 1.0), 0
        return False

    def tensors(self) -> dict[str, Tensor]:
        """Weights, buffers and optimizer state by name, to save or to load into."""
        found: dict[str, Tensor] = {f"model/{n}": p.detach() for n, p in zip(self.names, self.params, strict=True)}
        kept = self.module.state_dict().keys()
        found |= {f"model/{n}": b for n, b in self.module.named_buffers() if n in kept}
        materialise(self.optimizer)
        for n, p in zip(self.names, self.params, strict=True):
            state = self.optimizer.state[p]
            found |= {f"optim/{n}/{k}": v for k, v in state.items() if isinstance(v, Tensor)}
        return found

    def copies(self) -> ProcessGroup | None:
        """The ranks that have the same shards as this one, or all of them (None)."""
        return self.mesh.get_group("replicate") if self.cfg.strategy == "hybrid" else None

    def templates(self) -> dict[str, Tensor]:
        """What a checkpoint is loaded into: the state itself."""
        return self.tensors()

    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """`templates()` have been filled: forget the whole weights that an evaluation may have left behind."""
        for module in self.module.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def state(self) -> dict[str, float]:
        return {"scale": self.scale, "good_steps": self.good_steps}

    def restore(self, state: dict[str, float]) -> None:
        if self.cfg.precision == "fp16":
            self.scale, self.good_steps = state["scale"], int(state["good_steps"])


def materialise(optimizer: Optimizer) -> None:
    """Make the state that an optimizer creates at its first step, without moving a weight."""
    if optimizer.state:
        return
    rates = [group["lr"] for group in optimizer.param_groups]
    hooks, optimizer._optimizer_step_post_hooks = optimizer._optimizer_step_post_hooks, OrderedDict()
    for group in optimizer.param_groups:
        group["lr"] = 0.0
        for p in group["params"]:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    optimizer._optimizer_step_post_hooks = hooks
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for state in optimizer.state.values():
        for value in state.values():
            if isinstance(value, Tensor):
                value.zero_()


def _local(tensor: Any) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _add(a: list[Tensor], b: list[Tensor]) -> list[Tensor]:
    torch._foreach_add_(a, b)
    return a
