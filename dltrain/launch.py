"""Who started this process, with whom, and what for: python, torchrun, accelerate launch or srun, from the environment.

Reads torchrun's variables (RANK, WORLD_SIZE, LOCAL_RANK, ..., https://docs.pytorch.org/docs/stable/elastic/run.html),
Slurm's (slurm.py) and the contract of accelerate 1.x (accelerate/utils/launch.py). What accelerate's configuration asks
for is honoured or refused by name.
"""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass

from dltrain import slurm
from dltrain.config import C
from dltrain.errors import UserError


@dataclass(frozen=True)
class Launch:
    """This process among the others. `by` is python, torchrun, accelerate or slurm."""

    by: str = "python"
    rank: int = 0
    world: int = 1
    local_rank: int = 0
    local_world: int = 1
    master: str = ""  # host:port; empty for one process


def detect(env: Mapping[str, str]) -> Launch:
    """Raises UserError for variables that contradict each other or are missing."""
    by = "accelerate" if "ACCELERATE_MIXED_PRECISION" in env else "torchrun"
    if "RANK" in env and "WORLD_SIZE" in env:
        world = slurm.number(env, "WORLD_SIZE")
        local_world = slurm.number(env, "LOCAL_WORLD_SIZE", 1 if world == 1 else None)
        found = Launch(by, slurm.number(env, "RANK"), world, slurm.number(env, "LOCAL_RANK"), local_world, _master(env))
    elif "SLURM_STEP_ID" in env and "SLURM_PROCID" in env:  # in a bare batch script there is no step: one process
        found = Launch("slurm", *slurm.place(env))
    else:
        if mpi := next((k for k in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE") if slurm.number(env, k, 1) > 1), None):
            raise UserError(f"mpirun started {env[mpi]} processes ({mpi}) that would not find each other: use torchrun")
        return Launch(by if by == "accelerate" else "python")
    if not (0 <= found.rank < found.world and 0 <= found.local_rank < found.local_world <= found.world):
        raise UserError(
            f"the launcher's variables contradict each other: rank {found.rank} of {found.world}, "
            f"local rank {found.local_rank} of {found.local_world}"
        )
    return found


def _master(env: Mapping[str, str]) -> str:
    if env.get("WORLD_SIZE") == "1":
        return ""
    if "MASTER_ADDR" not in env or "MASTER_PORT" not in env:
        raise UserError("WORLD_SIZE is over 1 but MASTER_ADDR and MASTER_PORT are not set: start with torchrun or srun")
    return f"{env['MASTER_ADDR']}:{env['MASTER_PORT']}"


_ON = ("1", "true", "yes", "on")
_SHARDING = {"FULL_SHARD": "fsdp", "1": "fsdp", "HYBRID_SHARD": "hybrid", "4": "hybrid", "NO_SHARD": "ddp", "3": "ddp"}


def honour(cfg: C, env: Mapping[str, str]) -> C:
    """The configuration with what accelerate's launcher asks for filled in.

    Raises:
        UserError: naming every request that dltrain does not take, or that contradicts a flag.
    """
    asked: dict[str, tuple[object, str]] = {}  # field -> value, and the variable that asks
    refused: list[str] = []

    def on(name: str) -> bool:
        return env.get(name, "").lower() in _ON

    precision = env.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    if precision in ("bf16", "fp16"):
        asked["precision"] = precision, f"ACCELERATE_MIXED_PRECISION={precision}"
    elif precision != "no":
        refused.append(f"ACCELERATE_MIXED_PRECISION={precision} (fp32, bf16 and fp16 are offered)")

    backend = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if backend == "inductor":
        asked["compile"] = True, "ACCELERATE_DYNAMO_BACKEND=inductor"
    elif backend != "no":
        refused.append(f"ACCELERATE_DYNAMO_BACKEND={backend} (inductor is offered)")

    for name in ("MODE", "USE_FULLGRAPH", "USE_DYNAMIC", "USE_REGIONAL_COMPILATION"):
        value = env.get(f"ACCELERATE_DYNAMO_{name}", "default")
        if value.lower() not in ("default", "false", "none"):
            refused.append(f"ACCELERATE_DYNAMO_{name}={value} (units are compiled with torch.compile's defaults)")

    if on("ACCELERATE_USE_FSDP"):
        sharding = env.get("FSDP_SHARDING_STRATEGY", "FULL_SHARD")
        if env.get("FSDP_VERSION") == "2" and env.get("FSDP_RESHARD_AFTER_FORWARD", "true").lower() == "false":
            refused.append("FSDP_RESHARD_AFTER_FORWARD=false (parameters are freed after forward)")
        if strategy := _SHARDING.get(sharding.upper()):
            asked["strategy"] = strategy, f"FSDP_SHARDING_STRATEGY={sharding}"
        else:
            refused.append(f"FSDP_SHARDING_STRATEGY={sharding} (FULL_SHARD, HYBRID_SHARD and NO_SHARD are offered)")
        if on("FSDP_ACTIVATION_CHECKPOINTING"):
            asked["remat"] = "full", "FSDP_ACTIVATION_CHECKPOINTING=true"
        for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"):
            if on(name):
                refused.append(f"{name}=true (nothing is offloaded)")
        if env.get("FSDP_IGNORED_MODULES"):
            refused.append("FSDP_IGNORED_MODULES (every module is sharded)")
        if env.get("FSDP_AUTO_WRAP_POLICY") == "SIZE_BASED_WRAP":
            refused.append("FSDP_AUTO_WRAP_POLICY=SIZE_BASED_WRAP (the model's blocks are the units)")

    if on("ACCELERATE_USE_DEEPSPEED"):
        if env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE"):
            refused.append("ACCELERATE_DEEPSPEED_CONFIG_FILE (give --strategy zero1, zero2 or zero3 instead)")
        else:
            stage = env.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
            asked["strategy"] = ("ddp" if stage == "0" else f"zero{stage}"), f"ACCELERATE_DEEPSPEED_ZERO_STAGE={stage}"
        if env.get("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"):
            refused.append("ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES (there are no expert layers)")
        for name in ("ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE"):
            if env.get(name, "none") != "none":
                refused.append(f"{name}={env[name]} (nothing is offloaded)")

    if (clip := env.get("ACCELERATE_GRADIENT_CLIPPING", "none")) != "none" and float(clip) != cfg.clip:
        refused.append(
            f"ACCELERATE_GRADIENT_CLIPPING={clip} (the recipe has clip {cfg.clip}: give --clip {clip} alone)"
        )
    if (steps := env.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1")) not in ("1", "none"):
        refused.append(f"ACCELERATE_GRADIENT_ACCUMULATION_STEPS={steps} (batch and micro_batch decide that)")
    if on("ACCELERATE_CPU_AFFINITY"):
        refused.append("ACCELERATE_CPU_AFFINITY (bind processes with numactl or srun)")
    for name in ("ACCELERATE_USE_MEGATRON_LM", "ACCELERATE_USE_PARALLELISM_CONFIG", "ACCELERATE_USE_SAGEMAKER"):
        if on(name):
            refused.append(f"{name} (no such parallelism is offered)")

    changes = {}
    for field, (value, variable) in asked.items():
        have = getattr(cfg, field)
        if have in ("auto", "none", False):
            changes[field] = value
        elif have != value:
            refused.append(f"{variable} (the recipe's {field} is {have})")
    if refused:
        raise UserError("accelerate asks for what this run cannot give: " + "; ".join(refused))
    return dataclasses.replace(cfg, **changes)
