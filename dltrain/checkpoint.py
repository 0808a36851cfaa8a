"""One checkpoint for every strategy: full tensors by name, sharded on disk, published by one rename.

A checkpoint is a folder `step-00001000/` with torch.distributed.checkpoint's files, `state.json` (step, data position,
...) and `manifest.json`, written last, with size and CRC-32C (RFC 3720, appendix B.4) of every file and of itself. It
is written as `.step-00001000.TOKEN.tmp/`, fsynced, then renamed: what has its final name is whole, or the manifest
tells which file is not.

The bytes of the tensors are checked while they are loaded, by a thread, each rank its share of the files: before any
rank goes on, all know that all are as written. A damaged one is renamed `damaged-step-00001000`, and the one before it
is loaded over it.
"""

import contextlib
import errno
import json
import os
import shutil
import threading
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import crc32c
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dltrain.errors import UserError
from dltrain.files import sync, write_atomic

FORMAT = 2
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
    check: Callable[[], None] = lambda: None,
    token: int = 0,
) -> threading.Thread | None:
    """Write and publish a checkpoint; every rank of `group` (a CPU group; None: one process) calls it.

    Tensors are DTensors, or plain ones that are the same on every rank that has them. With `background` they are
    copied, and a thread does the rest: join it before the next save. `check` is called right before the rename, and
    `token` parts what this launch writes from what one that it superseded may still be writing (`fence.py`).
    The `keep` newest whole ones are kept.

    Raises:
        UserError: when it cannot be written (no space, read-only). Nothing that was saved before is touched.
    """
    temp, final = folder / f".step-{step:08d}.{token}.tmp", folder / f"step-{step:08d}"
    first = _rank(group) == 0

    def make() -> None:
        if first:
            for left_over in folder.glob(".step-*.tmp"):
                shutil.rmtree(left_over, ignore_errors=True)
            temp.mkdir(parents=True)

    def digests() -> dict[str, Any]:
        return {p.name: _digest(p) for p in sorted(temp.iterdir()) if _owner(p.name) == _rank(group)}

    def publish(files: dict[str, Any]) -> None:
        if not first:
            return
        state = json.dumps({"format": FORMAT, "step": step, **info}, indent=1).encode()
        write_atomic(temp / "state.json", state)
        files["state.json"] = {"bytes": len(state), "crc32c": crc32c.crc32c(state)}
        manifest = {"step": step, "files": files, "crc32c": crc32c.crc32c(_canonical(step, files))}
        write_atomic(temp / "manifest.json", json.dumps(manifest, indent=1, sort_keys=True).encode())
        sync(temp)
        check()
        if final.exists():  # an unusable one of the same step
            _remove(final)
        os.rename(temp, final)
        sync(folder)
        published(final)
        _prune(folder, final.name, keep)

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
    return _outside(path) or _inside(path)


def _outside(path: Path) -> str:
    """What can be seen without reading the tensors: all that is small, and the size of what is large."""
    try:
        manifest = json.loads((path / "manifest.json").read_bytes())
        files = manifest["files"]
        if crc32c.crc32c(_canonical(manifest["step"], files)) != manifest["crc32c"]:
            return "manifest.json does not have the bytes that were written"
        if path.name != f"step-{manifest['step']:08d}":
            return f"manifest.json is that of step {manifest['step']}"
        if not {"state.json", ".metadata"} <= set(files):
            return "manifest.json does not list the files of a checkpoint"
        for name, want in files.items():
            if not (path / name).exists():
                return f"{name} is missing"
            if (size := (path / name).stat().st_size) != want["bytes"]:
                return f"{name} has {size} bytes instead of {want['bytes']}"
        for name in ("state.json", ".metadata"):
            if _digest(path / name) != files[name]:
                return f"{name} does not have the bytes that were written (CRC-32C differs)"
        if json.loads((path / "state.json").read_bytes())["format"] != FORMAT:
            return f"state.json is of another format than {FORMAT}"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        return f"manifest.json or state.json cannot be read ({error})"
    return ""


