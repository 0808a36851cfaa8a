"""Double descent in random features. Belkin et al. 2019, https://arxiv.org/abs/1812.11118, figure 2.

    python recipes/studies/double_descent_study.py claim      # the figures, the verdict and the plot

P random Fourier features of images, cos(w.x + b) with random w and b (Rahimi and Recht 2007, NeurIPS), and on top of
them the least-squares solution of least norm for one-hot labels. Below P = N, the training rows, the test error is the
usual U: it falls, then rises steeply towards P = N, where the training error reaches zero and the norm of the solution
its peak. Beyond that both fall again with every feature added.

Departs from the paper: N = 1,000 rows of MNIST in `claim` where the paper has 10,000 (`paper` has them all); a part of
the training labels is random in `claim` as in Nakkiran et al. 2019, https://arxiv.org/abs/1912.02292, and none in
`paper`; test labels are clean; the paper's features are complex exponentials. float64 throughout: at P = N the problem
is so badly conditioned that in float32 rounding would decide the height of the peak.

A closed form: there is nothing to train, hence no strategy and no checkpoint. The cells (seed, P) are independent;
each is kept once made, so a killed study goes on, and `sbatch --array` deals them (dltrain/grid.py). Networks that are
trained, ever wider: deep_double_descent_study.py.

Measured: recipes/README.md (settings and bounds were chosen on seed 100). `gpu` is `paper` for one seed and up to four
times N; the error should peak at N, and end below where it was before: not yet measured.
"""

import functools
import gzip
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import dltrain
from dltrain.config import Settings


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    data: str = ""  # folder of MNIST's idx files (.gz), by default $DLTRAIN_DATA/mnist; or clusters: ten Gaussians
    rows: int = 1000  # N, for training
    test_rows: int = 2000
    noise: float = 0.15  # part of the training labels that are drawn anew
    bandwidth: float = 5.0  # of the Gaussian kernel; pixels are in [0, 1]
    features: tuple[int, ...] = (50, 100, 200, 400, 600, 800, 900, 1000, 1100, 1250, 1600, 2500, 4000, 8000)  # P
    seeds: int = 3


PAPER = Config(
    rows=10_000, test_rows=10_000, noise=0.0, seeds=5,
    features=(1000, 2000, 4000, 6000, 8000, 9000, 10_000, 11_000, 12_000, 15_000, 20_000, 40_000, 60_000),
)  # fmt: skip
PRESETS = {
    "claim": Config(),
    "debug": Config(data="clusters", rows=40, test_rows=200, bandwidth=20.0, features=(10, 20, 40, 80, 320), seeds=2),
    "gpu": replace(PAPER, seeds=1, features=PAPER.features[:-1]),
    "paper": PAPER,
}  # fmt: skip

if __name__ == "__main__":
    dltrain.answer_help(Config, PRESETS)

import numpy as np
import torch
from torch import Tensor

from dltrain.claim import Figure, judge
from dltrain.errors import UserError
from dltrain.grid import grid, table
from dltrain.plot import curves
from dltrain.seeds import key

PLOT = "double_descent.png"
TUNED_ON = (100,)

# N training rows, M test rows, E pixels, P features, C classes


