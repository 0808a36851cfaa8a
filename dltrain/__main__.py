"""dltrain report RUN | export RUN DIR | prove RUN RUN: what one does with run directories."""

import importlib
import sys
from pathlib import Path

from dltrain.config import dress, leave
from dltrain.errors import UserError

USAGE = """usage: dltrain COMMAND ...

  dltrain report RUN            write RUN/report.html: one page with the curves, the configuration and the results
  dltrain export RUN DIR        write the newest checkpoint's weights as DIR, in Hugging Face's layout
  dltrain prove RUN RUN         compare two runs to the bit: "identical" and exit code 0, or the first difference and 1
  dltrain shards KIND SRC DST   make webdataset shards of images, text, jsonl, parquet, idx, imagenet or cifar10
  dltrain data WHAT PATTERN     index, verify, stats, show or explain shards; bench how fast they are read
"""


def main() -> None:
    """Exit code 2, and one line, for a user's mistake."""
    try:
        match sys.argv[1:]:
            case ["report", run]:
                from dltrain.report import report

                print(report(Path(run)))
            case ["export", run, folder]:
                export(Path(run), Path(folder))
                print(folder)
            case ["prove", a, b]:
                from dltrain.prove import prove

                same, words = prove(Path(a), Path(b))
                print(words)
                sys.exit(0 if same else 1)
            case ["shards", *arguments]:
                from dltrain.commands import shards

                shards.main(arguments)
            case ["data", *arguments]:
                from dltrain.commands import data

                data.main(arguments)
            case ["-h" | "--help"]:
                print(USAGE, end="")
            case arguments:
                print(USAGE, end="", file=sys.stderr)
                raise UserError(f"no such command: {' '.join(arguments) or '(none)'}")
    except UserError as error:
        print(f"dltrain: {error}", file=sys.stderr)
        leave(2)


def export(run: Path, folder: Path) -> None:
    """Hand the newest whole checkpoint of a run to its recipe's own `export(cfg, weights, folder)`.

    Raises:
        UserError: for a folder that is no run, has no whole checkpoint, or whose recipe exports nothing.
    """
    from dltrain import checkpoint, rundir

    described = rundir.read_json(run / "config.json")
    try:
        recipe = importlib.import_module(f"dltrain.recipes.{described['recipe']}")
    except ModuleNotFoundError:
        raise UserError(f"{run} is of the recipe {described['recipe']!r}, which is not one of dltrain's") from None
    if not hasattr(recipe, "export"):
        raise UserError(f"the recipe {described['recipe']} has no export")
    found = checkpoint.newest(run / "checkpoints", lambda path, why: print(f"skipping {path}: {why}", file=sys.stderr))
    if found is None:
        raise UserError(f"{run} has no whole checkpoint yet")
    recipe.export(dress(recipe.Config, described["config"]), checkpoint.read(found[0]), folder)


if __name__ == "__main__":
    main()
