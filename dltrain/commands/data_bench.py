"""dltrain data bench: how fast samples are read, as a table."""

import datetime
import os
import platform
import sys
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from dltrain import rundir
from dltrain.commands import shards as shards_command
from dltrain.data.cache import cache_dir
from dltrain.data.shards import Shards
from dltrain.data.turns import Rates, rates
from dltrain.errors import UserError

PARTS = "bytes", "images", "text"
LIBRARIES = (
    "webdataset", "numpy", "torch", "crc32c", "pillow", "simplejpeg", "sentencepiece", "mosaicml-streaming", "litdata",
)  # fmt: skip
IMAGES = {"cifar10": 2500, "imagenette128": 500}  # samples of a shard
SIDES = {
    "ours": "ours", "bare": "bare loop, bytes in memory", "plain": "bare loop of public calls",
    "webdataset": "webdataset, Pillow",
}  # fmt: skip
CROP, IMAGE_TURNS = 112, 40  # pixels; turns of a batch each


@dataclass
class Line:
    """One side. Ratios are of what a second of processor time gives, in the median."""

    what: str
    best: float  # per second
    median: float
    least: float
    cpu: float  # median per second of processor time
    mb: float = float("nan")  # per second of it
    over_webdataset: float = float("nan")
    of_limit: float = float("nan")  # of what the table calls so
    goal: str = ""
    reached: bool | None = None


@dataclass
class Table:
    """`unit` is what a rate counts, `limit` the side that cannot be passed."""

    title: str
    unit: str
    limit: str
    lines: list[Line]
    notes: list[str]


