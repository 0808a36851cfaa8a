"""A run directory -> what it trained: its recipe, its configuration and its newest weights."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

from torch import Tensor

from dltrain import checkpoint, rundir
from dltrain.config import Config, dress
from dltrain.errors import UserError


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
