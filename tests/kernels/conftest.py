"""Kernels run through the mended interpreter, on CPU tensors, in every test of this folder; without Triton, none."""

import importlib.util

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    collect_ignore_glob = ["test_*.py"]
else:
    import interpreter
    from hypothesis import settings

    settings.register_profile("kernels", deadline=None, derandomize=True, database=None, max_examples=20)
    settings.load_profile("kernels")


@pytest.fixture(autouse=True)
def _kernels(monkeypatch):
    """DLTRAIN_KERNELS=triton; a test that wants the reference calls it by name."""
    monkeypatch.setattr("dltrain.kernels.dispatch.MODE", "triton")
    torch.manual_seed(0)


@pytest.fixture
def watched():
    """A report of what the kernels of the test do, which fails on what a GPU would punish."""
    with interpreter.watch() as report:
        yield report
