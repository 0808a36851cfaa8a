"""dltrain chaos: harm runs of a recipe in ways drawn from a seed, and compare each to the bit with one left alone."""

import argparse
import shutil
import sys
import tempfile
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from dltrain import rundir
from dltrain.chaos import corruption, judge, runner
from dltrain.chaos.plan import Fault, Launch, Round, listed, rounds
from dltrain.chaos.runner import Ended, Prey
from dltrain.commands.claims import recipes
from dltrain.errors import UserError

ABOUT = """Runs RECIPE PRESET (bert_pretrain debug, saving every third step) under faults. Other flags are handed on to
the recipe. Exit code 1 if a run differs by one bit from an undisturbed one, lost more than one interval between
checkpoints, or did not keep a promise of its kind of fault."""
DEFAULT = ("bert_pretrain", "debug", "--save-every", "3", "--eval-every", "4")
KINDS = ("kills", "preemptions", "errors")
MOST_LAUNCHES = 8  # of one run


def main(argv: list[str]) -> None:
    """`dltrain chaos ARGV`. UserError for a mistake; exits with 1 where something shows."""
    parser = argparse.ArgumentParser("dltrain chaos", description=ABOUT)
    parser.add_argument("--kills", type=int, default=0, help="runs to kill")
    parser.add_argument("--preemptions", type=int, default=0, help="runs to ask to stop, by signals")
    parser.add_argument("--errors", type=int, default=0, help="runs whose disk fails")
    parser.add_argument("--corruptions", type=int, default=0, help="times to harm a checkpoint")
    parser.add_argument("--faults", default="", help="HOW:WHO:PLACE[:COUNT],... instead of faults drawn")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--strategies", default="ddp,fsdp,zero2", help="in the mix")
    parser.add_argument("--worlds", default="1,2,3", help="numbers of processes, drawn for each launch (zero: 2)")
    parser.add_argument("--json", type=Path, help="where to write the summary")
    args, rest = parser.parse_known_args(argv)
    recipe, *arguments = rest or DEFAULT
    path = next((p for p in (Path(recipe), *recipes().rglob(f"{Path(recipe).stem}.py")) if p.is_file()), None)
    if path is None:
        raise UserError(f"no recipe {recipe!r}: give a file, or the name of one in {recipes()}")
    strategies, worlds = tuple(args.strategies.split(",")), tuple(map(int, args.worlds.split(",")))
    drawn = {kind: rounds(kind, getattr(args, kind), args.seed, strategies, worlds) for kind in KINDS}
    if args.faults:
        for each in listed(args.faults):
            how = each.launches[0].fault.how if each.launches[0].fault else ""
            kind = "kills" if how == "SIGKILL" else "preemptions" if how.startswith("SIG") else "errors"
            drawn[kind].append(each)
    if not any(drawn.values()) and not args.corruptions:
        raise UserError("nothing to do: give --kills N, --preemptions N, --errors N, --corruptions N or --faults LIST")
    folder = Path(tempfile.mkdtemp(prefix="dltrain-chaos-"))
    chaos = Chaos(Prey(path.resolve(), tuple(arguments)), folder)
    asked = " ".join(["dltrain chaos", *argv])
    summary: dict[str, Any] = {
        "command": asked,
        "date": f"{datetime.now(UTC):%Y-%m-%d}",
        "recipe": " ".join(rest or DEFAULT),
    }
    failures = chaos.everything(drawn, args.corruptions, args.seed)
    summary |= {"counts": dict(sorted(chaos.counts.items())), "found": chaos.found, "failures": failures}
    summary |= {"seconds": round(time.monotonic() - chaos.began, 1), "environment": rundir.environment()[0]}
    for name, value in [*summary["counts"].items(), *((k, summary[k]) for k in ("seconds", "found"))]:
        print(f"{name:44} {value}")
    if args.json:
        rundir.write_json(args.json, summary)
    if failures:
        print(f"{len(failures)} failed; what is left of them is in {folder}:", *failures, sep="\n  ", file=sys.stderr)
        sys.exit(1)
    shutil.rmtree(folder)
    print("nothing shows")


