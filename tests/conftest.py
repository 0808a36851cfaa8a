"""What every test starts from: one thread (their number changes the bits) and caches of the session's own."""

import os
import sys
import tempfile

import pytest

os.environ["OMP_NUM_THREADS"] = "1"
os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported; DLTRAIN_KERNELS says whether kernels run

_CACHE = pytest.StashKey[tempfile.TemporaryDirectory]()


def pytest_configure(config: pytest.Config) -> None:
    cache = config.stash[_CACHE] = tempfile.TemporaryDirectory(prefix="dltrain-tests-")
    os.environ["DLTRAIN_CACHE"] = cache.name


@pytest.fixture(scope="session", autouse=True)
def fork_server():
    """A process has one fork server: start that of `worlds` before a test starts one that has imported less."""
    if worlds := sys.modules.get("worlds"):
        worlds.serve()


def pytest_unconfigure(config: pytest.Config) -> None:
    config.stash[_CACHE].cleanup()
