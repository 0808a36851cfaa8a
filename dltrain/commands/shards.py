"""dltrain shards: plain webdataset shards out of what people have."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from dltrain.errors import UserError

SHARED = """
All formats: SRC is never changed. Shards appear in DST together, once all of them are whole, each with its index, and
beside them dltrain-shards.json (what made them) and classes.txt. A killed conversion goes on when the same command is
given again; shards made with other options or from another source are refused. The bytes do not depend on --workers.
"""

FORMATS = {
    "images": (
        "class folders of JPEG, PNG, WebP or PPM images, in a folder, .zip or .tar(.gz, .zst ...)",
        """SRC has SPLIT/CLASS/*.jpg, CLASS/*.jpg, or images in no folder (then without a class). The bytes of an image
are kept as they are; each is decoded once, to find broken ones. Members: .jpg (.png ...) and .cls, the number of the
class among the sorted names. The order is shuffled, so that shards are not sorted by class.""",
    ),
    "text": (
        ".txt files, in a folder or archive, or one file: a document per file, line or paragraph",
        """A document becomes the member .txt, or .npy with --tokenizer. Its key is the file's name, with the number of
its first line.""",
    ),
    "jsonl": (
        "lines of JSON, one document each (.jsonl, .gz, .zst ...)",
        "The text becomes the member .txt, or .npy with --tokenizer.",
    ),
    "parquet": (
        "rows of Parquet files (needs pyarrow)",
        """Each of --columns becomes a member: bytes as they are, strings as UTF-8, numbers in decimal, all
else as JSON. The order stays as it is, since Parquet has no random access to rows.""",
    ),
    "idx": (
        "MNIST and its relatives: pairs of images-idx3-ubyte and labels-idx1-ubyte (.gz)",
        "SRC is the folder with the files. Members: .png and .cls.",
    ),
    "imagenet": (
        "ILSVRC2012_img_train.tar, ILSVRC2012_img_val.tar, a folder with both, or class folders",
        "As `images`. Classes are numbered in the order of synset ids, as in torchvision and timm.",
    ),
    "cifar10": (
        "cifar-10-python.tar.gz, cifar-10-binary.tar.gz, either unpacked, or class folders",
        "Members: .png (or the images' own bytes, from class folders) and .cls.",
    ),
}


def main(argv: list[str]) -> None:
    """`dltrain shards ARGV`. UserError for a mistake; exits as argparse does for one of the command line."""
    args = vars(_parser().parse_args(argv))
    kind, source, folder = args.pop("format"), Path(args.pop("source")), Path(args.pop("folder"))
    from dltrain.convert.engine import Plan, convert

    plan = Plan(**{name: args.pop(name) for name in Plan.__dataclass_fields__ if name in args})
    for name in ("samples_per_shard", "shard_mb", "workers"):
        if getattr(plan, name) <= 0:
            raise UserError(f"--{name.replace('_', '-')} {getattr(plan, name)} must be above 0")
    read, options = _reader(kind, args)
    made = convert(source, folder, kind, options, plan, read)
    _tell(folder, made)


def _reader(kind: str, args: dict[str, Any]) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What lists the source, and the options that decide the bytes, without a path of this machine."""
    from dltrain.convert import images, published, text
    from dltrain.convert.engine import digest

    readers: dict[str, Callable[..., Any]] = {
        "images": images.class_folders,
        "idx": published.idx,
        "cifar10": published.cifar10,
        "imagenet": published.imagenet,
        "text": text.text,
        "jsonl": text.jsonl,
        "parquet": text.parquet,
    }
    options = dict(args)
    for name in ("classes", "labels", "tokenizer"):
        if args.get(name):
            options[name] = digest(Path(args[name]))
    if "classes" in args:
        args["classes"] = images.read_classes(Path(args["classes"])) if args["classes"] else ()
    if "columns" in args:
        args["columns"] = dict(_column(each) for each in args["columns"].split(","))
    return partial(readers[kind], **args), options


def _column(text: str) -> tuple[str, str]:
    column, is_, extension = text.partition("=")
    if not (column and is_ and extension.strip(".")):
        raise UserError(f"--columns {text}: give COLUMN=EXTENSION, such as text=txt, with commas between them")
    return column, extension.strip(".").lower()


def _tell(folder: Path, made: dict[str, Any]) -> None:
    classes = f", {len(made['classes'])} classes" if made["classes"] else ""
    print(f"{folder}: {made['samples']:,} samples, {made['shards']:,} shards{classes}")
    if made["ignored"]:
        print(f"left out as of other kinds: {made['ignored']:,} files")
    if bad := made["skipped"]:
        print(f"skipped as broken: {len(bad):,}, all named in {folder}/dltrain-shards.json:", *bad[:10], sep="\n  ")


def _shuffle(text: str) -> int | None:
    return None if text == "no" else int(text)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="dltrain shards", description=__doc__)
    formats = parser.add_subparsers(dest="format", metavar="FORMAT", required=True)
    for name, (short, long) in FORMATS.items():
        add = formats.add_parser(
            name,
            help=short,
            description=f"{short}\n\n{long}",
            epilog=SHARED,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        ).add_argument
        add("source", metavar="SRC")
        add("folder", metavar="DST", help="folder for the shards; made if it is not there")
        _own_options(name, add)
        if name != "parquet":
            order = None if name in ("text", "jsonl") else 0
            told = "no" if order is None else order
            shuffled = f"fixed pseudo-random order of the samples, or no (default: {told})"
            add("--shuffle", type=_shuffle, default=order, metavar="SEED", help=shuffled)
        add("--samples-per-shard", type=int, default=10_000, metavar="N", help="at most (default: 10000)")
        add("--shard-mb", type=float, default=256, metavar="MB", help="at most, counted on SRC (default: 256)")
        workers = len(os.sched_getaffinity(0))
        add("--workers", type=int, default=workers, metavar="N", help="processes (default: one per processor)")
        add("--skip-bad", action="store_true", help="leave out what is broken, and name it")
        add("--overwrite", action="store_true", help="replace what this command made in DST before")
    return parser


def _own_options(name: str, add: Callable[..., Any]) -> None:
    if name in ("images", "idx", "imagenet", "cifar10"):
        add("--split", default="", help="part of SRC to take, where it has several: train, val ...")
    if name in ("images", "imagenet"):
        size = "make the shorter side this long, where it is longer, as JPEG of quality 90 (default: keep the bytes)"
        add("--size", type=int, default=0, metavar="PIXELS", help=size)
        classes = "names of the classes in the order of their numbers: give the training shards' classes.txt to the "
        classes += "validation images (default: those in SRC, sorted)"
        add("--classes", default="", metavar="FILE", help=classes)
    if name in ("text", "jsonl"):
        tokenizer = "sentencepiece model: write tokens (.npy) instead of the text"
        add("--tokenizer", default="", metavar="MODEL", help=tokenizer)
    match name:
        case "imagenet":
            labels = "of the validation images: the devkit's tar.gz (needs scipy), or a text file with one synset a "
            labels += "line (default: the devkit beside the images)"
            add("--labels", default="", metavar="FILE", help=labels)
        case "text":
            add("--per-line", dest="unit", action="store_const", const="line", default="file")
            add("--per-paragraph", dest="unit", action="store_const", const="paragraph")
        case "jsonl":
            add("--field", default="text", metavar="NAME", help="of the text (default: text)")
            add("--key", default="", metavar="NAME", help="of the field for the key (default: file and line number)")
        case "parquet":
            columns = "such as image.bytes=jpg,label=cls (default: text=txt)"
            add("--columns", default="text=txt", metavar="COLUMN=EXTENSION,...", help=columns)
