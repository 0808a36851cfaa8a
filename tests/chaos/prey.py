"""The toy task as a recipe, for `dltrain chaos`. With UNSTEADY its numbers depend on the process, as they must not."""

import os

import toy
from toy import Config

import dltrain

PRESETS = {"debug": Config(save_every=3, eval_every=4)}


def main(cfg: Config) -> None:
    if "UNSTEADY" in os.environ:
        toy.linear = lambda *_: lambda step: 1 / (1 + os.getpid() % 97)
    toy.train(cfg)


if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)
    dltrain.cli(main, Config, PRESETS)
