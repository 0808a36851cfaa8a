"""Nothing is keyed by rank: random numbers are a function of what they are for."""

import hashlib

import torch


def key(*parts: int | str) -> int:
    """A 63-bit number from any tuple, the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, lane: int, part: int) -> None:
    """Seed torch for one forward and backward: dropout depends on (seed, step, lane, micro-batch) and nothing else.

    What torch.manual_seed does, for the CPU and this process's GPU alone: that asks every kind of device, each of which
    notes a stack trace where there is none of it (a millisecond in all).
    """
    number = key("step", seed, step, lane, part)
    torch.default_generator.manual_seed(number)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed(number)
