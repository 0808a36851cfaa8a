"""Random draws of processes, lanes, accumulation, padding, packing and strategy against one process: gradients, norms.

    PYTHONPATH=tests python tests/random_draws.py --draws 300 --out docs/bench/random-draws.json

Where lanes apply, the gradient after the clip and its norm must be the bits of one process with the same lanes; under
zero1 to zero3 and with the backend's own reduction they must be those of one process and one forward of the whole batch
to a relative 1e-6 (of the largest value).
"""

import argparse
import os
import socket
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
import toy
import worlds
from torch import Tensor

from dltrain import rundir
from dltrain.optim import sgd
from dltrain.progress import track
from dltrain.run import Run


def free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


CLOSE = 1e-6
PORTS = filter(free, range(20_000 + os.getpid() % 5000, 30_000))  # below those that Linux gives to others meanwhile
RATE = 1e4  # the gradient is read off the weights: a step so long that their rounding is none


@dataclass(frozen=True)
class Draw:
    world: int
    strategy: str
    batch: int
    lanes: int
    micro_batch: int
    shortest: int  # tokens of a row; the rest up to toy.L is padding
    packed: bool  # full rows of several documents, whose borders are not predicted
    dropout: float
    clip: float
    seed: int

    @property
    def exact(self) -> bool:
        return not self.strategy.startswith("zero") and self.lanes > 0

    def alone(self) -> "Draw":
        """What it must equal: one process with the same lanes, or with the whole batch at once."""
        if self.exact:
            return replace(self, world=1, strategy="single")
        return replace(self, world=1, strategy="single", lanes=1, micro_batch=0)


def draw(i: int, seed: int) -> Draw:
    random = np.random.Generator(np.random.Philox(key=[i, seed]))
    world = int(random.choice([1, 2, 3, 4]))
    kinds = ["ddp", "fsdp", "ddp", "fsdp", "zero1", "zero2", "zero3"] if world > 1 else ["single", "ddp", "fsdp"]
    strategy = str(random.choice([*kinds, "hybrid"] if world == 4 else kinds))
    zero = strategy.startswith("zero")
    backend = not zero and world > 1 and random.random() < 0.15
    lanes = world * int(random.integers(1, 3)) if zero or backend else int(random.integers(world, 9))
    rows = int(random.integers(1, 5)) * int(random.choice([1, 2]))
    micro = int(random.choice([d for d in range(1, rows + 1) if rows % d == 0]))
    if backend:
        rows, micro, lanes = rows * lanes // world, 0, 0
    return Draw(
        world, strategy, rows * (lanes or world), lanes, micro, shortest=int(random.integers(2, toy.L + 1)),
        packed=bool(random.random() < 0.3), dropout=0.1 if not zero and not backend and random.random() < 0.5 else 0.0,
        clip=float(random.choice([0.0, 0.05, 10.0])), seed=i,
    )  # fmt: skip


class Rows(toy.ToyRows):
    def __init__(self, one: Draw):
        super().__init__(100)
        self.one = one

    def batch(self, epoch_M: np.ndarray, index_M: np.ndarray) -> dict[str, Tensor]:
        found = super().batch(epoch_M, index_M)
        ids_ML, targets_ML = found["ids_ML"].numpy().copy(), found["targets_ML"].numpy().copy()
        for m, i in enumerate(index_M):
            random = np.random.Generator(np.random.Philox(key=int(i) + 1000))
            if i < 0:
                continue
            length = toy.L if self.one.packed else int(random.integers(self.one.shortest, toy.L + 1))
            ids_ML[m] = np.where(np.arange(toy.L) < length, random.integers(1, toy.V, toy.L), 0)
            targets_ML[m] = np.where(np.arange(toy.L) < length, ids_ML[m, ::-1] % 7, -100)
            if self.one.packed:
                targets_ML[m, random.integers(0, toy.L, 3)] = -100
        count = int((targets_ML >= 0).sum())
        found = {"ids_ML": torch.from_numpy(ids_ML), "targets_ML": torch.from_numpy(targets_ML)}
        return found | {"count": torch.tensor(count)}


