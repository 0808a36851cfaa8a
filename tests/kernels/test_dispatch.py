"""Which implementation runs, with which configuration; dropout's masks."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's types are those of the language within a kernel, not of Python's calls.

import json
from pathlib import Path

import pytest
import torch
import triton
import triton.language as tl

from dltrain.errors import UserError
from dltrain.kernels import dispatch, dropout, launch
from dltrain.kernels.dispatch import use_kernel
from dltrain.kernels.dropout_triton import keep

X = torch.ones(2)


@pytest.mark.parametrize(("mode", "expected"), [("auto", False), ("reference", False), ("triton", True)])
def test_modes_on_a_cpu(mode, expected, monkeypatch):
    monkeypatch.setattr(dispatch, "MODE", mode)
    assert use_kernel("op", "", X, None) is expected


def test_what_is_left_to_torch():
    assert not use_kernel("op", "", X, X.int())  # integers
    assert not use_kernel("op", "", X, X.to("meta"))  # two devices
    assert not use_kernel("op", "", X.to("meta"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"MODE": "tritno"}, "DLTRAIN_KERNELS=tritno is unknown: auto, triton or reference"),
        ({"HAS_TRITON": False}, "Triton is not installed"),
        ({"INTERPRET": False}, "needs a GPU, or TRITON_INTERPRET=1"),
        ({"INTERPRETED": [torch.float64]}, "Triton's interpreter is wrong in torch.float32"),
    ],
)
def test_what_cannot_be(change, words, monkeypatch):
    for name, value in change.items():
        monkeypatch.setattr(dispatch, name, value)
    with pytest.raises(UserError, match=words):
        use_kernel("op", "", X)


def test_what_no_kernel_does(monkeypatch):
    with pytest.raises(UserError, match="op has no kernel for odd things: DLTRAIN_KERNELS=auto takes the reference"):
        use_kernel("op", "odd things", X)
    monkeypatch.setattr(dispatch, "MODE", "auto")
    assert not use_kernel("op", "odd things", X)


def test_the_first_row_that_fits(monkeypatch):
    rows = [
        {"when": {"dtype": "bf16", "width": 64}, "use": {"B": 1}},
        {"when": {"dtype": ["bf16", "fp32"], "causal": True}, "use": {"B": 2}},
        {"when": {"width": 64}, "use": {"B": 3}},
    ]
    monkeypatch.setattr(launch, "table", lambda name: {"kernel": rows})
    launch._lookup.cache_clear()
    try:
        assert launch.config("kernel", X.bfloat16(), width=64, causal=True) == {"B": 1}
        assert launch.config("kernel", X.bfloat16(), width=65, causal=True) == {"B": 2}
        assert launch.config("kernel", X, width=9, causal=False) == {"B": 3}
        with pytest.raises(UserError, match="kernel has no configuration for"):
            launch.config("kernel", X, width=65, causal=False)
    finally:
        launch._lookup.cache_clear()


def test_tables_have_the_same_kernels_and_a_row_for_all():
    tables = {name: launch.table(name) for name in ("generic", "sm90")}
    shipped, known = ({k for k in tables[t] if not k.endswith("_candidates")} for t in ("sm90", "generic"))
    assert shipped == known
    for name, path in ((name, Path(launch.__file__).parent / "configs" / f"{name}.json") for name in tables):
        assert json.loads(path.read_text()) == tables[name]
    for rows in (rows for table in tables.values() for rows in table.values()):
        for row in rows:
            assert row.keys() <= {"when", "use", "note"} and {"num_warps", "num_stages"} <= row["use"].keys()


@triton.jit
def mask(SEED, OUT, stream, first, THRESHOLD: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, N: tl.constexpr):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    kept = keep(tl.load(SEED), stream, rows, first, COLUMNS, THRESHOLD)
    tl.store(OUT + rows[:, None] * N + first + tl.arange(0, COLUMNS)[None, :], kept.to(tl.int8))


@pytest.mark.parametrize("seed", [0, 12345, (1 << 62) + 987654321])
def test_masks_do_not_depend_on_tiles(seed):
    p, seed = 0.3, torch.tensor([seed])
    want = dropout.keep(seed, 3, 8, 64, p)
    for rows, columns in ((8, 64), (2, 8), (4, 32)):
        got = torch.zeros(3, 8, 64, dtype=torch.int8)
        for stream in range(3):
            for first in range(0, 64, columns):
                mask[8 // rows,](seed, got[stream], stream, first, dropout.threshold(p), rows, columns, 64)
        assert torch.equal(got.bool(), want)


@pytest.mark.parametrize(
    ("rounds", "counter", "key", "words"),
    [
        (7, [0] * 4, 0, "5f6fb709 0d893f64 4f121f81 4f730a48"),
        (7, [0xFFFFFFFF] * 4, (1 << 64) - 1, "5207ddc2 45165e59 4d8ee751 8c52f662"),
        (10, [0] * 4, 0, "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ],
)
def test_philox_gives_the_known_answers(rounds, counter, key, words):
    """Those of Random123, the authors' own library: tests/kat_vectors."""
    got = dropout.philox([torch.tensor(c) for c in counter], key, rounds)
    assert " ".join(f"{int(w):08x}" for w in got) == words


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_the_share_kept(p):
    kept = dropout.keep(torch.tensor([7]), 4, 128, 256, p).double()
    assert abs(kept.mean().item() - (1 - p)) < 4 * (p * (1 - p) / kept.numel()) ** 0.5
    assert abs(torch.corrcoef(kept.flatten(1)).tril(-1)).max() < 0.03  # streams have nothing to do with each other


def test_probabilities():
    assert dropout.keep(torch.tensor([1]), 1, 2, 8, 1.0).sum() == 0
    assert dropout.keep(torch.tensor([1]), 1, 2, 8, 0.0).all()
    assert dropout.scale(1.0) == 0.0
    with pytest.raises(ValueError, match="between 0 and 1"):
        dropout.threshold(-0.1)
