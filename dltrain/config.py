"""The dataclass is the command line: base fields, presets, and what cannot be. The only importer of tyro."""

import dataclasses
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from dltrain import signals
from dltrain.errors import UserError

Strategy = Literal["auto", "single", "ddp", "fsdp", "hybrid", "zero1", "zero2", "zero3"]
OnBad = Literal["stop", "skip", "rollback"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What every command line of a recipe has; enough for a study, which is a grid of small things and not one run."""

    out: str = ""  # run directory; empty: runs/RECIPE-PRESET
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """What every recipe has that trains a model. A recipe's own dataclass adds its knobs."""

    steps: int = 1000  # optimizer steps
    batch: int = 32  # rows per optimizer step, over all ranks
    micro_batch: int = 0  # rows per forward; 0: all rows of a lane
    lanes: int = -1  # fixed parts of a step; -1: the first launch's world size; 0: the backend's own reduction
    strategy: Strategy = "auto"  # auto: what the launcher asks for, else ddp on several processes
    precision: Precision = "auto"  # auto: what the launcher asks for, else fp32
    clip: float = 1.0  # gradient norm; 0: no clipping
    remat: Literal["none", "selective", "full"] = "none"  # activations recomputed in backward
    compile: bool = False  # torch.compile each unit
    workers: int = 0  # data processes per rank
    log_every: int = 10  # steps
    eval_every: int = 0  # steps; 0: at the end
    save_every: int = 0  # steps; 0: at the end
    save_async: bool = False  # write checkpoints while training goes on
    keep: int = 2  # newest checkpoints kept
    on_bad: OnBad = "stop"  # what follows a step that is not finite, or a spike; rollback leaves out its data
    spike: float = 0.0  # standard deviations over the last good losses that make a spike; 0: none is one
    rollbacks: int = 3  # at most, in a run
    hang_exit: int = 300  # seconds that a hang is given to move, once it is named; then all leave with code 70
    check_replicas: int = 0  # steps between two comparisons of the copies of the weights, bit for bit; 0: never
    wandb: str = ""  # Weights & Biases project; empty: off
    debug: bool = False  # a checklist instead of a run: one process, deterministic, a minute


S = TypeVar("S", bound=Settings)
C = TypeVar("C", bound=Config)

# These may differ from one launch of a run to the next. All else decides the numbers and belongs to the run.
FREE = {"out", "steps", "strategy", "remat", "workers", "log_every", "eval_every", "save_every", "save_async", "keep"}
FREE |= {"wandb", "debug", "lanes", "on_bad", "spike", "rollbacks"}
FREE |= {"hang_exit", "check_replicas"}


def numbers(cfg: Config) -> dict[str, Any]:
    """The fields that decide a run's numbers; `lanes` is kept beside them by the run directory."""
    return {k: v for k, v in dataclasses.asdict(cfg).items() if k not in FREE}


def digest(fields: Mapping[str, Any]) -> str:
    """A short hash of JSON-able fields."""
    return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()[:12]


def recipe_name(cfg: Settings) -> str:
    """The stem of the file that defines the recipe's Config."""
    return Path(getattr(sys.modules[type(cfg).__module__], "__file__", None) or "recipe").stem


def dress(config: type[C], fields: Mapping[str, Any]) -> C:
    """A config from the JSON that a run directory keeps; fields that are no longer known are left out."""
    known = {f.name: f.default for f in dataclasses.fields(config)}
    values: dict[str, Any] = {
        k: tuple(v) if isinstance(known[k], tuple) else v for k, v in fields.items() if k in known
    }
    return config(**values)


def conflicts(cfg: Config, world: int, local_world: int) -> list[str]:
    """Every impossible combination of a resolved configuration, each with its numbers."""
    found: list[str] = []

    def refuse(when: bool, what: str) -> None:
        if when:
            found.append(what)

    for name, least in {
        "steps": 1,
        "batch": 1,
        "micro_batch": 0,
        "log_every": 1,
        "eval_every": 0,
        "save_every": 0,
    }.items():
        refuse(getattr(cfg, name) < least, f"{name} ({getattr(cfg, name)}) must be at least {least}")
    for name in ("keep", "workers", "clip", "hang_exit", "check_replicas"):
        least = 1 if name == "keep" else 0
        refuse(getattr(cfg, name) < least, f"{name} ({getattr(cfg, name)}) must be at least {least}")
    lanes = cfg.lanes or world
    refuse(cfg.batch > 0 and cfg.batch % lanes != 0, f"batch ({cfg.batch} rows) must be a multiple of lanes ({lanes})")
    rows = cfg.batch // lanes
    refuse(
        cfg.micro_batch > 0 and cfg.batch % lanes == 0 and rows % cfg.micro_batch != 0,
        f"rows of a lane ({cfg.batch} / {lanes} lanes = {rows}) must be a multiple of micro_batch ({cfg.micro_batch})",
    )
    refuse(cfg.strategy == "single" and world > 1, f"strategy single is one process, and {world} were started: use ddp")
    zero = cfg.strategy.startswith("zero")
    refuse(
        cfg.check_replicas > 0 and cfg.strategy not in ("ddp", "hybrid"),
        f"check_replicas compares copies, and there are none under {cfg.strategy}: ddp and hybrid have them",
    )
    refuse(zero and cfg.remat == "selective", f"remat selective is not offered under {cfg.strategy}: use full")
    refuse(zero and cfg.precision == "fp16", f"fp16 is not offered under {cfg.strategy}: use bf16")
    refuse(zero and cfg.on_bad != "stop", f"on_bad {cfg.on_bad} is not offered under {cfg.strategy}: use stop, or fsdp")
    refuse(
        cfg.precision == "fp16" and cfg.on_bad == "skip", "fp16 skips what overflows by itself: use on_bad stop or bf16"
    )
    refuse(
        cfg.on_bad == "rollback" and cfg.save_every == 0,
        "on_bad rollback goes back to a checkpoint: give --save_every, in steps",
    )
    refuse(
        zero and lanes % world != 0, f"{cfg.strategy} needs lanes ({lanes}) to be a multiple of the processes ({world})"
    )
    refuse(
        cfg.strategy == "hybrid" and (local_world < 2 or world % local_world != 0),
        f"hybrid shards within a node: each needs the same number of processes, over 1; here {local_world} of {world}",
    )
    refuse(cfg.debug and world > 1, f"--debug is one process, and {world} were started: start it with python")
    return found


def settle(
    cfg: C, world: int, local_world: int, before: Mapping[str, Any], env: Mapping[str, str] = os.environ
) -> tuple[C, int]:
    """Settle auto and -1, from the run's own past (`before`: its recorded fields, {} for a new run) where it has one.

    Returns the config and the number of CPU threads, which belongs to the run too, since it changes the bits.

    Raises:
        UserError: for all conflicts at once, with the numbers.
    """
    if cfg.strategy == "auto":
        cfg = dataclasses.replace(cfg, strategy="ddp" if world > 1 else "single")
    if cfg.precision == "auto":
        cfg = dataclasses.replace(cfg, precision="fp32")
    threads = int(env.get("DLTRAIN_THREADS", before.get("threads", 1)))
    lanes = before.get("lanes", -1) if cfg.lanes < 0 else cfg.lanes
    grown = 0 < lanes < world
    if lanes < 0 or grown:
        lanes = next((n for n in range(world, cfg.batch + 1) if cfg.batch % n == 0), world)
    cfg = dataclasses.replace(cfg, lanes=lanes)
    found = conflicts(cfg, world, local_world)
    now = json.loads(json.dumps(numbers(cfg))) | {"threads": threads} | ({} if grown else {"lanes": lanes})
    if differ := [f"{k} is {before[k]} there, {v} now" for k, v in now.items() if before.get(k, v) != v]:
        found.append(f"{cfg.out} is a run of another configuration ({'; '.join(differ)}): use another --out")
    if found:
        raise UserError("; ".join(found))
    return cfg, threads


def parse(config: type[S], presets: Mapping[str, S], recipe: str, argv: list[str], description: str = "") -> S:
    """`[PRESET] --field value ...` -> a config; the first preset is the default.

    Raises:
        UserError: for a preset that does not exist.
    """
    import tyro

    name, rest = next(iter(presets)), argv
    if argv and not argv[0].startswith("-"):
        name, rest = argv[0], argv[1:]
    if name not in presets:
        raise UserError(f"no preset {name!r} in {recipe}: choose one of {', '.join(presets)}")
    default = presets[name]
    if not default.out:
        default = dataclasses.replace(default, out=f"runs/{recipe}-{name}")
    usage = (
        f"{description}\n\nPresets: {', '.join(presets)} (now: {name}). `{recipe}.py PRESET --help` shows its values."
    )
    return tyro.cli(config, default=default, args=rest, description=usage, prog=f"{recipe}.py [PRESET]")


def answer_help(config: type[S], presets: Mapping[str, S]) -> None:
    """Where the command line asks for --help: print it and exit. A recipe calls this before it imports torch, and from
    here on signals are noted."""
    if issubclass(config, Config):
        signals.listen()
    if {"-h", "--help"} & set(sys.argv[1:]):
        cli(lambda cfg: None, config, presets)


def cli(
    main: Callable[[Any], Any],
    config: type[S],
    presets: Mapping[str, S] | None = None,
    claim: Callable[[Any], None] | None = None,
) -> None:
    """Run a recipe: read its command line, call `main`, turn a user's mistake into one line and exit code 2.

    The preset "claim" is not one run but what `claim` makes of several; its --debug is that of one.
    """
    module = sys.modules[config.__module__]
    recipe = Path(module.__file__ or "recipe").stem
    if issubclass(config, Config):
        signals.listen()
    try:
        described = (module.__doc__ or "").split("\n")[0]
        cfg = parse(config, presets or {"default": config()}, recipe, sys.argv[1:], described)
        (claim if claim and sys.argv[1:2] == ["claim"] and not getattr(cfg, "debug", False) else main)(cfg)
    except UserError as error:
        if not error.told:
            print(f"{recipe}: {error}", file=sys.stderr, flush=True)
        leave(2)
    except KeyboardInterrupt:
        print(f"\n{recipe}: interrupted; the same command goes on from the last checkpoint", file=sys.stderr)
        leave(130)


def leave(code: int) -> None:
    """Exit at once: other ranks may hold this one's threads in a collective that can no longer end."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
