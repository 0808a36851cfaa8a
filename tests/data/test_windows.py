import numpy as np
import pytest
import torch

from dltrain.data.windows import Windows
from dltrain.errors import UserError

TOKENS = np.random.Generator(np.random.Philox(key=1)).integers(0, 9, 103)


def every(rows: Windows) -> dict:
    index = np.arange(len(rows))
    return rows.batch(np.zeros_like(index), index)


def test_every_window_there_is():
    batch = every(Windows(TOKENS, 10, 1, "it"))
    assert len(batch["ids_BL"]) == 93
    for i, (ids, targets) in enumerate(zip(batch["ids_BL"].tolist(), batch["targets_BL"].tolist())):
        assert ids == TOKENS[i : i + 10].tolist()
        assert targets == TOKENS[i + 1 : i + 11].tolist()
    assert int(batch["count"]) == 930


def test_end_to_end_every_token_is_a_target_once():
    batch = every(Windows(TOKENS, 10, 10, "it"))
    assert batch["targets_BL"].flatten().tolist() == TOKENS[1:101].tolist()
    assert batch["ids_BL"].flatten().tolist() == TOKENS[:100].tolist()
    assert len(Windows(TOKENS[:101], 10, 10, "it")) == 10
    assert len(Windows(TOKENS[:100], 10, 10, "it")) == 9


def test_padding_rows_weigh_nothing():
    batch = Windows(TOKENS, 10, 1, "it").batch(np.zeros(3, np.int64), np.array([4, -1, -1]))
    assert int(batch["count"]) == int((batch["targets_BL"] >= 0).sum()) == 10
    assert (batch["targets_BL"][1:] == -100).all()
    assert all(v.dtype == torch.int64 for v in batch.values())


def test_the_fingerprint_is_of_tokens_and_windows():
    prints = {Windows(TOKENS[:n], row, stride, "it").fingerprint for n, row, stride in
              [(103, 10, 1), (102, 10, 1), (103, 9, 1), (103, 10, 10)]}  # fmt: skip
    assert len(prints) == 4
    assert Windows(TOKENS, 10, 1, "it").fingerprint == Windows(TOKENS, 10, 1, "other").fingerprint


def test_a_short_text():
    assert len(Windows(TOKENS[:11], 10, 1, "it")) == 1
    with pytest.raises(UserError, match=r"it has 10 tokens.*row of 10"):
        Windows(TOKENS[:10], 10, 1, "it")
