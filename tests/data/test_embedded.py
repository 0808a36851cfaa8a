"""The embedded corpus on a handful of modules, and the cache that holds it."""

import json
import multiprocessing
import time
from pathlib import Path

import pytest

from dltrain.data import embedded
from dltrain.data.cache import built, cache_dir, whole
from dltrain.data.shards import Shards
from dltrain.errors import UserError

CODE = '''"""Tools for {name}.

They are described here at some length, so that
the document is long enough to be kept:

- a first item,
  which goes on
- a second item
"""

def function(x):
    """Return the {name} of ``x``, or None where :class:`object` has no
    such thing.

    Args:
        x (int, optional): a number
            to look at

    >>> function(3)
    4

    ====  ====
    """
    def inner():
        """Nobody reads this docstring, which is inside a function."""

class Same:
    """This docstring is the same in every module and is kept only once."""
'''


def test_documents(tmp_path):
    root = tmp_path / "root"
    (root / "package" / "test").mkdir(parents=True)
    for name in ("b", "a", "package/c", "package/test/left_out"):
        (root / f"{name}.py").write_text(CODE.replace("{name}", name))
    (root / "bad.py").write_text("def (")
    for folder in ("one", "two"):
        embedded.write_docs(tmp_path / folder, {"lib.": root})
    shards = Shards(str(tmp_path / "one"))
    assert shards.fingerprint == Shards(str(tmp_path / "two")).fingerprint
    assert list(shards.keys())[:3] == ["lib/a/000", "lib/b/000", "lib/package/c/000"]
    text = shards[0]["txt"].decode()
    assert text.splitlines() == [
        "Tools for a.",
        "They are described here at some length, so that the document is long enough to be kept:",
        "- a first item, which goes on",
        "- a second item",
        "Return the a of ``x``, or None where :class:`object` has no such thing.",
        "Args:",
        "x (int, optional): a number to look at",
        "This docstring is the same in every module and is kept only once.",
    ]
    assert "only once" not in shards[1]["txt"].decode() and json.loads(shards[1]["json"]) == {"module": "lib.b"}
    assert len(shards) > 50  # Python's help topics
    assert all(len(shards[i]["txt"]) >= embedded.SHORTEST for i in range(len(shards)))


def test_a_module_is_cut_into_documents():
    docstrings = [f"Number {i}: " + "word " * 60 for i in range(20)]
    documents = list(embedded._documents(iter(docstrings), set()))
    assert len(documents) > 2 and all(len(document) <= embedded.LONG + 1 for document in documents)
    assert "".join(documents) == "".join(f"{embedded.clean(docstring)}\n" for docstring in docstrings)


def test_real_roots_have_documents():
    """The folders that `embedded_docs` looks in, without collecting them all."""
    import contextlib

    assert len(list(embedded._docstrings(Path(contextlib.__file__)))) > 10


def build_slowly(folder: Path) -> None:
    (folder.parent.parent / f"built-{time.monotonic_ns()}").touch()
    time.sleep(0.2)
    (folder / "file").write_text("whole")


def test_one_builds_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=built, args=(tmp_path / "made", build_slowly)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert (tmp_path / "made" / "file").read_text() == "whole"
    assert len(list(tmp_path.glob("built-*"))) == 1


def test_a_failed_build_leaves_nothing(tmp_path):
    def build(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise OSError(28, "No space left on device")

    with pytest.raises(UserError, match=r"cannot write .*made: No space left on device"):
        built(tmp_path / "made", build)
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]

    def write() -> None:
        with whole(tmp_path / "file") as temp:
            temp.write_text("half")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write()
    assert [path.name for path in tmp_path.iterdir()] == [".made.lock"]


def test_cache_dir(monkeypatch):
    monkeypatch.setenv("DLTRAIN_CACHE", "/x")
    assert cache_dir() == Path("/x")
    monkeypatch.delenv("DLTRAIN_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/y")
    assert cache_dir() == Path("/y/dltrain")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache_dir() == Path.home() / ".cache" / "dltrain"
