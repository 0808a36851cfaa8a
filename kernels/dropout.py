"""Dropout masks from a counter: element (stream, row, column) is kept or not whatever the tiles and their order.

Philox 4x32 with 7 rounds (Salmon et al. 2011, https://doi.org/10.1145/2063384.2063405, table 2: the least that passes
BigCrush) on the counter (column // 8, row, stream, 0) with the 64-bit seed as its key gives four words, that is eight
numbers of 16 bits, one for each of eight columns: word j holds columns 2 j (low half) and 2 j + 1 (high half). An
element is kept where its number is at least `threshold(p)`.

`keep` states this in torch, for tests; dropout_triton.py has the same for kernels.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ROUNDS = 7
WORD = 0xFFFFFFFF


def draw_seed(device: torch.device) -> Tensor:
    """An int64 seed from torch's own generator of the device, so that torch.manual_seed decides it. Shape [1]."""
    return torch.randint(torch.iinfo(torch.int64).max, (1,), device=device)


def threshold(p: float) -> int:
    """Of 65536 numbers, how many drop an element. Raises ValueError where p is no probability."""
    if not 0.0 <= p <= 1.0:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")  # torch's words
    return round(p * 65536)


def scale(p: float) -> float:
    """What kept elements are multiplied by; 0 where p is 1, as torch has it."""
    return 1.0 / (1.0 - p) if p < 1.0 else 0.0


def keep(seed: Tensor, streams: int, rows: int, columns: int, p: float) -> Tensor:
    """The mask, bool [streams, rows, columns]."""
    eighth = torch.arange((columns + 7) // 8)
    row, stream = torch.arange(rows)[:, None], torch.arange(streams)[:, None, None]
    counter = torch.broadcast_tensors(eighth, row, stream, torch.zeros(1, dtype=torch.int64))
    words = torch.stack(philox(counter, int(seed.item())), -1)
    numbers = torch.stack((words & 0xFFFF, words >> 16), -1)
    return numbers.flatten(2)[:, :, :columns] >= threshold(p)


def philox(counter: Sequence[Tensor], key: int, rounds: int = ROUNDS) -> tuple[Tensor, ...]:
    """Philox 4x32: four words in int64 from a counter of four and a key of 64 bits."""
    c0, c1, c2, c3 = counter
    k0, k1 = key & WORD, key >> 32 & WORD
    for _ in range(rounds):
        (low_a, high_a), (low_b, high_b) = _multiply(0xD2511F53, c0), _multiply(0xCD9E8D57, c2)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & WORD, (k1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """Low and high word of the product of two words; int64 has no room for 64 bits without a sign."""
    low, high = a * (b & 0xFFFF), a * (b >> 16)
    total = (low >> 16) + high
    return (total << 16 | (low & 0xFFFF)) & WORD, total >> 16
