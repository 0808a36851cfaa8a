"""The benchmark runs from end to end, on tiny shapes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dltrain.errors import UserError
from dltrain.kernels.bench import __main__ as bench
from dltrain.kernels.bench.frame import Case, Clock, measure


def test_smoke(tmp_path, capsys):
    written = bench.run(["gelu", "norm"], True, 1.0, tmp_path)
    found = json.loads(written.read_text())
    assert found["device"] == "cpu" and found["left_out"] == []
    ops = {record["op"] for record in found["results"]}
    assert {"layer norm backward", "bias-GELU tanh forward"} <= ops
    assert all(next(iter(record["milliseconds"])) == "dltrain" for record in found["results"])
    assert written.with_suffix(".png").read_bytes()[:4] == b"\x89PNG"
    assert len(capsys.readouterr().out.splitlines()) == len(found["results"])


def test_providers_take_turns():
    calls = []
    case = Case("op", "shape", {name: lambda name=name: calls.append(name) for name in "ab"}, bytes=10)
    (record,) = measure(Clock(torch.device("cpu"), turns=3), iter([case]), {"copy_bytes_per_second": 1e9})
    assert calls == [*"ab", *"ababab"]  # once each to warm up
    assert record["times"]["b"] == record["milliseconds"]["b"]["median"] / record["milliseconds"]["a"]["median"]
    assert record["of_copy"] == pytest.approx(10 / (record["milliseconds"]["a"]["median"] / 1e3) / 1e9)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_nothing_is_measured_without_a_gpu(tmp_path):
    with pytest.raises(UserError, match="no GPU to measure on"):
        bench.run(["gelu"], False, 1.0, tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_ops():
    done = subprocess.run(
        [sys.executable, "-m", "dltrain.kernels.bench", "nothing"],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.startswith("error: no benchmark nothing: there are ")