class Chaos:
    """What is known while it goes on: undisturbed runs by their strategy's bits, counts, seconds."""

    def __init__(self, prey: Prey, folder: Path):
        self.prey, self.folder = prey, folder
        self.began = time.monotonic()
        self.counts: Counter[str] = Counter()
        self.found: dict[str, Any] = {}
        self.calm: dict[str, tuple[Path, Ended]] = {}
        self.struck = False  # whether a fault happened in the last run

    def everything(self, drawn: dict[str, list[Round]], corruptions: int, seed: int) -> list[str]:
        zero = any(each.last.strategy.startswith("zero") for some in drawn.values() for each in some)
        runner.preload(zero)
        failures: list[str] = []
        total, number = sum(map(len, drawn.values())), 0
        for kind, some in drawn.items():
            for i, each in enumerate(some):
                number += 1
                try:
                    words = self.one(kind, each, self.folder / f"{kind}-{i:04d}")
                    if not words and not self.struck:
                        words = self.one(kind, each.sooner(), self.folder / f"{kind}-{i:04d}")
                    if not words and not self.struck:
                        words = "the fault found no place to happen"
                except UserError as error:  # a launch that did not end, for one
                    words = str(error)
                if words:
                    failures.append(f"{kind}-{i:04d} ({'; '.join(str(x.fault) for x in each.launches)}): {words}")
                now = time.monotonic() - self.began
                print(f"\r{number} of {total} runs, {len(failures)} failed, {now:.0f} s", end="", file=sys.stderr)
        if total:
            print(file=sys.stderr)
        if corruptions:
            failures += self.corrupted(corruptions, seed)
        return failures

    def undisturbed(self, launch: Launch) -> tuple[Path, Ended]:
        """The run that one of this kind must equal: on one process, but for ZeRO, whose bits are of its processes."""
        zero = launch.strategy.startswith("zero")
        alone = Launch(launch.strategy, launch.world) if zero else Launch("single", 1)
        if (name := f"{alone.strategy}-{alone.world}") not in self.calm:
            out = self.folder / f"calm-{name}"
            ended = runner.run(self.prey, out / "run", alone, out / "0", 0.0)
            if set(ended.codes) != {0}:
                raise UserError(f"the undisturbed run failed with exit codes {ended.codes}: see {ended.log}")
            self.calm[name] = out / "run", ended
        return self.calm[name]

    def one(self, kind: str, each: Round, folder: Path) -> str:
        """A run and its faults; what is wrong with it afterwards, empty if nothing is."""
        out, launches, self.struck = folder / "run", [], False
        calm, calmly = self.undisturbed(each.last)
        for number in range(MOST_LAUNCHES):
            launch = each.launches[number] if number < len(each.launches) else each.last
            ended = runner.run(self.prey, out, launch, folder / str(number), calmly.seconds)
            launches.append(ended)
            self.counts[f"launches under {launch.strategy} on {launch.world}"] += 1
            if launch.fault and ended.struck:
                self.struck = True
                self._count(kind, launch.fault)
                if words := self._promise(kind, ended, out):
                    return f"launch {number}: {words}: see {ended.log}"
            elif set(ended.codes) != {0}:
                return f"launch {number} was not harmed, and its exit codes are {ended.codes}: see {ended.log}"
            if number >= len(each.launches) and set(ended.codes) == {0}:
                break
        else:
            return f"not done after {MOST_LAUNCHES} launches"
        interval = max(rundir.read_json(out / "config.json")["config"]["save_every"], 1)
        lost = judge.lost(launches)
        self.counts["steps taken again"] += lost
        if lost > interval * (1 + any(x.save_async for x in each.launches)):
            return f"{lost} steps were lost, and checkpoints are {interval} apart"
        rows = judge.rows_of(calmly.notes)
        words = runner.call(lambda: judge.differs(calm, rows, out, launches))
        if words or self.struck:
            self.counts[f"runs {'that differ' if words else 'identical'} after {kind}"] += 1
        if not words:
            shutil.rmtree(folder)
        return words

    def _count(self, kind: str, fault: Fault) -> None:
        self.counts[f"{kind}"] += 1
        self.counts[f"{kind}: {fault.how} of {fault.who}"] += 1
        self.counts[f"{kind}: at {fault.place}"] += 1

    def _promise(self, kind: str, ended: Ended, out: Path) -> str:
        """What a fault of this kind must leave, besides the bits; empty if it did."""
        if kind == "preemptions":
            step = runner.call(lambda: judge.saved(out))
            if (done := judge.done_of(ended.notes)) and step != done:
                return f"step {done} was done, and the newest checkpoint is of step {step}"
            self.counts["preemptions that saved the current step"] += 1
            if set(ended.codes) - {0, 75}:
                return f"exit codes {ended.codes} instead of 75"
        elif kind == "errors" and 2 not in ended.codes:
            return f"exit codes {ended.codes} instead of 2"
        return ""

    def corrupted(self, n: int, seed: int) -> list[str]:
        out = self.folder / "to-corrupt"
        ended = runner.run(self.prey, out / "run", Launch("fsdp", 2), out / "0", 0.0)
        if set(ended.codes) != {0}:
            raise UserError(f"the undisturbed run failed with exit codes {ended.codes}: see {ended.log}")
        self.found["corruptions"] = runner.call(lambda: corruption.corrupt(out / "run", out / "harmed", n, seed))
        self.found["verification"] = runner.call(lambda: corruption.cost(out / "cost"))
        self.counts["corruptions"], self.counts["corruptions detected"] = n, self.found["corruptions"]["detected"]
        return [f"corruption {words}" for words in self.found["corruptions"]["missed"]]
