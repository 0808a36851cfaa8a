"""dltrain data: what is in webdataset shards, whether it is whole, and which sample comes when."""

import argparse
from collections.abc import Callable
from typing import Any

INDEX = """An index makes any sample one step away and its damage known. One that is there is kept, also where the shard
has changed since; --force believes the shard. Of a shard that is compressed or elsewhere, the index lies in the cache.
Exit code 1 if a shard is damaged or is not what its index says."""

VERIFY = """Every byte of every shard is compared with the index. A shard without one is read through as a tar, which
cannot show that contents have changed. Exit code 1, and a line for each damage, unless all is whole."""

STATS = "Of the contents, only labels (.cls) and text (.txt, .text) are read; the rest is in the indexes."

SHOW = """Images become a contact sheet, text is printed, tokens (.npy) are counted or, with --tokenizer, decoded."""

EXPLAIN = """From the order alone: no sample is read. Of a run directory, the order, batch sizes and lanes are those of
the newest checkpoint. --step counts as the log does: the first step is 1."""

BENCH = """Reads the same samples in turns: 1 MiB reads, webdataset, this package; decodes and crops images; reads and
makes tokens. --data is a folder with cifar10/train.zip, imagenette128/train.zip (class folders of images) and
gutenberg-en/train.jsonl.gz (documents with the field "text"); what is not there is left out. mosaicml-streaming and
litdata take part, on formats of their own, where they can be imported. Shards are made once, in the cache."""


def main(argv: list[str]) -> None:
    """`dltrain data ARGV`. UserError for a mistake; exits as argparse does for one of the command line, and with 1 for
    damage."""
    args = vars(_parser().parse_args(argv))
    match args.pop("command"):
        case "index":
            from dltrain.commands.data_check import index

            index(**args)
        case "verify":
            from dltrain.commands.data_check import verify

            verify(**args)
        case "stats":
            from dltrain.commands.data_stats import stats

            stats(**args)
        case "show":
            from dltrain.commands.data_show import show

            show(**args)
        case "explain":
            from dltrain.commands.data_explain import explain

            explain(**args)
        case "bench":
            from dltrain.commands.data_bench import bench

            bench(**args)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dltrain data", description=__doc__)
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)

    def command(name: str, short: str, long: str) -> Callable[..., Any]:
        form, told = argparse.RawDescriptionHelpFormatter, f"{short}.\n\n{long}"
        return commands.add_parser(name, help=short, description=told, formatter_class=form).add_argument

    def of_shards(name: str, short: str, long: str) -> Callable[..., Any]:
        add = command(name, short, long)
        add("pattern", metavar="PATTERN", nargs="+", help="shards: paths, urls, {000..012} braces, folders")
        add("--pipe", action="store_true", help="allow pipe:COMMAND, which runs a shell command")
        return add

    add = of_shards("index", "Make the indexes of shards that have none", INDEX)
    add("--force", action="store_true", help="make all of them again")
    add = of_shards("verify", "Check every byte of shards", VERIFY)
    add("--json", metavar="FILE", help="write the result as data, too")
    of_shards("stats", "What shards hold", STATS)
    add = of_shards("show", "Samples to look at", SHOW)
    add("--n", type=int, default=16, help="samples (default: 16)")
    add("--out", metavar="FILE", default="samples.png", help="for the contact sheet (default: samples.png)")
    add("--seed", type=int, default=0, help="of the choice of samples (default: 0)")
    add("--tokenizer", metavar="MODEL", help="sentencepiece model that the tokens are of")
    add = command("explain", "Which samples a rank reads at a step", EXPLAIN)
    add("target", metavar="RUN|PATTERN", nargs="+", help="a run directory, or shards")
    add("--step", type=int, required=True, help="the first step is 1")
    add("--rank", type=int, default=0, help="(default: 0)")
    add("--world", type=int, help="processes (default: the run's, or 1)")
    add(
        "--shards", metavar="PATTERN", nargs="+", help="those of a run, source after source (default: its own --shards)"
    )
    for name in ("batch", "lanes", "micro-batch", "seed", "window"):
        told = {"batch": "rows of a step", "window": "shards that are shuffled together (default: all)"}
        add(f"--{name}", type=int, help=f"of shards: {told.get(name, 'as a recipe has it')}")
    add("--strategy", help="of shards: as a recipe has it, since fsdp deals lanes in its own way")
    add = command("bench", "How fast samples are read", BENCH)
    add("--data", metavar="DIR", help="(default: the environment's DLTRAIN_DATA)")
    add("--only", default="bytes,images,text", help="(default: bytes,images,text)")
    add("--turns", type=int, default=7, help="of each side (default: 7)")
    add("--json", metavar="FILE", help="write the result as data, too")
    return parser
