"""Nothing is keyed by rank: random numbers are a function of what they are for."""

import hashlib

import torch


def key(*parts: int | str) -> int:
    """A 63-bit number from any tuple, the same on every machine."""
    text = "/".join(map(str, parts)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") >> 1


def seed_step(seed: int, step: int, lane: int, part: int) -> None:
    """Seed torch for one forward and backward: dropout depends on (seed, step, lane, micro-batch) and nothing else."""
    torch.manual_seed(key("step", seed, step, lane, part))
