"""Which pieces of which documents make up a row: from lengths alone, so that any row is one look-up away.

Two ways, with one interface. `Fixed`: the documents end to end, cut every `room` (as GPT-2 was trained). `best_fit`: a
document is cut only where it is longer than a row, and pieces are put together so that rows are full: best-fit
decreasing, Ding et al. 2024, "Fewer truncations improve language modeling", https://arxiv.org/abs/2404.10830, section
3.2. They use a tree over single rows; here, rows with equally much left and pieces of equal length are dealt with all
at once, so that the time depends on the number of different lengths.

A unit is a token, or a byte, or whatever lengths are counted in.

Shapes: D documents, R rows, M rows asked for, P pieces.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

WINDOW = 65_536  # documents that are packed together; a row has none from outside
STEPS = 4096  # lengths that are told apart; of longer rows, lengths are rounded up to a multiple of room / STEPS


@dataclass(frozen=True)
class Pieces:
    """Units start ... stop - 1 of a document, in the order of the row: `row_P` counts in the rows asked for."""

    row_P: np.ndarray  # int64, ascending
    document_P: np.ndarray  # int64
    start_P: np.ndarray  # int64
    stop_P: np.ndarray  # int64


@dataclass(frozen=True)
class Packed:
    """Rows from a list of pieces. `end_R` says where a row ends in it."""

    end_R: np.ndarray
    document_P: np.ndarray
    start_P: np.ndarray
    stop_P: np.ndarray

    def __len__(self) -> int:
        return len(self.end_R)

    def pieces(self, row_M: np.ndarray) -> Pieces:
        """int64 [M], in 0 ... len - 1 -> their pieces."""
        first_M = np.where(row_M > 0, self.end_R[row_M - 1], 0)
        count_M = self.end_R[row_M] - first_M
        row_P, index_P = _ranges(first_M, count_M)
        return Pieces(row_P, self.document_P[index_P], self.start_P[index_P], self.stop_P[index_P])

    def save(self, folder: Path) -> None:
        for name in self.__dataclass_fields__:
            np.save(folder / f"{name}.npy", getattr(self, name))

    @staticmethod
    def load(folder: Path) -> "Packed":
        """What `save` wrote, mapped rather than read."""
        mapped = {name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in Packed.__dataclass_fields__}
        return _Mapped(**{name: np.asarray(array) for name, array in mapped.items()}, folder=folder)


@dataclass(frozen=True)
class _Mapped(Packed):
    folder: Path

    def __reduce__(self):
        return Packed.load, (self.folder,)  # not what is in the files


@dataclass(frozen=True)
class Fixed:
    """Row r is units [r room, (r + 1) room + overlap) of all documents end to end; the last one may be short."""

    length_D: np.ndarray
    room: int
    overlap: int = 0

    @cached_property
    def _end_D(self) -> np.ndarray:
        return np.cumsum(self.length_D, dtype=np.int64)

    def __len__(self) -> int:
        total = int(self._end_D[-1]) if len(self._end_D) else 0
        return -(-max(0, total - self.overlap) // self.room)

    def pieces(self, row_M: np.ndarray) -> Pieces:
        """int64 [M], in 0 ... len - 1 -> their pieces."""
        end_D = self._end_D
        start_M = np.asarray(row_M, np.int64) * self.room
        stop_M = np.minimum(start_M + self.room + self.overlap, end_D[-1])
        first_M = np.searchsorted(end_D, start_M, side="right")
        row_P, document_P = _ranges(first_M, np.searchsorted(end_D, stop_M, side="left") + 1 - first_M)
        begin_P = end_D[document_P] - self.length_D[document_P]
        start_P = np.maximum(start_M[row_P] - begin_P, 0)
        stop_P = np.minimum(stop_M[row_P] - begin_P, self.length_D[document_P])
        some = stop_P > start_P  # not the documents that are empty
        return Pieces(row_P[some], document_P[some], start_P[some], stop_P[some])


def best_fit(length_D: np.ndarray, room: int, overlap: int = 0, window: int = WINDOW) -> Packed:
    """Cut every document into pieces of `room` units and a rest, and pack the rests of every `window` documents.

    With `overlap`, a piece has so many units more: a document's next piece begins with them, and they take no room.
    Every unit of every document is in one piece, but for the overlaps; a document of no more than `overlap` units is in
    none. About a microsecond per document; memory for the pieces and one window.
    """
    assert room >= 1 and overlap >= 0, (room, overlap)
    grain = -(-room // STEPS)
    parts: list[tuple[np.ndarray, ...]] = []  # per window: row_P, document_P, start_P, stop_P
    rows = 0
    for first in range(0, len(length_D), window):
        length_W = np.maximum(np.asarray(length_D[first : first + window], np.int64) - overlap, 0)
        whole_W, rest_W = np.divmod(length_W, room)
        cut_F, number_F = _ranges(np.zeros_like(whole_W), whole_W)
        rest_P = np.flatnonzero(rest_W)
        size_P = np.minimum(-(-rest_W[rest_P] // grain), room // grain)  # too large by rounding: a row of its own
        row_P = rows + len(cut_F) + _best_fit_decreasing(size_P, room // grain)
        document_P, start_P = np.concatenate([cut_F, rest_P]), np.concatenate([number_F, whole_W[rest_P]]) * room
        size_P = np.concatenate([np.full(len(cut_F), room), rest_W[rest_P]])
        row_P = np.concatenate([rows + np.arange(len(cut_F)), row_P])
        order = np.argsort(row_P, kind="stable")  # within a row as in the corpus
        part = (row_P, document_P + first, start_P, start_P + size_P + overlap)
        parts.append(tuple(array[order] for array in part))
        rows = int(row_P.max()) + 1 if len(row_P) else rows
    if not parts:
        return Packed(*(np.empty(0, np.int64) for _ in range(4)))
    row_P, document_P, start_P, stop_P = (np.concatenate(arrays) for arrays in zip(*parts))
    return Packed(np.cumsum(np.bincount(row_P, minlength=rows)), document_P, start_P, stop_P)


def _best_fit_decreasing(size_P: np.ndarray, room: int) -> np.ndarray:
    """Sizes 1 ... room -> number of the row that each piece goes to, 0, 1, ...

    The longest first, each into the row that it leaves least room in, or into a new one.
    """
    by_size_P = np.argsort(-size_P, kind="stable")
    row_P = np.empty(len(size_P), np.int64)
    sizes, counts = np.unique(size_P, return_counts=True)
    open_rows: dict[int, list[np.ndarray]] = defaultdict(list)  # room left -> rows
    lefts: list[int] = []  # the keys of `open_rows`, ascending

    def leave(left: int, rows: np.ndarray) -> None:
        if left and len(rows):
            if left not in open_rows:
                insort(lefts, left)
            open_rows[left].append(rows)

    n_rows = done = 0
    for size, count in zip(sizes[::-1].tolist(), counts[::-1].tolist()):
        while count:
            at = bisect_left(lefts, size)
            if at < len(lefts):
                left = lefts.pop(at)
                stacks = open_rows.pop(left)
                rows = stacks[0] if len(stacks) == 1 else np.concatenate(stacks)
            else:
                left = room
                rows = np.arange(n_rows, n_rows - (-count // (room // size)))
                n_rows += len(rows)
            fit = left // size  # a row that took one is the best for the next, while it has room
            placed = min(count, fit * len(rows))
            full, more = divmod(placed, fit)
            used = full + bool(more)
            row_P[by_size_P[done : done + placed]] = np.repeat(rows[:used], fit)[:placed]
            leave(left - fit * size, rows[:full])
            if more:
                leave(left - more * size, rows[full:used])
            leave(left, rows[used:])
            done, count = done + placed, count - placed
    return row_P


def _ranges(first_M: np.ndarray, count_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(m, first[m] + 0 ... first[m] + count[m] - 1) for every m, end to end."""
    m_P = np.repeat(np.arange(len(count_M)), count_M)
    before_M = np.cumsum(count_M) - count_M
    return m_P, np.arange(len(m_P)) + (first_M - before_M)[m_P]
