"""One checkpoint for every strategy: full tensors by name, sharded on disk, published by one rename.

A checkpoint is a folder `step-00001000/` with torch.distributed.checkpoint's files, `state.json` (step, data position,
...) and `manifest.json`, written last, with size and SHA-256 of every file. It is written as `.step-00001000.tmp/`,
fsynced, then renamed: what has its final name is whole, or the manifest tells which file is not.
"""

import errno
import hashlib
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dltrain.errors import UserError
from dltrain.files import sync, write_atomic

FORMAT = 1
warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # DCP: that one process is one process


def save(
    folder: Path,
    step: int,
    tensors: dict[str, Tensor],
    info: dict[str, Any],
    *,
    keep: int,
    group: dist.ProcessGroup | None = None,
    published: Callable[[Path], None] = lambda path: None,
    background: bool = False,
) -> threading.Thread | None:
    """Write and publish a checkpoint; every rank of `group` (a CPU group; None: one process) calls it.

    Tensors are DTensors, or plain ones that are the same on every rank that has them. With `background` they are
    copied, and a thread does the rest: join it before the next save.

    Raises:
        UserError: when it cannot be written (no space, read-only). Nothing that was saved before is touched.
    """
    temp, final = folder / f".step-{step:08d}.tmp", folder / f"step-{step:08d}"
    first = _rank(group) == 0

    def make() -> None:
        if first:
            shutil.rmtree(temp, ignore_errors=True)
            temp.mkdir(parents=True)

    def digests() -> dict[str, Any]:
        return {p.name: _digest(p) for p in sorted(temp.iterdir()) if _owner(p.name) == _rank(group)}

    def publish(files: dict[str, Any]) -> None:
        if not first:
            return
        state = json.dumps({"format": FORMAT, "step": step, **info}, indent=1).encode()
        write_atomic(temp / "state.json", state)
        files["state.json"] = {"bytes": len(state), "sha256": hashlib.sha256(state).hexdigest()}
        write_atomic(temp / "manifest.json", json.dumps(files, indent=1, sort_keys=True).encode())
        sync(temp)
        if final.exists():  # an unusable one of the same step
            shutil.rmtree(final)
        os.rename(temp, final)
        sync(folder)
        published(final)
        for old in [path for path in steps(folder) if path.name <= final.name][:-keep]:  # a later one was skipped
            shutil.rmtree(old, ignore_errors=True)

    def together(work: Callable[[], Any]) -> list[Any]:
        """Every rank does its part; if one cannot, all raise the same error and the half-written folder goes away."""
        result, failure = None, 0
        try:
            result = work()
        except (Exception, dcp.CheckpointException) as error:  # DCP's is not an Exception
            if (cause := _os_error(error)) is None:
                raise
            failure = cause.errno or errno.EIO
        everyone = _gather((result, failure), group)
        if failed := [code for _, code in everyone if code]:
            if first:
                shutil.rmtree(temp, ignore_errors=True)
            raise _explain(step, folder, failed[0])
        return [result for result, _ in everyone]

    together(make)
    options: dict[str, Any] = {"checkpoint_id": temp, "process_group": group, "no_dist": group is None}
    future: Any = dcp.async_save(tensors, **options) if background else None

    def write_tensors() -> None:
        if future is None:
            dcp.save(tensors, **options)
        else:
            future.result()

    def write() -> None:
        together(write_tensors)
        files = {name: digest for part in together(digests) for name, digest in part.items()}
        together(lambda: publish(files))

    if not background:
        write()
        return None
    thread = _Thread(write)
    thread.start()
    return thread


def steps(folder: Path) -> list[Path]:
    """Published checkpoints, oldest first."""
    return sorted(p for p in folder.glob("step-*") if p.is_dir())


