"""Who started us: every launcher's variables, and what accelerate asks for honoured or refused by name."""

import dataclasses
import shutil
from pathlib import Path

import commands
import pytest

import dltrain
from dltrain.errors import UserError
from dltrain.launch import Launch, detect, honour
from dltrain.rundir import read_json

TESTS = str(Path(__file__).parent)
TORCHRUN = {
    "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "n1",
    "MASTER_PORT": "29",
}  # fmt: skip
SRUN = {
    "SLURM_JOB_ID": "12", "SLURM_STEP_ID": "0", "SLURM_PROCID": "6", "SLURM_LOCALID": "0", "SLURM_NODEID": "3",
    "SLURM_STEP_NUM_TASKS": "7", "SLURM_STEP_TASKS_PER_NODE": "2(x3),1", "SLURM_STEP_NODELIST": "n[1-3,07-09],gpu-a",
}  # fmt: skip


def without(env: dict[str, str], *names: str) -> dict[str, str]:
    return {k: v for k, v in env.items() if k not in names}


def test_python_alone():
    assert detect({}) == Launch("python", 0, 1, 0, 1, "")


def test_torchrun():
    assert detect(TORCHRUN) == Launch("torchrun", 5, 8, 1, 4, "n1:29")


def test_one_process_needs_no_address():
    assert detect({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == Launch("torchrun")


def test_accelerate():
    assert detect(TORCHRUN | {"ACCELERATE_MIXED_PRECISION": "no"}) == Launch("accelerate", 5, 8, 1, 4, "n1:29")
    assert detect({"ACCELERATE_MIXED_PRECISION": "no"}) == Launch("accelerate")


def test_srun():
    found = detect(SRUN)
    assert dataclasses.replace(found, master="") == Launch("slurm", 6, 7, 0, 1, "")
    host, port = found.master.split(":")
    assert host == "n1"
    assert 20000 <= int(port) < 32000  # below the ephemeral ones, the same for every task of the step
    assert detect(SRUN | {"SLURM_PROCID": "0", "SLURM_NODEID": "0"}).master == found.master
    assert detect(SRUN | {"SLURM_STEP_ID": "1"}).master != found.master  # steps side by side do not meet
    assert detect(SRUN | {"SLURM_NODEID": "2", "SLURM_LOCALID": "1"}).local_world == 2
    assert detect(SRUN | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "77"}).master == "10.0.0.1:77"


def test_srun_of_one_task_needs_no_address():
    env = {"SLURM_STEP_ID": "0", "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_STEP_NUM_TASKS": "1"}
    assert detect(env) == Launch("slurm")


def test_a_batch_script_without_srun_is_one_process():
    assert detect(without(SRUN, "SLURM_STEP_ID") | {"SLURM_PROCID": "0"}) == Launch("python")


def test_torchrun_inside_a_slurm_job_goes_first():
    assert detect(SRUN | TORCHRUN).by == "torchrun"


@pytest.mark.parametrize(
    ("env", "message"),
    [
        (without(TORCHRUN, "LOCAL_RANK"), "not LOCAL_RANK"),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE"), "not LOCAL_WORLD_SIZE"),
        (without(TORCHRUN, "MASTER_ADDR"), "MASTER_ADDR and MASTER_PORT are not set"),
        (without(TORCHRUN, "MASTER_PORT"), "MASTER_ADDR and MASTER_PORT are not set"),
        (TORCHRUN | {"RANK": "8"}, "rank 8 of 8"),
        (TORCHRUN | {"RANK": "-1"}, "rank -1 of 8"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "local rank 4 of 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "9"}, "of 9"),
        (TORCHRUN | {"WORLD_SIZE": "many"}, "WORLD_SIZE='many'"),
        (without(SRUN, "SLURM_LOCALID"), "not SLURM_LOCALID"),
        (without(SRUN, "SLURM_STEP_NODELIST"), "no SLURM_STEP_NODELIST"),
        (SRUN | {"SLURM_STEP_NODELIST": "[1-3]"}, r"\[1-3\]"),
        (SRUN | {"SLURM_STEP_TASKS_PER_NODE": "2(y3)"}, r"2\(y3\)"),
        (SRUN | {"SLURM_NODEID": "4"}, "SLURM_NODEID=4"),
        (SRUN | {"SLURM_PROCID": "7"}, "rank 7 of 7"),
    ],
)
def test_odd_variables_are_named(env, message):
    with pytest.raises(UserError, match=message):
        detect(env)


@pytest.mark.parametrize(
    "env",
    [
        {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_COMM_WORLD_RANK": "1", "ACCELERATE_MIXED_PRECISION": "no"},
        {"PMI_SIZE": "2", "PMI_RANK": "1"},
    ],
)
def test_processes_of_mpirun_do_not_each_train_alone(env):
    """accelerate starts several processes on CPUs with mpirun: two of them would write one run directory."""
    with pytest.raises(UserError, match=r"MPI|PMI|mpirun"):
        detect(env)


# --- accelerate's requests ------------------------------------------------------------------------------------------

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"}
DEEPSPEED = {
    "ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2",
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "none", "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "none",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1",
}  # fmt: skip


def honoured(env: dict[str, str], **fields) -> dict[str, object]:
    """The fields that a request changes."""
    cfg = dltrain.Config(**fields)
    after = dataclasses.asdict(honour(cfg, env))
    return {k: v for k, v in after.items() if v != getattr(cfg, k)}


@pytest.mark.parametrize(
    ("env", "changes"),
    [
        ({}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}),
        ({"ACCELERATE_MIXED_PRECISION": "fp16"}, {"precision": "fp16"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "default"}, {"compile": True}),
        (FSDP, {"strategy": "fsdp"}),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "true", "FSDP_OFFLOAD_PARAMS": "false"}, {"strategy": "fsdp"}),
        (FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD"}, {"strategy": "hybrid"}),
        (FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "4"}, {"strategy": "hybrid"}),
        (FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "1"}, {"strategy": "fsdp"}),
        (FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "NO_SHARD"}, {"strategy": "ddp"}),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, {"strategy": "fsdp", "remat": "full"}),
        (DEEPSPEED, {"strategy": "zero2"}),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {"strategy": "ddp"}),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"}, {"strategy": "zero1"}),
        (
            DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3", "ACCELERATE_MIXED_PRECISION": "bf16"},
            {"strategy": "zero3", "precision": "bf16"},
        ),
        (FSDP | {"ACCELERATE_USE_FSDP": "false"}, {}),
    ],
)
def test_honoured(env, changes):
    assert honoured(env) == changes


