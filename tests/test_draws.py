"""A few of tests/random_draws.py's draws, one of each strategy."""

import shutil

import pytest
from random_draws import CLOSE, compare, draw


@pytest.mark.skipif(shutil.which("c++") is None, reason="DeepSpeed's CPU operator needs a C++ compiler")
def test_gradients_and_norms_are_those_of_one_process(tmp_path):
    draws, kinds = [], set()
    for i in range(60):
        one = draw(i, seed=1)
        kind = (one.strategy, one.exact, one.packed) if one.exact else (one.strategy, False)
        if one.world > 1 and kind not in kinds:
            kinds.add(kind)
            draws.append(one)
    assert {strategy for strategy, *_ in kinds} == {"ddp", "fsdp", "hybrid", "zero1", "zero2", "zero3"}
    for one, apart in compare(draws, tmp_path):
        assert apart <= (0.0 if one.exact else CLOSE), one
