"""Learning-rate schedules: pure functions from a step to a multiplier of the peak rate.

A step is the number of optimizer steps already taken: 0 for the first one. Warm-up rises linearly and reaches 1 at the
last warm-up step, so that no step is spent at rate 0. The schedule of a paper that counts tokens has the number of
tokens divided by the tokens of a step: `linear(warmup_tokens // step_tokens, total_tokens // step_tokens)`.
"""

import math
from collections.abc import Callable, Sequence

from dltrain.errors import UserError

Schedule = Callable[[int], float]


def constant(warmup: int = 0) -> Schedule:
    """1 after `warmup` steps. Raises UserError for a negative warm-up."""
    _check(warmup, None)
    return lambda step: (step + 1) / warmup if step < warmup else 1.0


def linear(warmup: int, total: int) -> Schedule:
    """Up to 1 over `warmup` steps, then down in a line to 0 at step `total` (Devlin et al. 2018, appendix A.2).

    Raises UserError unless 0 <= warmup <= total.
    """
    _check(warmup, total)

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return (total - step) / (total - warmup) if step < total else 0.0

    return multiplier


def cosine(warmup: int, total: int, floor: float = 0.0) -> Schedule:
    """Up to 1 over `warmup` steps, then down half a cosine to `floor` at step `total`, and there it stays.

    Loshchilov and Hutter 2016, https://arxiv.org/abs/1608.03983, equation 5. Raises UserError unless
    0 <= warmup <= total and 0 <= floor <= 1.
    """
    _check(warmup, total)
    if not 0.0 <= floor <= 1.0:
        raise UserError(f"the floor of a schedule ({floor}) must lie in 0 ... 1: it is a fraction of the peak rate")

    def multiplier(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        if step >= total:
            return floor
        return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * (step - warmup) / (total - warmup)))

    return multiplier


def staircase(drops: Sequence[int], factor: float) -> Schedule:
    """`factor` to the power of the drops so far; the first step at the lower rate is the drop itself (He et al. 2015,
    section 3.4). Raises UserError unless the drops increase."""
    drops = tuple(drops)
    if drops != tuple(sorted(set(drops))) or min(drops, default=0) < 0:
        raise UserError(f"the drops of a schedule ({', '.join(map(str, drops))}) must increase, from 0 on")
    return lambda step: factor ** sum(drop <= step for drop in drops)


def _check(warmup: int, total: int | None) -> None:
    if warmup < 0:
        raise UserError(f"warmup ({warmup} steps) must not be negative")
    if total is not None and warmup > total:
        raise UserError(f"warmup ({warmup} steps) must not be longer than the whole schedule ({total} steps)")
