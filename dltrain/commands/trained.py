"""Recipes by their path; and a run directory -> what it trained: its recipe, its configuration, its newest weights."""

import importlib
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

from torch import Tensor

from dltrain import checkpoint, rundir
from dltrain.config import Config, dress
from dltrain.errors import UserError


def recipes() -> Path:
    """The folder of the recipes, links resolved."""
    return Path(importlib.import_module("dltrain.recipes").__path__[0]).resolve()


def recipe_of(name: str) -> ModuleType:
    """The module of a recipe's file. UserError where there is none, or no recipe in it."""
    path = Path(name)
    if not path.is_file():
        raise UserError(f"{name}: no such recipe; give its path, such as recipes/bert_pretrain.py")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec and spec.loader
    sys.modules[path.stem] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if not (hasattr(module, "Config") and hasattr(module, "PRESETS")):
        raise UserError(f"{name} is no recipe: it has no Config and PRESETS")
    return module


def trained(run: Path, verb: str) -> tuple[ModuleType, Config, dict[str, Tensor]]:
    """The recipe's module, which has the function `verb`; the run's Config; the newest whole checkpoint's weights.

    Raises:
        UserError: for a folder that is no run, has no whole checkpoint, or whose recipe has no such function.
    """
    described = rundir.read_json(run / "config.json")
    try:
        recipe = importlib.import_module(f"dltrain.recipes.{described['recipe']}")
    except ModuleNotFoundError:
        raise UserError(f"{run} is of the recipe {described['recipe']!r}, which is not one of dltrain's") from None
    if not hasattr(recipe, verb):
        raise UserError(f"the recipe {described['recipe']} has no {verb}")
    found = checkpoint.newest(run / "checkpoints", lambda path, why: print(f"skipping {path}: {why}", file=sys.stderr))
    if found is None:
        raise UserError(f"{run} has no whole checkpoint yet")
    return recipe, dress(recipe.Config, described["config"]), checkpoint.read(found[0])