def bench(data: str | None, only: str, turns: int, json: str | None) -> None:
    """Print the tables, as Markdown. UserError where there is no data."""
    folder = data or os.environ.get("DLTRAIN_DATA")
    if not folder or not Path(folder).is_dir():
        raise UserError(f"no folder of data ({folder or 'none given'}): give --data DIR, or set DLTRAIN_DATA")
    asked = only.split(",")
    if unknown := set(asked) - set(PARTS):
        raise UserError(f"--only {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    home, about, tables = cache_dir() / "bench", measured(), []
    for name in IMAGES:
        archive = Path(folder) / name / "train.zip"
        if archive.exists() and {"bytes", "images"} & set(asked):
            shards = Shards(str(_converted("images", archive, home / name, IMAGES[name])))
            if "bytes" in asked:
                tables.append(bytes_table(name, shards, home, turns))
            if "images" in asked and name == "imagenette128":
                tables.append(image_table(name, shards))
    documents = Path(folder) / "gutenberg-en/train.jsonl.gz"
    if documents.exists() and "text" in asked:
        tables += text_tables(Shards(str(_converted("jsonl", documents, home / "text", 25))), home, turns)
    if not tables:
        raise UserError(f"{folder} has none of cifar10/train.zip, imagenette128/train.zip, gutenberg-en/train.jsonl.gz")
    print(f"Measured {about['date']}: {about['cpu']}, {about['cores']} cores, load {about['load']:.1f}.\n")
    print(", ".join(f"{name} {version}" for name, version in about["versions"].items()), end=".\n\n")
    print("\n\n".join("\n".join(markdown(table)) for table in tables))
    if json:
        rundir.write_json(Path(json), {"tables": [asdict(table) for table in tables], "measured": about})


def _converted(kind: str, source: Path, folder: Path, samples: int) -> Path:
    """Shards of a source, made once, as `dltrain shards` makes them."""
    if not (folder / "dltrain-shards.json").exists():
        shards_command.main([kind, str(source), str(folder), "--samples-per-shard", str(samples)])
    return folder


def bytes_table(name: str, shards: Shards, home: Path, turns: int) -> Table:
    from dltrain.data import bench_bytes

    sides, absent = bench_bytes.sides(shards, home)
    found = rates(sides, turns)
    extensions = [extension for extension in shards[0] if not extension.startswith("__")]
    each = sum(float(np.maximum(shards.lengths(extension), 0).mean()) for extension in extensions)
    goals = {"ours": 50.0, "ours, shuffled": 40.0}
    lines = []
    for side, rate in found.items():
        line = _line(side, rate, found["webdataset"], found["raw 1 MiB reads"])
        line.mb = line.cpu * each / 1e6
        if side in goals:
            line.goal = f">= {goals[side]:.0f} x webdataset"
            line.reached = line.over_webdataset >= goals[side]
            if side == "ours":
                line.goal += ", >= 20 % of raw"
                line.reached &= line.of_limit >= 0.2
        lines.append(line)
    notes = [f"{library}: cannot be imported or used here: {why}" for library, why in absent.items()]
    notes.append(
        "ours checks the CRC-32C of every byte, the others check none; MB are of the samples' members, per CPU second"
    )
    title = f"{name}: {len(shards):,} samples of {each:,.0f} bytes in {len(shards.urls)} shards, as bytes, 1 process"
    return Table(title, "samples/s", "raw", lines, notes)


def image_table(name: str, shards: Shards) -> Table:
    """Of many short turns: medians, also of the ratios within a turn."""
    from dltrain.data.bench_images import BATCH, image_speed

    found = image_speed(shards.urls, CROP, IMAGE_TURNS)  # type: ignore[arg-type]
    lines, nan = [], float("nan")
    for side, what in SIDES.items():
        rate = found[f"{side}_per_second"]
        lines.append(Line(what, nan, rate, nan, nan))
    ours = lines[0]
    ours.of_limit, ours.over_webdataset = found["ours_over_bare"][1], found["ours_over_webdataset"][1]
    ours.goal = ">= 95 % of bare, >= 1.5 x webdataset"
    ours.reached = ours.of_limit >= 0.95 and ours.over_webdataset >= 1.5
    quartiles = (
        f"ours / {side} " + " - ".join(f"{q:.2f}" for q in found[f"ours_over_{side}"])
        for side in SIDES
        if side != "ours"
    )
    notes = [f"of processor time; quartiles of {found['turns']} turns of a batch: {', '.join(quartiles)}"]
    title = f"{name}: decoded, random-resized-cropped to {CROP} pixels, batches of {BATCH}, 1 process"
    return Table(title, "images/s", "bare", lines, notes)


def text_tables(text: Shards, home: Path, turns: int) -> list[Table]:
    from dltrain.data import bench_text

    tokenizer, tokens = bench_text.made(text, home)
    found = rates(bench_text.token_sides(tokens, tokenizer), turns)
    beforehand = [_line(side, rate) for side, rate in found.items()]
    for line in beforehand:
        line.goal, line.reached = ">= 50 M", line.cpu >= 50e6
    found = rates(bench_text.text_sides(text, tokenizer), turns)
    live = [_line(side, rate, limit=found["tokenizer alone"]) for side, rate in found.items()]
    live[0].goal, live[0].reached = ">= 90 % of the tokenizer", live[0].of_limit >= 0.9
    row = f"shuffled rows of {bench_text.ROW:,} tokens, 1 core"
    sized = f"{int(tokens.lengths('npy').sum()) / 2e6:.1f} M tokens"
    return [
        Table(f"pre-tokenised text: {sized}, {row}", "tokens/s", "", beforehand, []),
        Table(f"text tokenised on the fly: BPE of {bench_text.VOCAB:,}, {row}", "tokens/s", "tokenizer", live, []),
    ]


def _line(what: str, found: Rates, webdataset: Rates | None = None, limit: Rates | None = None) -> Line:
    rate = found.per_second
    line = Line(what, max(rate), float(np.median(rate)), min(rate), found.cpu)
    if webdataset:
        line.over_webdataset = found.cpu / webdataset.cpu
    if limit:
        line.of_limit = found.cpu / limit.cpu
    return line


def measured() -> dict[str, Any]:
    """Where and when; `load` is the machine's of the last minute, before any of this."""
    versions = {}
    for library in LIBRARIES:
        try:
            versions[library] = metadata.version(library)
        except metadata.PackageNotFoundError:
            continue
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": rundir.cpu(),
        "cores": os.cpu_count(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "versions": versions,
        "command": f"dltrain {' '.join(sys.argv[1:])}",
    }


def markdown(table: Table) -> list[str]:
    """Its lines; columns that no side has are left out."""
    columns: dict[str, list[str]] = {
        "": [line.what for line in table.lines],
        f"{table.unit}, median": [f"{line.median:,.0f}" for line in table.lines],
        "least": [_known(line.least, f"{line.least:,.0f}") for line in table.lines],
        "best": [_known(line.best, f"{line.best:,.0f}") for line in table.lines],
        "per CPU second": [_known(line.cpu, f"{line.cpu:,.0f}") for line in table.lines],
        "MB": [_known(line.mb, f"{line.mb:,.0f}") for line in table.lines],
        "x webdataset": [_known(line.over_webdataset, f"{line.over_webdataset:.3g}") for line in table.lines],
        f"of {table.limit}": [_known(line.of_limit, f"{line.of_limit:.1%}") for line in table.lines],
        "goal": [line.goal for line in table.lines],
        "reached": ["" if line.reached is None else "yes" if line.reached else "NO" for line in table.lines],
    }
    columns = {name: cells for name, cells in columns.items() if any(cells)}
    wide = {name: max(map(len, [name, *cells])) for name, cells in columns.items()}
    lines = [f"**{table.title}**", ""]
    lines.append("| " + " | ".join(f"{name:{wide[name]}}" for name in columns) + " |")
    lines.append("|" + "|".join("-" * (wide[name] + 2) for name in columns) + "|")
    for row in range(len(table.lines)):
        lines.append("| " + " | ".join(f"{cells[row]:{wide[name]}}" for name, cells in columns.items()) + " |")
    return [*lines, *([""] if table.notes else []), *(f"{note}." for note in table.notes)]


def _known(value: float, text: str) -> str:
    return "" if np.isnan(value) else text
