"""The sanitizer sees what it says it sees: each fault in a kernel made for it."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false
# Triton's types are those of the language within a kernel, not of Python's calls.

import interpreter
import pytest
import torch
import triton
import triton.language as tl


@triton.jit
def copy(X, Y, n, BLOCK: tl.constexpr, MASK_LOAD: tl.constexpr, MASK_STORE: tl.constexpr):
    at = tl.arange(0, BLOCK)
    x = tl.load(X + at, mask=at < n if MASK_LOAD else None)
    tl.store(Y + at, x, mask=at < n if MASK_STORE else None)


@triton.jit
def total(X, Y, n, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(Y, tl.sum(tl.load(X + at, mask=at < n), 0))


@triton.jit
def all_write(Y):
    tl.store(Y, 1.0)


@triton.jit
def shift(Y):
    i = tl.program_id(0)
    tl.store(Y + i, tl.load(Y + i + 1))


@triton.jit
def twice(Y):
    tl.store(Y + tl.arange(0, 4) // 2, 1.0)


@triton.jit
def product(Y, a, b):
    tl.store(Y, a * b)


@triton.jit
def narrow(X, Y, ADD: tl.constexpr):
    at = tl.arange(0, 64)
    x = tl.load(X + at)
    tl.store(Y + at, x + x if ADD else (x.to(tl.float32) * 0.1).to(tl.bfloat16))


@triton.jit
def matmul(A, B, C):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(C + at, tl.dot(tl.load(A + at), tl.load(B + at)))


FAULTS = {
    "a load of 6 lanes outside": lambda x, y: copy[1,](x, y, 10, 16, False, True),
    "a store of 6 lanes outside": lambda x, y: copy[1,](x, y, 10, 16, True, False),
    "race of programs on 1 elements of Y": lambda x, y: all_write[2,](y),
    "a race": lambda x, y: shift[3,](y),
    "two lanes of one store": lambda x, y: twice[1,](y),
    "overflow": lambda x, y: product[1,](y, 1 << 20, 1 << 20),
    "add of bfloat16": lambda x, y: narrow[1,](torch.ones(64).bfloat16(), torch.ones(64).bfloat16(), True),
}


@pytest.mark.parametrize("words", FAULTS)
def test_faults_are_seen(words):
    with interpreter.watch(), pytest.raises(Exception, match=words):
        FAULTS[words](torch.ones(10), torch.zeros(10))


def test_undefined_lanes_are_nan():
    y = torch.zeros(1)
    with interpreter.watch():
        total[1,](torch.ones(10), y, 10, 16)
        assert torch.empty(3).isnan().all()
    assert y.isnan().all()


def test_bytes_are_counted():
    x, y = torch.arange(10.0), torch.zeros(10)
    with interpreter.watch() as report:
        copy[1,](x, y, 10, 16, True, True)
    assert torch.equal(x, y)
    (launch,) = report.of("copy")
    assert (dict(launch.loaded), dict(launch.stored), report.bytes) == ({"X": 40}, {"Y": 40}, 80)


def test_bfloat16_is_rounded_and_multiplied_as_numbers():
    x = torch.randn(64).bfloat16()
    y = torch.empty_like(x)
    narrow[1,](x, y, False)
    assert torch.equal(y, (x.float() * 0.1).bfloat16())
    a, b = torch.randn(2, 16, 16).bfloat16().unbind()
    c = torch.empty(16, 16)
    matmul[1,](a, b, c)
    torch.testing.assert_close(c, a.float() @ b.float())
