"""The run directory explains itself: what was run, from which source, where, and everything that it logged.

    config.json       recipe, resolved config and its hash      metrics.jsonl  a row per logged step, no clock in it
    command.txt       the first launch's command                speed.jsonl    what depends on the clock
    environment.json  versions, hardware, commit                events.jsonl   what happened when: starts, saves, ...
    diff.patch        uncommitted changes, if there were any    checkpoints/ tensorboard/ results.json report.html
    hang/             dossiers and stacks of a run that hung

JSON here is strict (RFC 8259), which has no NaN: non-finite floats are the strings "NaN", "Infinity", "-Infinity",
so `float(value)` reads every number back, bit for bit (Python writes the shortest digits that do).
"""

import errno
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from dltrain import __version__, files, slurm
from dltrain.config import digest
from dltrain.errors import UserError

_PACKAGES = ("torch", "deepspeed", "accelerate", "webdataset", "sentencepiece", "triton", "safetensors", "numpy")


@contextmanager
def saving(path: Path) -> Iterator[None]:
    """Around a write to `path`: a full disk (or quota), or one that fails, becomes a UserError that says so."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS):
            raise
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        said = "no space left on device" if full else os.strerror(error.errno).lower()
        advice = "free some" if full else "see to the disk"
        raise UserError(
            f"{path}: {said}; nothing already saved was lost: {advice} and run the same command again"
        ) from error


def require_space(out: Path, needed: int) -> None:
    """Raise UserError unless `needed` bytes are free where `out` is, or will be."""
    there = next(folder for folder in (out, *out.absolute().parents) if folder.exists())
    free = shutil.disk_usage(there).free
    if free < needed:
        mib = f"{needed / 2**20:,.1f} MiB are needed and {free / 2**20:,.1f} MiB are free"
        raise UserError(f"{out}: {mib}; free some, or choose another run directory with --out")


def write_atomic(path: Path, content: bytes) -> None:
    """Replace `path` by `content`, wholly or not at all, whenever the machine dies. Raises UserError on a full disk."""
    with saving(path):
        files.write_atomic(path, content)


def encode(value: Any, indent: int | None = None) -> str:
    """Strict JSON: tensors' and arrays' scalars as numbers, non-finite floats as strings, paths and others as text."""
    return json.dumps(plain(value), allow_nan=False, indent=indent)


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (encode(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """What `write_json` wrote. Raises UserError, naming the file, where it is absent or torn."""
    try:
        return json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except ValueError as error:
        raise UserError(f"{path}: not whole JSON ({error}); restore it, or delete it and run again") from None


def _row(line: bytes) -> dict[str, Any] | None:
    """One line of a .jsonl file; None if a crash tore it."""
    if not line.endswith(b"\n"):
        return None
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a .jsonl file, none if it does not exist; torn ones are left out."""
    if not path.exists():
        return []
    with path.open("rb") as file:
        return [row for line in file if (row := _row(line)) is not None]


def rewind(path: Path, step: int, rows: int | None = None) -> int:
    """Drop from `path` the rows after `step`, after the first `rows`, and torn ones; returns how many were dropped.

    A checkpoint of step s is published after the rows of step s are fsynced, so what this keeps is whole. It is a new
    file in any case: a launch that was superseded and still has the old one open writes where nobody reads.
    """
    if not path.exists():
        return 0
    with path.open("rb") as file:
        lines = file.readlines()
    kept = [line for line in lines if (row := _row(line)) is not None and row.get("step", step + 1) <= step]
    kept = kept[:rows]
    write_atomic(path, b"".join(kept))
    return len(lines) - len(kept)


def append_event(out: Path, kind: str, **fields: Any) -> None:
    """Append {"time": ISO 8601 in UTC, "kind": kind, **fields} to events.jsonl and fsync it."""
    path = out / "events.jsonl"
    line = encode({"time": datetime.now(UTC).isoformat(timespec="seconds"), "kind": kind, **fields}) + "\n"
    with saving(path), path.open("ab+") as file:
        if file.tell() and os.pread(file.fileno(), 1, file.tell() - 1) != b"\n":
            line = "\n" + line  # a crash tore the last one: leave it a line of its own
        file.write(line.encode())
        file.flush()
        os.fsync(file.fileno())


def describe(out: Path, *, recipe: str, config: dict[str, Any], command: list[str]) -> None:
    """Write what this run is into `out`, before the first step; called by one process.

    The files tell of the latest launch, but for command.txt, which keeps the first. Every launch is an event "start";
    a later one says which config fields and which parts of the environment changed, as [before, now].
    """
    with saving(out):
        (out / "checkpoints").mkdir(parents=True, exist_ok=True)
    found, patch = environment()
    asked = {"recipe": recipe, "hash": digest(plain(config)), "config": config}
    event: dict[str, Any] = {"command": shlex.join(command), "hash": asked["hash"]}
    if (out / "command.txt").exists():
        event["config"] = _changes(read_json(out / "config.json")["config"], config)
        event["environment"] = _changes(read_json(out / "environment.json"), found)
    write_json(out / "config.json", asked)
    write_json(out / "environment.json", found)
    if patch:
        write_atomic(out / "diff.patch", patch)
    else:
        (out / "diff.patch").unlink(missing_ok=True)
    if "config" not in event:
        write_atomic(out / "command.txt", f"{shlex.join(command)}\n".encode(errors="surrogateescape"))
    append_event(out, "start", **event, **slurm.facts(os.environ))


def _changes(before: dict[str, Any], now: dict[str, Any]) -> dict[str, list[Any]]:
    now = plain(now)
    return {key: [before.get(key), now.get(key)] for key in sorted(before | now) if before.get(key) != now.get(key)}


def environment() -> tuple[dict[str, Any], bytes]:
    """What environment.json holds, and diff.patch (empty: no change). Nothing in it names the machine or its user."""
    import torch

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    commit, patch = _source(Path(__file__).resolve())
    return {
        "python": platform.python_version(),
        "packages": {"dltrain": __version__} | {name: _version(name) for name in _PACKAGES},
        "cuda": torch.version.cuda,
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "threads": torch.get_num_threads(),  # of torch on a CPU: their number changes the bits
        "gpus": gpus,
        "commit": commit,
        "dirty": bool(patch) if commit else None,
    }, patch


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def cpu() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(errors="replace").splitlines() if cpuinfo.exists() else []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or platform.machine())


def _git(folder: Path, *arguments: str) -> bytes:
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, timeout=20, check=False).stdout


def _source(file: Path) -> tuple[str | None, bytes]:
    """Commit of the work tree that tracks `file`, and a patch of all that was changed in it since.

    The patch has new Python files too, which `git diff` alone would leave out.
    """
    try:
        root = Path(os.fsdecode(_git(file.parent, "rev-parse", "--show-toplevel").rstrip(b"\n")))
        if not _git(file.parent, "ls-files", file.name):  # no git, or a tree that merely holds our virtual environment
            return None, b""
        head = _git(root, "rev-parse", "--verify", "--quiet", "HEAD").decode().strip()
        new = _git(root, "ls-files", "--others", "--exclude-standard", "-z", "*.py").split(b"\0")[:-1]
        diff = ("diff", "--no-ext-diff", "--no-color")
        patches = [_git(root, *diff, "--no-index", "--", os.devnull, os.fsdecode(name)) for name in new]
        return head or None, _git(root, *diff, "HEAD") + b"".join(patches)
    except (OSError, subprocess.TimeoutExpired):
        return None, b""