def newest(folder: Path, skipped: Callable[[Path, str], None]) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole checkpoint and its state; `skipped` is told of every newer one, and why it cannot be used."""
    for path in reversed(steps(folder)):
        if reason := damage(path):
            skipped(path, reason)
            continue
        return path, json.loads((path / "state.json").read_bytes())
    return None


def damage(path: Path) -> str:
    """What is wrong with a checkpoint, in words that name the file; empty if it is whole."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        if not isinstance(manifest, dict) or not {"state.json", ".metadata"} <= set(manifest):
            return "manifest.json does not list the files of a checkpoint"
        for name, want in manifest.items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != want["bytes"]:
                return f"{name} has {size} bytes instead of {want['bytes']}"
            if _digest(path / name)["sha256"] != want["sha256"]:
                return f"{name} does not have the bytes that were written (SHA-256 differs)"
        if json.loads((path / "state.json").read_bytes())["format"] != FORMAT:
            return f"state.json is of another format than {FORMAT}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, OSError) as error:
        return f"manifest.json or state.json cannot be read ({error})"
    return ""


def load(path: Path, tensors: dict[str, Tensor], group: dist.ProcessGroup | None = None) -> None:
    """Fill `tensors` (plain or DTensor, of this launch's layout) in place from a checkpoint of any layout.

    Raises:
        UserError: for a tensor that the checkpoint lacks or has in another shape.
    """
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    for name, tensor in tensors.items():
        have = getattr(metadata.get(name), "size", None)
        if have != tensor.shape:
            there = "is not in it" if have is None else f"has shape {tuple(have)} in it"
            raise UserError(f"{path} is of another model: {name} {tuple(tensor.shape)} {there}; use another --out")
    dcp.load(tensors, checkpoint_id=path, process_group=group, no_dist=group is None)


def read(path: Path, prefix: str = "model/") -> dict[str, Tensor]:
    """The full tensors under `prefix` of a checkpoint, on the CPU, in one process; names without the prefix."""
    metadata = dcp.FileSystemReader(path).read_metadata().state_dict_metadata
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in metadata.items()
        if name.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(tensors, checkpoint_id=path, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


class _Thread(threading.Thread):
    """A thread whose error comes out at join()."""

    def __init__(self, work: Callable[[], None]):
        super().__init__(name="checkpoint")
        self.work, self.error = work, None

    def run(self) -> None:
        try:
            self.work()
        except BaseException as error:
            self.error: BaseException | None = error

    def join(self, timeout: float | None = None) -> None:
        super().join(timeout)
        if self.error is not None:
            raise self.error


def _explain(step: int, folder: Path, code: int) -> UserError:
    have = [p.name for p in steps(folder)]
    rest = f"the newest checkpoint is {have[-1]}" if have else "there is no earlier checkpoint"
    advice = "free some space" if code in (errno.ENOSPC, errno.EDQUOT) else "make the folder writable"
    return UserError(
        f"step {step} could not be saved in {folder}: {os.strerror(code)}; {rest}; "
        f"{advice} and run the same command again"
    )


def _os_error(error: BaseException | None) -> OSError | None:
    """The operating system's error in a chain of causes, or inside what DCP gathered from the ranks."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error
        for failure in getattr(error, "failures", {}).values():
            if found := _os_error(failure[0]):
                return found
        if type(error).__name__ == "RuntimeError" and "PytorchStreamWriter" in str(error):  # how torch.save says it
            return OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        error = error.__cause__ or error.__context__
    return None


def _gather(value: Any, group: dist.ProcessGroup | None) -> list[Any]:
    if group is None:
        return [value]
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, value, group=group)
    return everyone


def _rank(group: dist.ProcessGroup | None) -> int:
    return 0 if group is None else dist.get_rank(group)


def _owner(name: str) -> int:
    """DCP's files are __RANK_INDEX.distcp; rank 0 has the rest."""
    return int(name.split("_")[2]) if name.startswith("__") else 0


def _digest(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        return {"bytes": path.stat().st_size, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
