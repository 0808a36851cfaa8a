"""Several sources in one stream, each with its share at every moment: by position, without a random draw.

Shapes: P positions, K sources, Q positions of a period, M rows of a micro-batch.
"""

import hashlib
import heapq
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dltrain.data.order import Order, Ordering, Windowed, require_same, require_same_past
from dltrain.errors import UserError
from dltrain.seeds import key

if TYPE_CHECKING:
    from dltrain.data.loader import Rows

LONGEST = 65_536  # positions of a period

Weight = int | float | str | Fraction  # a str such as "1/3" is exact


class Mix:
    """Position -> row of one of K sources, so that after n positions source k has had n w_k rows, within less than one.

    That holds at every n since the weights began (Tijdeman, "The chairman assignment problem", 1980: the bound is
    1 - 1/(2K - 2)). A source goes through its own epochs, by its own clock: a small one comes round again, in a new
    order. Indices count through the sources one after the other, as `Joined` has their rows.

    `weights` are (position, one weight a source): ((0, (3, 1)), (10_000, (1, 1))), a curriculum. Where they change,
    each source goes on at the row it had come to. Whole weights, decimals and fractions are taken exactly, unless
    their common denominator is over 65,536: then they are rounded to that many parts. `self.weights` tells what is
    used. Weights equal to the numbers of rows make one epoch of the mix one epoch of each source, if they need no
    rounding; for larger ones use `Order(len(joined), seed)`, which shuffles all rows together.
    """

    def __init__(
        self, sources: Sequence[int | Ordering], weights: Sequence[tuple[int, Sequence[Weight]]], seed: int = 0
    ):
        """`sources` are orders, or numbers of rows to be shuffled by (seed, k). UserError for weights that cannot be:
        none, negative, not one a source, positions that do not ascend from 0."""
        self.sources: list[Ordering] = []
        for k, source in enumerate(sources):
            if isinstance(source, int) and source < 1:
                raise UserError(f"source {k} of the mix has no rows; leave it out")
            self.sources.append(Order(source, key("mix", seed, k)) if isinstance(source, int) else source)
        size_K = np.array([source.n for source in self.sources], np.int64)
        self.n = int(size_K.sum())
        self._first_K = np.cumsum(size_K) - size_K
        positions = [position for position, _ in weights]
        if not positions or positions[0] != 0 or positions != sorted(set(positions)):
            raise UserError(f"mixing weights begin at positions {positions}; begin at 0 and let them ascend")
        self._start = np.array(positions, np.int64)
        self._phases: list[_Phase] = []
        dealt_K = np.zeros(len(self.sources), np.int64)
        for i, (position, values) in enumerate(weights):
            if len(values) != len(self.sources):
                raise UserError(f"{len(values)} mixing weights for {len(self.sources)} sources; give one for each")
            if i:
                dealt_K = self._phases[-1].dealt(position - positions[i - 1])
            self._phases.append(_Phase(_parts(values), dealt_K))
        self.weights = [
            (position, tuple(Fraction(part, sum(phase.parts)) for part in phase.parts))
            for position, phase in zip(positions, self._phases)
        ]

    def at(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [P], each >= 0 -> (epoch_P of the row's own source, index_P through all sources), int64."""
        source_P, within_P = self.deal(position_P)
        epoch_P, index_P = np.empty_like(within_P), np.empty_like(within_P)
        for k, source in enumerate(self.sources):
            here = np.flatnonzero(source_P == k)
            if here.size:
                epoch_P[here], index = source.at(within_P[here])
                index_P[here] = index + self._first_K[k]
        return epoch_P, index_P

    def deal(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """int64 [P], each >= 0 -> (source_P, position_P within that source), int64."""
        position_P = np.asarray(position_P, np.int64)
        phase_P = np.searchsorted(self._start, position_P, "right") - 1
        source_P, within_P = np.empty_like(position_P), np.empty_like(position_P)
        for i in np.unique(phase_P).tolist():
            here = phase_P == i
            source_P[here], within_P[here] = self._phases[i].deal(position_P[here] - self._start[i])
        return source_P, within_P

    def dealt(self, position: int) -> list[int]:
        """Rows each source has given before a position."""
        i = int(np.searchsorted(self._start, position, "right")) - 1
        return self._phases[i].dealt(position - int(self._start[i])).tolist()

    def state(self) -> dict[str, Any]:
        return {
            "sources": [source.state() for source in self.sources],
            "weights": [[int(start), phase.parts] for start, phase in zip(self._start, self._phases)],
        }

    def check(self, state: dict[str, Any], position: int) -> None:
        """UserError if a source differs, or weights that begin before `position`; later ones may change."""
        was = state.get("sources", [])
        require_same({"sources": len(self.sources)}, {"sources": len(was)})
        for k, (source, dealt) in enumerate(zip(self.sources, self.dealt(position))):
            try:
                source.check(was[k], dealt)
            except UserError as error:
                raise UserError(f"source {k} of the mix: {error}") from None
        require_same_past("mixing weights", self.state()["weights"], state["weights"], position)


def from_state(state: dict[str, Any], counts: Sequence[Sequence[int] | np.ndarray] = ()) -> Ordering:
    """The stream that had this state.

    `counts`: samples in each shard, of one source or another; a stream that reads in windows takes those it was made
    for. UserError if they are not among them, or the state is of none of our streams.
    """
    match sorted(state):
        case ["sources", "weights"]:
            return Mix([from_state(source, counts) for source in state["sources"]], state["weights"])
        case ["rows", "seed", "shuffle"]:
            return Order(state["rows"], state["seed"], state["shuffle"])
        case ["counts", "rows", "seed", "window"]:
            for counts_S in counts:
                order = Windowed(counts_S, state["seed"], state["window"])
                if order.state() == state:
                    return order
            raise UserError(f"the order has windows of {state['window']} shards; give the shards that it was made for")
    raise UserError(f"an order with the entries {', '.join(state) or 'none'} cannot be made again from its state")


class _Phase:
    """One set of weights, from its own position 0 on: a schedule of Q = sum(parts) positions, over and over."""

    def __init__(self, parts: list[int], before_K: np.ndarray):
        """`before_K`: rows each source has given in earlier phases."""
        self.parts, self._part_K, self._before_K = parts, np.array(parts, np.int64), before_K
        self._source_Q = _schedule(parts)
        self._turn_Q = np.empty_like(self._source_Q)  # earlier turns of the same source in the period
        for k, part in enumerate(parts):
            self._turn_Q[self._source_Q == k] = np.arange(part)

    def deal(self, position_P: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        period_P = position_P // len(self._source_Q)
        place_P = position_P - period_P * len(self._source_Q)
        source_P = self._source_Q[place_P]
        return source_P, self._before_K[source_P] + period_P * self._part_K[source_P] + self._turn_Q[place_P]

    def dealt(self, n: int) -> np.ndarray:
        periods, rest = divmod(n, len(self._source_Q))
        return self._before_K + periods * self._part_K + np.bincount(self._source_Q[:rest], minlength=len(self.parts))


def _parts(weights: Sequence[Weight]) -> list[int]:
    """The smallest whole numbers in the ratio of the weights; rounded by largest remainder if their sum is over
    65,536."""
    try:
        exact = [Fraction(str(weight)) for weight in weights]
    except (ValueError, ZeroDivisionError):
        raise UserError(
            f"mixing weights {list(weights)} are not all numbers; give numbers such as 2, 0.3 or '1/3'"
        ) from None
    total = sum(exact)
    if min(exact) < 0 or not total:
        raise UserError(f"mixing weights {list(weights)}; none may be negative, and one must be above 0")
    shares = [weight / total for weight in exact]
    whole = min(math.lcm(*(share.denominator for share in shares)), LONGEST)
    parts = [int(share * whole) for share in shares]
    by_remainder = sorted(range(len(shares)), key=lambda k: parts[k] - shares[k] * whole)  # a tie: the first
    for k in by_remainder[: whole - sum(parts)]:
        parts[k] += 1
    for weight, share, part in zip(weights, shares, parts):
        if share and not part:
            raise UserError(f"mixing weight {weight} is under 1/{LONGEST} of all; raise it or make it 0")
    common = math.gcd(*parts)
    return [part // common for part in parts]


def _schedule(parts: list[int]) -> np.ndarray:
    """Whose turn it is, int64 [sum(parts)]: after n turns source k has had n w_k, at most 1 - 1/(2K - 2) off.

    The bound gives each turn of a source a first and a last position. To take, of the turns that may come, the one
    whose last position is nearest keeps them all wherever that is possible (Horn, "Some simple scheduling
    algorithms", 1974), and it is possible (Tijdeman). All in whole numbers.
    """
    q = sum(parts)
    sources = sum(part > 0 for part in parts)
    fine, slack = max(1, 2 * sources - 2), max(0, 2 * sources - 3)  # the bound is slack / fine
    source, first, last = [], [], []
    for k, part in enumerate(parts):
        turn = np.arange(part)
        source.append(np.full(part, k))
        first.append(-(-((turn + 1) * fine - slack) * q // (fine * part)) if part else turn)
        last.append((turn * fine + slack) * q // (fine * part) + 1 if part else turn)
    first, last, source = np.concatenate(first), np.concatenate(last), np.concatenate(source)
    by_first = np.argsort(first, kind="stable")
    turns = list(zip(first[by_first].tolist(), last[by_first].tolist(), source[by_first].tolist()))
    waiting: list[tuple[int, int]] = []
    schedule, i = [], 0
    for n in range(1, q + 1):  # the n-th turn
        while i < q and turns[i][0] <= n:
            heapq.heappush(waiting, turns[i][1:])
            i += 1
        latest, k = heapq.heappop(waiting)
        assert n <= latest, (parts, n, latest)
        schedule.append(k)
    return np.array(schedule, np.int64)


class Joined:
    """Rows of several sources, one after the other: the Rows that a `Mix`, or an `Order` over all, reads from.

    Sources give rows of the same shape. Numbers, as "count", add up; "damaged" is the list of all.
    """

    def __init__(self, *rows: "Rows"):
        self.rows = rows
        self._first_K = np.cumsum([0] + [len(each) for each in rows])
        told = "\n".join(f"{len(each)} {each.fingerprint}" for each in rows)
        self.fingerprint = hashlib.sha256(told.encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._first_K[-1])

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Any]:
        """int64 [M], [M] -> one micro-batch, its rows in the order asked for. UserError where shapes differ."""
        source_M = np.searchsorted(self._first_K, index_M, "right") - 1
        source_M[index_M < 0] = 0  # padding, which any source can give
        joined: dict[str, Any] = {}
        for k in np.unique(source_M).tolist():
            here = np.flatnonzero(source_M == k)
            index = np.where(index_M[here] < 0, -1, index_M[here] - self._first_K[k])
            for name, value in self.rows[k].batch(epoch_M[here], index).items():
                if name == "damaged":
                    joined[name] = joined.get(name, []) + value
                elif not value.ndim:
                    joined[name] = joined.get(name, 0) + value
                else:
                    assert len(value) == len(here), (name, value.shape)  # a row of the tensor for each row
                    if name not in joined:
                        joined[name] = value.new_empty((len(index_M), *value.shape[1:]))
                    if joined[name].shape[1:] != value.shape[1:] or joined[name].dtype != value.dtype:
                        raise UserError(
                            f"rows of source {k} have {name} of {_form(value)}, other sources {_form(joined[name])}; "
                            "give all sources one shape"
                        )
                    joined[name][torch.from_numpy(here)] = value
        return joined


def _form(value: torch.Tensor) -> str:
    return f"{list(value.shape[1:])} {str(value.dtype).removeprefix('torch.')}"
