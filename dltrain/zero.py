"""zero1, zero2, zero3: DeepSpeed's engine behind the verbs of strategy.Lanes. The only importer of deepspeed.

DeepSpeed reduces gradients in its own way: exact resume on the same number of processes, agreement to rounding
otherwise. It divides by the world size, clips and zeroes by itself, so the loss is scaled before backward by what makes
it a mean.
"""

import logging
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from dltrain.config import Config
from dltrain.errors import UserError
from dltrain.initial import assign_named, fill
from dltrain.lanes import blocks
from dltrain.launch import Launch
from dltrain.strategy import materialise, on_meta


class Zero:
    """One task and its optimizer under DeepSpeed ZeRO. `mine` are the lanes that this process computes, in order."""

    def __init__(self, cfg: Config, launch: Launch, device: torch.device):
        self.cfg, self.launch, self.device = cfg, launch, device
        self.stage = int(cfg.strategy[-1])
        self.lanes = cfg.lanes or launch.world
        self.deal = blocks
        self.mine = blocks(self.lanes, launch.world, launch.rank)

    def prepare(
        self,
        build_task: Callable[[], nn.Module],
        build_optimizer: Callable[[nn.Module], Optimizer],
        weights: Callable[[], dict[str, Tensor]] | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        """Build, fill, hand to DeepSpeed. Returns the engine to call and its optimizer."""
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        os.environ.setdefault("LOCAL_RANK", str(self.launch.local_rank))
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        self.module, originals = on_meta(self.cfg, build_task)
        self.module.to_empty(device=self.device)
        fill(self.module, originals, self.cfg.seed)
        assign_named(self.module, weights() if weights else {})
        rows = self.cfg.batch // self.lanes
        micro = self.cfg.micro_batch or rows
        parts = len(self.mine) * rows // micro
        config = {
            "train_micro_batch_size_per_gpu": micro,
            "gradient_accumulation_steps": parts,
            "train_batch_size": micro * parts * self.launch.world,
            "gradient_clipping": self.cfg.clip,
            "bf16": {"enabled": self.cfg.precision == "bf16"},
            "zero_optimization": {"stage": self.stage, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }
        self.parts = parts
        optimizer = build_optimizer(self.module)
        deepspeed.init_distributed("nccl" if self.device.type == "cuda" else "gloo", verbose=False)
        made: Any = deepspeed.initialize(model=self.module, optimizer=optimizer, config=config)
        self.engine, self.optimizer = made[0], made[1]
        for buffer in self.module.buffers():  # in bf16 the engine has cast them too
            buffer.data = buffer.float() if buffer.is_floating_point() else buffer
        self.names, self.params = map(list, zip(*self.module.named_parameters(), strict=True))
        self._materialise()  # stages 1 and 2 link parameters to moments at the first step of the first group, too early
        return self.engine, self.optimizer

    def begin(self, count: int, stop: bool) -> bool:
        """Learn the divisor before backward: DeepSpeed clips and steps before the sums of the other ranks are known."""
        told = torch.tensor([count, stop], dtype=torch.int64, device=self.device)
        dist.all_reduce(told)
        total, stops = told.tolist()
        self.per_item = self.launch.world * self.parts / max(total, 1)
        return stops > 0

    def forward_of(self, last: bool) -> None:
        """Nothing to announce: the engine counts micro-batches."""

    def backward(self, loss: Tensor, lane: int, last: bool) -> None:
        """Add a micro-batch's gradients; at the last one of the step, DeepSpeed reduces."""
        self.engine.backward(loss * self.per_item)
        self.engine.step()

    def reduce(self, count: Tensor, clip: float) -> Tensor:
        """The engine has reduced, and stepped, with the last micro-batch; returns the gradient's norm."""
        norm = self.engine.get_global_grad_norm()
        return torch.as_tensor(float(norm) if norm is not None else float("nan"), dtype=torch.float64)

    def step(self, good: Tensor | None = None) -> None:
        """Nothing to do: the engine has stepped. UserError for a step that an earlier launch has skipped."""
        if good is not None:
            raise UserError(f"skipped.json has this step, which {self.cfg.strategy} cannot skip: use fsdp")

    def _materialise(self) -> None:
        """Make the moments that the optimizer would create at its first step."""
        inner = self.optimizer.optimizer
        if self.stage < 3:
            materialise(inner)
            return self.optimizer._lazy_init_hp_params_optimizer_state()
        params, flats = [group["params"] for group in inner.param_groups], self.optimizer.fp32_partitioned_groups_flat
        for g, group in enumerate(inner.param_groups):  # stage 3 lends the optimizer its flat partitions for each step
            group["params"] = [f for i, f in enumerate(flats) if self.optimizer.sub_group_to_group_id[i] == g]
        materialise(inner)
        for group, own in zip(inner.param_groups, params, strict=True):
            group["params"] = own

    def tensors(self) -> dict[str, Tensor]:
        """Full tensors by name, each on one rank (by turns), since DeepSpeed gives whole ones."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        found: dict[str, Tensor] = {}
        full: dict[str, Any]
        for i, (name, p) in enumerate(zip(self.names, self.params, strict=True)):
            full = {f"model/{name}": safe_get_full_fp32_param(p)}
            for k in self._moments():
                full[f"optim/{name}/{k}"] = safe_get_full_optimizer_state(p, k)
            full[f"optim/{name}/step"] = torch.tensor(float(self._steps()))
            if i % self.launch.world == self.launch.rank:
                found |= {k: v.detach().cpu().clone() for k, v in full.items()}
        return found | self._buffers()

    def templates(self) -> dict[str, Tensor]:
        """Whole empty tensors on the CPU, to load into."""
        found: dict[str, Tensor] = {}
        for name, p in zip(self.names, self.params, strict=True):
            shape = getattr(p, "ds_shape", p.shape)
            for k in (f"model/{name}", *(f"optim/{name}/{k}" for k in self._moments())):
                found[k] = torch.empty(shape)
            found[f"optim/{name}/step"] = torch.tensor(0.0)
        return found | self._buffers()

    @torch.no_grad()
    def loaded(self, tensors: dict[str, Tensor]) -> None:
        """Push whole tensors into the engine's partitions."""
        for name, p in zip(self.names, self.params, strict=True):
            value = tensors[f"model/{name}"]
            moments = {k: tensors[f"optim/{name}/{k}"] for k in self._moments()}
            (self._set_sharded if self.stage == 3 else self._set_whole)(p, value, moments)
        steps = tensors[f"optim/{self.names[0]}/step"]
        for state in self.optimizer.optimizer.state.values():
            state["step"] = steps.clone()

    def _set_whole(self, p: Any, value: Tensor, moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

        safe_set_full_fp32_param(p, value.to(self.device))
        p.data.copy_(value)  # the setter alone reaches the model only after the next step
        for k, moment in moments.items():
            safe_set_full_optimizer_state(p, moment.to(self.device), k)

    def _set_sharded(self, p: Any, value: Tensor, moments: dict[str, Tensor]) -> None:
        from deepspeed.utils import safe_set_local_fp32_param, safe_set_local_optimizer_state

        safe_set_local_fp32_param(p, self._piece(value))
        p.ds_tensor.data.copy_(self._piece(value).view_as(p.ds_tensor))
        for k, moment in moments.items():
            safe_set_local_optimizer_state(p, self._piece(moment), k)
        if p.data.numel() == value.numel():  # small parameters stay whole on every rank
            p.data.copy_(value)

    def _piece(self, full: Tensor) -> Tensor:
        """This rank's slice of a flattened, padded parameter: stage 3's full setter fails on uneven sizes."""
        size = -(-full.numel() // self.launch.world)
        flat = nn.functional.pad(full.flatten(), (0, size * self.launch.world - full.numel()))
        return flat[self.launch.rank * size :][:size].to(self.device)

    def _buffers(self) -> dict[str, Tensor]:
        """Those that are saved: whole and the same on every rank, loaded in place."""
        kept = self.module.state_dict().keys()
        return {f"model/{n}": b for n, b in self.module.named_buffers() if n in kept}

    def _moments(self) -> list[str]:
        states = self.optimizer.optimizer.state.values()
        return sorted({k for s in states for k, v in s.items() if isinstance(v, Tensor) and k != "step"})

    def _steps(self) -> float:
        return max((float(s["step"]) for s in self.optimizer.optimizer.state.values() if "step" in s), default=0.0)

    def state(self) -> dict[str, float]:
        return {"scale": 1.0, "good_steps": 0}

    def restore(self, state: dict[str, float]) -> None:
        """DeepSpeed's bf16 and fp32 have no scaler."""
