"""Imports go down only, and each third-party library has one owner: read off the source, nothing is imported."""

import ast
import graphlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]

# From the top down. A module imports what stands in lower lines, and in its own line what no `|` parts it from.
LAYERS = """
bench
recipes
__main__
commands report debug prove claim grid plot chaos scaling scaling_report throughput plan
report_charts
convert
loop
evaluation probe coupled
run
resume
world damage replicas | doctor | replay
strategy heal guard gate skipped zero lanes initial checkpoint log rundir fence speed flops
signals meter launch slurm config
data | models | optim schedules average | environments
ops
kernels | tokenizers
progress errors seeds files
"""

# The modules that may import each library; torch and numpy are everywhere but where NONE_OF says.
OWNERS = {
    "PIL": ["data.pictures", "data.sheet", "data.digits", "data.bench_images", "convert.images"],
    "accelerate": ["launch"],
    "aiohttp": ["data.download"],
    "ale_py": ["environments"],
    "crc32c": ["data.index", "data.shard", "checkpoint"],
    "deepspeed": ["zero"],
    "fsspec": ["data.download"],
    "gymnasium": ["environments"],
    "liger_kernel": ["kernels.bench"],
    "litdata": ["data.bench_bytes"],
    "matplotlib": ["report_charts", "plot", "kernels.bench"],
    "pyarrow": ["convert.text"],
    "rich": ["progress", "log"],
    "safetensors": ["models.exchange"],
    "scipy": ["convert.published", "scaling"],
    "simplejpeg": ["data.pictures", "data.bench_images"],
    "sentencepiece": ["tokenizers.spm"],
    "streaming": ["data.bench_bytes"],
    "timm": ["throughput.workloads"],
    "torch.utils.tensorboard": ["log"],
    "transformers": ["throughput.hugging_face"],
    "triton": ["kernels"],
    "tyro": ["config"],
    "wandb": ["log"],
    "webdataset": ["data.shards", "data.index", "data.urls", "data.stages", "data.bench_images", "data.bench_bytes"],
    "zstandard": ["data.compressed"],
}
NONE_OF = {"tokenizers": ["torch"], "kernels": ["numpy"], "config": ["torch"], "launch": ["torch"]}


def modules() -> dict[str, str]:
    """Name below dltrain ("data.shards", "kernels.gelu", "" for dltrain itself) -> source."""
    found = {}
    for folder in ("dltrain", "kernels", "tokenizers", "recipes"):
        for path in (ROOT / folder).glob("**/*.py"):
            if path.resolve() == path:  # not through a link
                parts = path.relative_to(ROOT / "dltrain" if folder == "dltrain" else ROOT).with_suffix("").parts
                found[".".join(part for part in parts if part != "__init__")] = path.read_text()
    return found


MODULES = modules()
GROUPS = {  # module or package -> (line, group in the line); a greater line is lower
    name: (i, j)
    for i, line in enumerate(LAYERS.strip().splitlines())
    for j, group in enumerate(line.split("|"))
    for name in group.split()
}


def imports(source: str) -> set[str]:
    """Full names of all that is imported, in functions too, but not for type checkers alone."""
    names: set[str] = set()
    todo: list[ast.AST] = [ast.parse(source)]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            todo += node.orelse
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names}
        else:
            todo += ast.iter_child_nodes(node)
    return names


def ours(source: str) -> set[str]:
    """The modules of dltrain that are imported; "" is dltrain itself, for Run, fit, cli and so on."""
    found = set()
    for name in imports(source) - {"dltrain.__version__"}:
        if name.split(".")[0] == "dltrain":
            below = name.split(".")[1:]
            while below and ".".join(below) not in MODULES and ".".join(below) not in GROUPS:
                below.pop()  # a function or class in the module
            found.add(".".join(below))
    return found


def top(module: str) -> str:
    return module.split(".")[0]


def layer_faults(module: str, source: str) -> list[str]:
    """What `module` imports and should not."""
    if top(module) not in GROUPS:
        return [f"{module} has no line in LAYERS"]
    line, group = GROUPS[top(module)]
    faults = [f"{module}: a relative import" for name in imports(source) if name.startswith(".")]
    for other in ours(source):
        if not other:
            fault = line > GROUPS["recipes"][0]  # the names of dltrain itself are for recipes
        elif top(other) not in GROUPS:
            fault = True
        elif top(other) == top(module):
            fault = module.startswith("recipes.")
        else:
            below, beside = GROUPS[top(other)]
            fault = below < line or (below == line and beside != group)
        if fault:
            faults.append(f"{module} imports dltrain.{other}" if other else f"{module} imports dltrain's own names")
    return faults


def owner_faults(module: str, source: str) -> list[str]:
    """The libraries that `module` imports and does not own."""
    faults = []
    for name in imports(source):
        if name.startswith(".") or name.split(".")[0] in sys.stdlib_module_names | {"dltrain"}:
            continue
        library = max(
            (known for known in (*OWNERS, "torch", "numpy") if f"{name}.".startswith(f"{known}.")), key=len, default=""
        )
        if not library:
            faults.append(f"{module} imports {name}, which has no owner in OWNERS")
        elif library in OWNERS and not any(f"{module}.".startswith(f"{owner}.") for owner in OWNERS[library]):
            faults.append(f"{module} imports {name}, which is for {', '.join(OWNERS[library])}")
        elif library in NONE_OF.get(top(module), ()):
            faults.append(f"{module} imports {name}, which {top(module)} does without")
    return faults


@pytest.mark.parametrize("module", sorted(MODULES.keys() - {""}))
def test_imports_go_down_to_owned_libraries(module):
    assert layer_faults(module, MODULES[module]) + owner_faults(module, MODULES[module]) == []


def test_no_cycles():
    graph = {module: ours(source) - {"", module} for module, source in MODULES.items() if module}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError with the names


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.order", "from dltrain.run import Run"),
        ("data.order", "def f():\n    import dltrain.models.bert"),
        ("models.bert", "from dltrain import optim"),
        ("kernels.gelu", "from dltrain.tokenizers import spm"),
        ("kernels.gelu", "from .layer_norm import layer_norm"),
        ("ops", "from dltrain import fit"),
        ("checkpoint", "from dltrain import Run"),
        ("recipes.gpt_pretrain", "from dltrain.recipes.bert_pretrain import Config"),
        ("helpers", ""),
    ],
)
def test_a_wrong_layer_is_seen(module, source):
    assert len(layer_faults(module, source)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("data.order", "import webdataset as wds"),
        ("run", "from torch.utils.tensorboard import SummaryWriter"),
        ("tokenizers.spm", "import torch"),
        ("models.bert", "def f():\n    from requests import get"),
    ],
)
def test_a_library_of_another_is_seen(module, source):
    assert len(owner_faults(module, source)) == 1


def test_what_may_be_imported():
    source = "import dltrain\nfrom dltrain import Run, ops\nfrom dltrain.data.order import order\nimport torch, json"
    assert layer_faults("recipes.bert_pretrain", source) + owner_faults("recipes.bert_pretrain", source) == []
    source = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from dltrain.run import Run"
    assert layer_faults("data.order", source) == []
