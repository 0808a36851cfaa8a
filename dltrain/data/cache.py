"""What can be made again lives in the cache folder, and appears there only whole."""

import fcntl
import os
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dltrain.errors import UserError
from dltrain.files import sync


def cache_dir() -> Path:
    """`$DLTRAIN_CACHE`, or `$XDG_CACHE_HOME/dltrain`, or `~/.cache/dltrain`. It need not exist yet."""
    if own := os.environ.get("DLTRAIN_CACHE"):
        return Path(own).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser().absolute() / "dltrain"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A temporary name beside `path` to write to: it becomes `path` when the block ends, or vanishes on an error."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    temp = Path(name)
    try:
        yield temp
        temp.chmod(0o644)  # mkstemp's 0o600 would shut out the colleagues who share the folder
        sync(temp)
        temp.rename(path)
        sync(path.parent)
    finally:
        temp.unlink(missing_ok=True)


def built(folder: Path, build: Callable[[Path], None]) -> Path:
    """`folder`, filled by `build(empty folder)` on first use.

    However many processes of a machine ask at once, one builds and the others wait; a build that is killed leaves
    nothing under this name. UserError where the disk does not allow it.
    """
    if folder.is_dir():
        return folder
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with open(folder.parent / f".{folder.name}.lock", "w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not folder.is_dir():
                with tempfile.TemporaryDirectory(
                    prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
                ) as name:
                    temp = Path(name, "new")
                    temp.mkdir()
                    build(temp)
                    for path in temp.iterdir():
                        sync(path)
                    try:
                        temp.rename(folder)
                    except OSError:
                        if not folder.is_dir():  # or another machine was first, where locks do not reach
                            raise
                sync(folder.parent)
    except OSError as error:
        raise UserError(
            f"cannot write {folder}: {error.strerror or error}; free the disk or set DLTRAIN_CACHE to another folder"
        ) from error
    return folder
