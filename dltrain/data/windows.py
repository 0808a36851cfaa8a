"""Rows of one long text: windows of its tokens, at every offset or end to end."""

import hashlib
from typing import Any

import numpy as np
import torch

from dltrain.errors import UserError

# T tokens, M rows of a micro-batch (B in what it gives), L tokens of a row


class Windows:
    """Row i is tokens [i stride, i stride + row], each with the next one as its target; a `dltrain.data.loader.Rows`.

    `stride` 1 is every window that there is, so that a shuffled epoch draws them at random offsets without putting any
    back; `stride=row` has each token as a target once, but for fewer than `row` at the end. `named` is what an error
    calls the text. Raises UserError for a text of fewer than row + 1 tokens.
    """

    def __init__(self, tokens_T: np.ndarray, row: int, stride: int, named: str):
        if len(tokens_T) <= row:
            raise UserError(f"{named} has {len(tokens_T)} tokens, too few for a row of {row} and its targets")
        self.row, self.stride = row, stride
        self._tokens_T = np.ascontiguousarray(tokens_T, np.int32)
        identity = hashlib.sha256(f"windows 1 {row} {stride} ".encode())
        identity.update(self._tokens_T.tobytes())
        self.fingerprint = identity.hexdigest()

    def __len__(self) -> int:
        return (len(self._tokens_T) - self.row - 1) // self.stride + 1

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray, /) -> dict[str, Any]:
        """ids_BL, targets_BL int64 (-100 in a row of padding), and count (of targets)."""
        start_M1 = np.maximum(index_M, 0)[:, None] * self.stride
        both_ML1 = self._tokens_T[start_M1 + np.arange(self.row + 1)].astype(np.int64)
        targets_ML = np.where(index_M[:, None] < 0, -100, both_ML1[:, 1:])
        return {
            "ids_BL": torch.from_numpy(both_ML1[:, :-1].copy()),
            "targets_BL": torch.from_numpy(targets_ML),
            "count": torch.tensor(int((index_M >= 0).sum()) * self.row),
        }