def test_a_flag_that_agrees_with_the_request():
    assert honoured(DEEPSPEED, strategy="zero2") == {}
    assert honoured({"ACCELERATE_MIXED_PRECISION": "bf16"}, precision="bf16") == {}


@pytest.mark.parametrize(
    ("env", "name"),
    [
        ({"ACCELERATE_MIXED_PRECISION": "fp8"}, "ACCELERATE_MIXED_PRECISION=fp8"),
        ({"ACCELERATE_DYNAMO_BACKEND": "EAGER"}, "ACCELERATE_DYNAMO_BACKEND=eager"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_MODE": "max-autotune"}, "ACCELERATE_DYNAMO_MODE"),
        (
            {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR", "ACCELERATE_DYNAMO_USE_FULLGRAPH": "True"},
            "ACCELERATE_DYNAMO_USE_FULLGRAPH",
        ),
        (FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"}, "SHARD_GRAD_OP"),
        (FSDP | {"FSDP_VERSION": "1", "FSDP_SHARDING_STRATEGY": "HYBRID_SHARD_ZERO2"}, "HYBRID_SHARD_ZERO2"),
        (FSDP | {"FSDP_RESHARD_AFTER_FORWARD": "false"}, "FSDP_RESHARD_AFTER_FORWARD=false"),
        (FSDP | {"FSDP_OFFLOAD_PARAMS": "true"}, "FSDP_OFFLOAD_PARAMS"),
        (FSDP | {"FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": "true"}, "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD"),
        (FSDP | {"FSDP_IGNORED_MODULES": "head"}, "FSDP_IGNORED_MODULES"),
        (FSDP | {"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "SIZE_BASED_WRAP"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": "ds.json"}, "ACCELERATE_DEEPSPEED_CONFIG_FILE"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE": "cpu"}, "OFFLOAD_OPTIMIZER_DEVICE=cpu"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "OFFLOAD_PARAM_DEVICE=nvme"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES": "Moe"}, "ACCELERATE_DEEPSPEED_MOE_LAYER_CLS_NAMES"),
        (DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "0.5"}, "ACCELERATE_GRADIENT_CLIPPING=0.5"),
        (DEEPSPEED | {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"}, "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4"),
        ({"ACCELERATE_CPU_AFFINITY": "1"}, "ACCELERATE_CPU_AFFINITY"),
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "ACCELERATE_USE_MEGATRON_LM"),
        ({"ACCELERATE_USE_PARALLELISM_CONFIG": "true"}, "ACCELERATE_USE_PARALLELISM_CONFIG"),
    ],
)
def test_refused_by_name(env, name):
    with pytest.raises(UserError) as error:
        honour(dltrain.Config(), env)
    assert name in str(error.value)
    assert "\n" not in str(error.value)


def test_a_flag_that_contradicts_the_request():
    with pytest.raises(UserError, match=r"ACCELERATE_DEEPSPEED_ZERO_STAGE=2 \(the recipe's strategy is fsdp\)"):
        honour(dltrain.Config(strategy="fsdp"), DEEPSPEED)
    with pytest.raises(UserError, match=r"ACCELERATE_MIXED_PRECISION=fp16 \(the recipe's precision is bf16\)"):
        honour(dltrain.Config(precision="bf16"), {"ACCELERATE_MIXED_PRECISION": "fp16"})


def test_all_that_is_refused_comes_at_once():
    env = FSDP | {"FSDP_OFFLOAD_PARAMS": "true", "ACCELERATE_MIXED_PRECISION": "fp8", "ACCELERATE_CPU_AFFINITY": "1"}
    with pytest.raises(UserError, match=r"MIXED_PRECISION=fp8.*FSDP_OFFLOAD_PARAMS.*ACCELERATE_CPU_AFFINITY"):
        honour(dltrain.Config(), env)


# --- the real launcher ----------------------------------------------------------------------------------------------


def config_file(folder: Path, kind: str, section: dict[str, object], processes: int = 2) -> Path:
    """What `accelerate config` writes."""
    path = folder / f"{kind.lower()}.yaml"
    head = {
        "compute_environment": "LOCAL_MACHINE", "distributed_type": kind, "use_cpu": "true", "machine_rank": 0,
        "num_machines": 1, "num_processes": processes, "main_process_port": 0, "mixed_precision": "'no'",
    }  # fmt: skip
    lines = [*(f"{k}: {v}" for k, v in head.items()), f"{kind.lower()}_config:"]
    path.write_text("\n".join([*lines, *(f"  {k}: {v}" for k, v in section.items())]) + "\n")
    return path


def by_accelerate(path: Path) -> tuple[object, ...]:
    return (*commands.ACCELERATE, "--config_file", path)


@pytest.fixture
def toy_train(tmp_path) -> Path:
    """A recipe that takes no time."""
    path = tmp_path / "toy_train.py"
    path.write_text(
        f"import sys\nsys.path.insert(0, {TESTS!r})\nimport dltrain, toy\ndltrain.cli(toy.train, toy.Config)\n"
    )
    return path


def test_an_fsdp_config_file(tmp_path, toy_train):
    section = {"fsdp_version": 2, "fsdp_reshard_after_forward": "true", "fsdp_activation_checkpointing": "true"}
    launcher, out = by_accelerate(config_file(tmp_path, "FSDP", section)), tmp_path / "run"
    commands.run("--steps", 2, "--out", out, by=launcher, recipe=(toy_train,))
    used = read_json(out / "config.json")["config"]
    assert (used["strategy"], used["remat"]) == ("fsdp", "full")
    assert (out / "checkpoints/step-00000002/__1_0.distcp").exists()  # two processes wrote it


@pytest.mark.compiler
@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed's CPU operator needs a C++ compiler")
def test_a_deepspeed_config_file(tmp_path, toy_train):
    section = {
        "zero_stage": 2, "gradient_clipping": 1.0, "gradient_accumulation_steps": 1, "offload_optimizer_device": "none",
        "offload_param_device": "none",
    }  # fmt: skip
    launcher, out = by_accelerate(config_file(tmp_path, "DEEPSPEED", section)), tmp_path / "run"
    commands.run("--clip", 1, "--steps", 2, "--out", out, by=launcher, recipe=(toy_train,), DS_ACCELERATOR="cpu")
    assert read_json(out / "config.json")["config"]["strategy"] == "zero2"
    assert (out / "checkpoints/step-00000002/__1_0.distcp").exists()


def test_a_config_file_with_offload_is_refused(tmp_path):
    section = {"zero_stage": 3, "offload_optimizer_device": "cpu", "offload_param_device": "none"}
    launcher = by_accelerate(config_file(tmp_path, "DEEPSPEED", section, processes=1))
    _, err = commands.run("debug", "--out", tmp_path / "run", by=launcher, code=1)  # accelerate's own code
    mine = [line for line in err.splitlines() if line.startswith("bert_pretrain: ")]
    assert len(mine) == 1
    assert "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_DEVICE=cpu (nothing is offloaded)" in mine[0]
    assert "exitcode  : 2" in err
    assert not (tmp_path / "run").exists()