def _inside(path: Path, rank: int = 0, world: int = 1) -> str:
    """Whether the tensors' files, of which this is one rank's share, have the bytes that were written."""
    files = json.loads((path / "manifest.json").read_bytes())["files"]
    for name in sorted(name for name in files if name.endswith(".distcp"))[rank::world]:
        try:
            if _digest(path / name) != files[name]:
                return f"{name} does not have the bytes that were written (CRC-32C differs)"
        except OSError as error:
            return f"{name} cannot be read ({error})"
    return ""


def restore(
    folder: Path,
    templates: Callable[[], dict[str, Tensor]],
    skipped: Callable[[Path, str], None],
    group: dist.ProcessGroup | None = None,
) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """The state of the newest whole checkpoint and its tensors, in `templates()`; None if none is whole.

    Every rank of `group` calls it. `skipped` is told, on each, of every checkpoint that is damaged, and why. Nothing
    was loaded where None is returned.

    Raises:
        UserError: for another model's checkpoint; if damage was found while loading and no other one is whole.
    """
    rank, world = _rank(group), 1 if group is None else dist.get_world_size(group)
    tensors: dict[str, Tensor] = {}
    names = _gather([path.name for path in steps(folder)], group)[0]
    for path in [folder / name for name in reversed(names)]:
        reason = _gather(_outside(path) if rank == 0 else "", group)[0]
        alone = path.name == names[0]  # then there is nothing to load over it: look first
        if not reason and alone:
            reason = _first(_gather(_inside(path, rank, world), group))
        if not reason:
            look = _Thread(lambda at=path: _inside(at, rank, world))
            failure: BaseException | None = None
            if not alone:
                look.start()
            tensors = tensors or templates()
            try:
                load(path, tensors, group)
            except (Exception, dcp.CheckpointException) as error:  # of damage, perhaps
                failure = error
            if not alone:
                look.join()
            reason = _first(_gather(look.found, group))
            if not reason and failure:
                raise failure
        if not reason:
            return json.loads((path / "state.json").read_bytes()), tensors
        skipped(path, reason)
        if rank == 0 and "cannot be read" not in reason:
            _set_aside(path)
    if tensors:
        raise UserError(f"no checkpoint in {folder} is whole: delete the folder, and the run begins anew")
    return None


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
    """A thread whose error comes out at join(); what its work returns is `found`."""

    def __init__(self, work: Callable[[], Any]):
        super().__init__(name="checkpoint")
        self.work, self.error, self.found = work, None, ""

    def run(self) -> None:
        try:
            self.found = self.work()
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


def _first(reasons: list[str]) -> str:
    return next(filter(None, reasons), "")


def _prune(folder: Path, newest: str, keep: int) -> None:
    """Remove what is older than the `keep` newest whole ones, up to `newest`: a later one was skipped."""
    whole = [path for path in steps(folder) if path.name <= newest and not _outside(path)]
    for path in steps(folder):
        if whole and path.name < whole[-keep:][0].name:
            _remove(path)


def _remove(path: Path) -> None:
    """Its name first, so that nothing half removed ever looks like a checkpoint."""
    old = path.with_name(f".{path.name}.old.tmp")
    shutil.rmtree(old, ignore_errors=True)
    os.rename(path, old)
    shutil.rmtree(old, ignore_errors=True)


def _set_aside(path: Path) -> None:
    """Keep a damaged one for who wants to look, where it counts for nothing."""
    aside = path.with_name(f"damaged-{path.name}")
    shutil.rmtree(aside, ignore_errors=True)
    with contextlib.suppress(OSError):  # a folder that cannot be written: then it is skipped again
        os.rename(path, aside)


def _canonical(step: int, files: dict[str, Any]) -> bytes:
    return json.dumps([step, files], sort_keys=True).encode()


def _digest(path: Path) -> dict[str, int]:
    crc, buffer = 0, bytearray(1 << 20)
    with open(path, "rb", buffering=0) as file:
        while n := file.readinto(buffer):
            crc = crc32c.crc32c(memoryview(buffer)[:n], crc)
        return {"bytes": file.tell(), "crc32c": crc}
