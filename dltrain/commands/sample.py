"""dltrain sample: text from a run's newest weights."""

import argparse
from pathlib import Path

from dltrain.commands.trained import trained

ABOUT = "Continues the prompt with the newest whole checkpoint. Equal seeds give equal text."


def main(argv: list[str]) -> None:
    """`dltrain sample ARGV`. UserError for a mistake; exits as argparse does for one of the command line.

    The recipe's own sample(cfg, weights, prompt, *, tokens, temperature, top_k, seed) -> str does the work.
    """
    parser = argparse.ArgumentParser("dltrain sample", description=ABOUT)
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--prompt", required=True, help="text to continue")
    parser.add_argument("--tokens", type=int, default=200, help="to write at most (%(default)s)")
    parser.add_argument("--temperature", type=float, default=0.8, help="0: always the likeliest token (%(default)s)")
    parser.add_argument("--top-k", type=int, default=0, help="draw from so many likeliest tokens; 0: from all")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args(argv))
    recipe, cfg, weights = trained(args.pop("run"), "sample")
    print(recipe.sample(cfg, weights, args.pop("prompt"), **args))
