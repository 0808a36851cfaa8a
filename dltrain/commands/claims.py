"""dltrain claims: run what recipes claim, record what was measured, and keep the table of recipes/README.md.

recipes/results/RECIPE.json is the claim.json of the last time (see dltrain.claim) with the command, date and seconds.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dltrain import rundir
from dltrain.commands.trained import recipe_of, recipes
from dltrain.errors import UserError

BEGIN, END = "<!-- dltrain claims writes from here -->", "<!-- to here -->"
HEAD = """| recipe | figure | paper | measured | must be | shown | seeds (tuned on) | commit | on | minutes |
| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |
"""
ABOUT = """Runs each recipe's preset "claim" in a process of its own, from the beginning, in runs/claims; writes
recipes/results/RECIPE.json and the table in recipes/README.md. Exit code 1 where a claim is not shown."""


def main(argv: list[str]) -> None:
    """`dltrain claims ARGV`. UserError for a mistake; exits with 1 where a claim is not shown, or its run failed."""
    parser = argparse.ArgumentParser("dltrain claims", description=ABOUT)
    parser.add_argument("recipe", nargs="*", help="by default all that have the preset claim")
    parser.add_argument("--seed", type=int, default=0, help="added to every seed; 0 by default")
    args = parser.parse_args(argv)
    folder = recipes()
    known = with_claims(folder)
    if unknown := [name for name in args.recipe if name not in known]:
        raise UserError(f"no claim of {', '.join(unknown)}: there are {', '.join(known)}")
    here = rundir.environment()[0]  # now: the records change the commit's files
    table(folder)  # a README without markers is a mistake now, not after the work
    lacking = [name for name in args.recipe or known if not measure(folder, known[name], args.seed, here)]
    table(folder)
    if lacking:
        print(f"not shown: {', '.join(lacking)}", file=sys.stderr)
        sys.exit(1)


def with_claims(folder: Path) -> dict[str, Path]:
    """The recipes below `folder` that have a preset "claim", by name."""
    return {p.stem: p for p in sorted(folder.rglob("*.py")) if "def claim(" in p.read_text()}


def measure(folder: Path, recipe: Path, shift: int, here: dict[str, Any]) -> bool:
    """Run the claim and keep its record, shown or not; False where it is not shown, or there is none."""
    now, seed = datetime.now(UTC), recipe_of(str(recipe)).PRESETS["claim"].seed + shift
    out = Path("runs/claims") / f"{recipe.stem}-{seed}-{now:%Y%m%dT%H%M%S}"
    command = [sys.executable, str(recipe), "claim", "--seed", str(seed), "--out", str(out)]
    path = os.pathsep.join([str(folder.parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    print(f"\n=== {recipe.stem}, seed {seed}", flush=True)
    began = time.monotonic()
    jobs = "1" if here["gpus"] else str(here["cores"])  # a study's cells share a CPU's cores out
    env = {"DLTRAIN_JOBS": jobs} | os.environ | {"PYTHONPATH": path}
    code = subprocess.run(command, env=env, check=False).returncode
    seconds = round(time.monotonic() - began, 1)
    if code not in (0, 1) or not (out / "claim.json").exists():
        print(f"{recipe.stem}: exit code {code} and no figures", file=sys.stderr)
        return False
    asked = f"dltrain claims {recipe.stem}" + (f" --seed {shift}" if shift else "")
    about = {"command": asked, "date": f"{now:%Y-%m-%d}", "seconds": seconds}
    record = about | rundir.read_json(out / "claim.json")
    record["environment"] |= {k: here[k] for k in ("commit", "dirty")}
    (folder / "results").mkdir(exist_ok=True)
    rundir.write_json(folder / "results" / f"{recipe.stem}.json", record)
    return bool(record["shown"])


def table(folder: Path) -> None:
    """Write the records of all recipes between the markers of README.md."""
    readme = folder / "README.md"
    text = readme.read_text() if readme.exists() else f"{BEGIN}\n{END}\n"
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"{readme} lacks the line {BEGIN if not begin else END!r}: put it back where the table belongs")
    records = [json.loads(path.read_bytes()) for path in sorted((folder / "results").glob("*.json"))]
    rows = "".join(row for record in records for row in lines(record))
    rundir.write_atomic(readme, f"{before}{BEGIN}\n\n{HEAD}{rows}\n{END}{after}".encode())


def lines(record: dict[str, Any]) -> list[str]:
    """A record's rows of the table; what all its figures share stands in the first."""
    where, found = record["environment"], []
    seeds = sorted({int(seed) for figure in record["figures"] for seed in figure["values"]})
    on = (
        where["gpus"][0] if where["gpus"] else f"{where['cpu']}, {where['threads']} thread{'s'[: where['threads'] > 1]}"
    )
    commit = f"{(where['commit'] or 'none')[:9]}{'+' if where['dirty'] else ''}"
    tuned = ", ".join(map(str, record["tuned_on"])) or "none"
    shared = [f"{', '.join(map(str, seeds))} ({tuned})", commit, on, f"{record['seconds'] / 60:.1f}"]
    for i, f in enumerate(record["figures"]):
        bound = f["bound"] + (" in the median" if f["of"] == "median" else "")
        cells = [record["recipe"] if i == 0 else "", f["name"], f["paper"], f["measured"], bound]
        cells += ["yes" if f["shown"] else "**no**", *(shared if i == 0 else [""] * len(shared))]
        found.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return found