def gradients(one: Draw, port: int, folder: str) -> dict[str, Any]:
    """Clipped gradients of the first step by parameter name, and the norm; on rank 0, {} elsewhere."""
    os.environ["MASTER_PORT"] = str(port)
    cfg = toy.Config(
        out=f"{folder}/{one.seed}-{one.world}-{one.strategy}-{one.lanes}-{one.micro_batch}", batch=one.batch,
        lanes=one.lanes, micro_batch=one.micro_batch, strategy=one.strategy,  # type: ignore[arg-type]
        clip=one.clip, dropout=one.dropout, steps=1, seed=one.seed,
    )  # fmt: skip
    with Run(cfg) as run:
        task, _ = run.prepare(lambda: toy.Toy(cfg.dropout), sgd(RATE))
        before = whole(run)
        data = run.batches(Rows(one))
        for _ in run.steps():
            for batch in run.lanes(data):
                run.backward(task(batch))
            norm = float(run.step())
        after = whole(run)
    return {"norm": norm} | {k: (before[k] - after[k]).numpy() / RATE for k in before} if run.me.rank == 0 else {}


def whole(run: Run) -> dict[str, Tensor]:
    """All weights, whole, on every rank."""
    mine = {}
    for name, tensor in run.strategy.tensors().items():
        if name.startswith("model/"):
            mine[name] = (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().cpu().clone()  # type: ignore[attr-defined]
    return {k: v for part in run.gather(mine) for k, v in part.items()}


def several(draws: Sequence[Draw], ports: Sequence[int], folder: str) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    return [gradients(one, port, folder) for one, port in zip(draws, ports, strict=True)]


def measure(draws: Sequence[Draw], folder: Path) -> list[dict[str, Any]]:
    """Every draw's gradients: in one world of processes for as many as can be, DeepSpeed's in worlds of their own."""
    found: list[dict[str, Any]] = [{}] * len(draws)
    groups: dict[Any, list[int]] = {}
    for i, one in enumerate(draws):
        zero = one.strategy.startswith("zero")
        groups.setdefault(i if zero else (one.world, one.strategy == "hybrid"), []).append(i)
    parts = [part[k : k + 10] for part in groups.values() for k in range(0, len(part), 10)]
    for part in track(parts, "worlds"):
        mine = [draws[i] for i in part]
        local = 2 if mine[0].strategy == "hybrid" else 0
        ports = [next(PORTS) for _ in mine]
        results = worlds.launch(
            mine[0].world, several, mine, ports, str(folder), local_world=local, env={"DLTRAIN_DEVICE": "cpu"}
        )
        for i, result in zip(part, results[0], strict=True):
            found[i] = result
    return found


def judge(one: Draw, got: dict[str, Any], want: dict[str, Any]) -> float:
    """The largest difference over the largest value: 0.0 is equality of bits."""
    apart = abs(got["norm"] - want["norm"]) / want["norm"]
    names = [k for k in want if k != "norm"]
    scale = max(float(np.abs(want[k]).max()) for k in names)
    for k in names:
        if one.exact and got[k].tobytes() != want[k].tobytes():
            apart = max(apart, float(np.abs(got[k] - want[k]).max()) / scale, 1e-30)
        apart = max(apart, float(np.abs(got[k] - want[k]).max()) / scale)
    return apart


def compare(draws: Sequence[Draw], folder: Path) -> list[tuple[Draw, float]]:
    alone = measure([one.alone() for one in draws], folder / "alone")
    together = measure(draws, folder / "together")
    return [(one, judge(one, a, b)) for one, a, b in zip(draws, together, alone, strict=True)]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--draws", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--folder", type=Path, default=Path("runs/random-draws"))
    args = parser.parse_args()
    began = datetime.now(UTC)
    found = compare([draw(i, args.seed) for i in range(args.draws)], args.folder / f"{began:%Y%m%dT%H%M%S}")
    exact = [(one, apart) for one, apart in found if one.exact]
    close = [(one, apart) for one, apart in found if not one.exact]
    wrong = [asdict(one) for one, apart in found if apart > (0.0 if one.exact else CLOSE)]
    summary = {
        "command": " ".join(["python", *sys.argv]), "date": began.isoformat(timespec="seconds"),
        "seconds": round((datetime.now(UTC) - began).total_seconds()), "environment": rundir.environment()[0],
        "draws": len(found), "where lanes apply": len(exact), "of these bit-equal": sum(a == 0.0 for _, a in exact),
        "elsewhere": len(close), "of these within 1e-6": sum(a <= CLOSE for _, a in close),
        "largest relative difference elsewhere": max((a for _, a in close), default=0.0), "wrong": wrong,
    }  # fmt: skip
    rundir.write_json(args.out, summary)
    print(rundir.encode({k: v for k, v in summary.items() if k != "environment"}, indent=1))
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
