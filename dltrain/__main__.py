"""The command line: what one does with run directories, shards and claims."""

import sys
from pathlib import Path

from dltrain.config import leave
from dltrain.errors import UserError

USAGE = """usage: dltrain COMMAND ...

  dltrain report RUN            write RUN/report.html: one page with the curves, the configuration and the results
  dltrain export RUN DIR        write the newest checkpoint's weights as DIR, in Hugging Face's layout
  dltrain sample RUN            continue a --prompt with the newest checkpoint of a language model
  dltrain prove RUN RUN         compare two runs to the bit: "identical" and exit code 0, or the first difference and 1
  dltrain chaos [RECIPE ...]    kill, preempt and harm runs of a recipe; exit code 1 where one differs by a bit
  dltrain claims [RECIPE ...]   run recipes' claims and record what was measured; exit code 1 where one is not shown
  dltrain shards KIND SRC DST   make webdataset shards of images, text, jsonl, parquet, idx, imagenet or cifar10
  dltrain plan RECIPE ...       memory, time and failures on GPUs that are not there; --world, --gpu, --fit
  dltrain submit RECIPE ...     check a job on the login node, then hand it to SLURM; --nodes, --gpus, --dry-run
  dltrain bench train           our trainer beside a bare loop and Hugging Face's Trainer: throughput, memory, phases
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
                from dltrain.commands.trained import trained

                recipe, cfg, weights = trained(Path(run), "export")
                recipe.export(cfg, weights, Path(folder))
                print(folder)
            case ["sample", *arguments]:
                from dltrain.commands import sample

                sample.main(arguments)
            case ["prove", a, b]:
                from dltrain.prove import prove

                same, words = prove(Path(a), Path(b))
                print(words)
                sys.exit(0 if same else 1)
            case ["bench", *arguments]:
                from dltrain.commands import bench

                bench.main(arguments)
            case ["chaos", *arguments]:
                from dltrain.commands import chaos

                chaos.main(arguments)
            case ["claims", *arguments]:
                from dltrain.commands import claims

                claims.main(arguments)
            case ["plan", *arguments]:
                from dltrain.commands import plan

                plan.main(arguments)
            case ["submit", *arguments]:
                from dltrain.commands import submit

                submit.main(arguments)
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


if __name__ == "__main__":
    main()