def images(cfg: Config, seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Training images [N, E] and labels [N], a part of them wrong, and clean test ones [M, E] and [M]."""
    random = np.random.Generator(np.random.Philox(key=key("double descent", seed)))
    if cfg.data == "clusters":
        y = random.integers(10, size=cfg.rows + cfg.test_rows)
        x = 2.0 * random.normal(size=(10, 20))[y] + random.normal(size=(len(y), 20))
        x, y, x_test, y_test = x[: cfg.rows], y[: cfg.rows], x[cfg.rows :], y[cfg.rows :]
    else:
        folder = Path(cfg.data or Path(os.environ.get("DLTRAIN_DATA", "")) / "mnist")
        (x, y), (x_test, y_test) = mnist(folder, "train"), mnist(folder, "t10k")
        chosen = random.permutation(len(x))[: cfg.rows]
        x, y, x_test, y_test = x[chosen], y[chosen], x_test[: cfg.test_rows], y_test[: cfg.test_rows]
    wrong = random.random(cfg.rows) < cfg.noise
    y = np.where(wrong, random.integers(10, size=cfg.rows), y)
    return (
        torch.tensor(x),
        torch.tensor(y, dtype=torch.long),
        torch.tensor(x_test),
        torch.tensor(y_test, dtype=torch.long),
    )


@functools.cache
def mnist(folder: Path, part: str) -> tuple[np.ndarray, np.ndarray]:
    """float64 [60,000 or 10,000, 784] in [0, 1], and labels."""
    try:
        pixels = gzip.decompress((folder / f"{part}-images-idx3-ubyte.gz").read_bytes())[16:]
        labels = gzip.decompress((folder / f"{part}-labels-idx1-ubyte.gz").read_bytes())[8:]
    except OSError as error:
        raise UserError(
            f"{error.filename}: no such file; give --data, or set DLTRAIN_DATA to a folder with mnist"
        ) from None
    return np.frombuffer(pixels, np.uint8).reshape(-1, 784) / 255.0, np.frombuffer(labels, np.uint8)


def main(cfg: Config) -> dict[int, list[dict[str, Any]]]:
    """Measure the grid and draw it; the cells by seed, in order of P."""
    torch.set_num_threads(int(os.environ.get("DLTRAIN_THREADS", 1)))  # their number changes the bits
    device, driver = ("cuda", "gels") if torch.cuda.is_available() else ("cpu", "gelsd")  # a GPU has no other

    def measure(seed: int, features: int) -> dict[str, float]:
        x_NE, y_N, x_ME, y_M = (part.to(device) for part in images(cfg, seed))
        generator = torch.Generator().manual_seed(key("features", seed))
        P = max(cfg.features)  # the features of a small P are among those of a greater one, as in the paper
        w_EP = torch.randn(x_NE.shape[1], P, generator=generator, dtype=torch.float64)[:, :features] / cfg.bandwidth
        b_P = 2 * torch.pi * torch.rand(P, generator=generator, dtype=torch.float64)[:features]
        w_EP, b_P = w_EP.to(device), b_P.to(device)
        z_NP, z_MP = torch.cos(x_NE @ w_EP + b_P), torch.cos(x_ME @ w_EP + b_P)
        one_hot_NC = torch.nn.functional.one_hot(y_N, 10).double()
        a_PC = torch.linalg.lstsq(z_NP, one_hot_NC, driver=driver).solution  # of least norm where there are many
        fit_NC, predicted_MC = z_NP @ a_PC, z_MP @ a_PC
        return {
            "train_error": 100 * float((fit_NC.argmax(1) != y_N).double().mean()),
            "test_error": 100 * float((predicted_MC.argmax(1) != y_M).double().mean()),
            "test_mse": float((predicted_MC - torch.nn.functional.one_hot(y_M, 10)).square().mean()),
            "norm": float(a_PC.norm()),
        }

    seeds = range(cfg.seed, cfg.seed + cfg.seeds)
    cells = grid(cfg, [{"seed": seed, "features": P} for seed in seeds for P in cfg.features], measure)
    by_seed = {seed: [cell for cell in cells if cell["seed"] == seed] for seed in seeds}

    def panel(k: str) -> dict[str, tuple[list[float], list[float]]]:
        return {
            f"seed {seed}": ([c["features"] for c in found], [c[k] for c in found]) for seed, found in by_seed.items()
        }

    panels = {"test error (%)": "test_error", "training error (%)": "train_error", "norm of the solution": "norm"}
    curves(
        Path(cfg.out) / PLOT, {title: panel(k) for title, k in panels.items()}, x="random features",
        log=["norm of the solution"], mark=cfg.rows,
    )  # fmt: skip
    print(f"{table(cells)}\nsee {Path(cfg.out) / PLOT}", flush=True)
    return by_seed


def claim(cfg: Config) -> None:
    """The test error falls, peaks at P = N, and falls again to below where it was before."""
    place, rise, fall, gain, fitted = ({} for _ in range(5))
    for seed, cells in main(cfg).items():
        error = {c["features"]: c["test_error"] for c in cells}
        valley = min(e for P, e in error.items() if cfg.rows > P)
        peak = max(error, key=lambda P: error[P])
        place[seed] = abs(peak / cfg.rows - 1)
        rise[seed] = error[peak] - valley
        fall[seed] = error[peak] - error[max(error)]
        gain[seed] = valley - error[max(error)]
        fitted[seed] = max(c["train_error"] for c in cells if c["features"] >= cfg.rows)
    judge(
        cfg,
        [
            Figure("distance of the peak from P = N (part of N)", place, "0", most=0.1),
            Figure("test error, rise from the first valley to the peak (points)", rise, "a peak", least=25),
            Figure("test error, fall from the peak to the most features (points)", fall, "a peak", least=30),
            Figure("test error, the most features below the first valley (points)", gain, "below", least=5),
            Figure("training error from P = N on (%)", fitted, "0", most=0),
        ],
        tuned_on=TUNED_ON,
        pictures=[Path(cfg.out) / PLOT],
    )


if __name__ == "__main__":
    dltrain.cli(main, Config, PRESETS, claim)
