"""dltrain: one trainer, the same numbers everywhere. Names load on first use, so that `--help` is quick."""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dltrain import ops as ops
    from dltrain.config import Config as Config
    from dltrain.config import answer_help as answer_help
    from dltrain.config import cli as cli
    from dltrain.debug import checklist as checklist
    from dltrain.evaluation import evaluate as evaluate
    from dltrain.loop import fit as fit
    from dltrain.run import Run as Run

__version__ = "0.1.0"
_HOME = {
    "Config": "config",
    "cli": "config",
    "answer_help": "config",
    "Run": "run",
    "fit": "loop",
    "evaluate": "evaluation",
    "checklist": "debug",
}


def __getattr__(name: str):
    if name == "ops":
        return importlib.import_module("dltrain.ops")
    if name in _HOME:
        return getattr(importlib.import_module(f"dltrain.{_HOME[name]}"), name)
    raise AttributeError(f"module 'dltrain' has no attribute {name!r}")
