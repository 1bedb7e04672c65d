"""How many runs until a search inside one (lr, batch) cell has found a good one? Public grids as lookup tables.

    python benchmarks/search_methods.py [path/to/steplaw_dense_dev.csv] [trials]

A run counts once however often a sampler asks for it. Scored: unique runs until one within 0.25 % and within 0.1 % of the cell's lowest
loss, median (90th percentile) over cells and seeds; on whole grids and on random crops, which are not centred on the optimum. Optuna's
samplers ask on the same grid of indices. Without the data there is nothing to do.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import optuna
import pandas as pd
from numpy.typing import NDArray

from scaletune.sweeping.search.lr_basin import propose

DATA = Path(__file__).resolve().parents[2] / "shared" / "data" / "steplaw_dense_dev.csv"
WITHIN = (0.0025, 0.001)
MOST = 80  # unique runs after which a search has failed
Array = NDArray[np.float64]
Cell = tuple[Array, Array]  # [G, 2] of ln lr and ln batch_tokens; [G] losses
Search = Callable[[Cell, int], Iterator[int]]  # the order in which points are asked for


def grids(path: Path) -> list[Cell]:
    """The cells; of runs that share a point the lowest loss."""
    found = []
    for _, rows in pd.read_csv(path).groupby("cell_id"):
        best = rows.groupby(["lr_grid", "batch_tokens"], as_index=False)["loss"].min()
        found.append(
            (
                np.log(best[["lr_grid", "batch_tokens"]].to_numpy(float)),
                best["loss"].to_numpy(float),
            )
        )
    return found


def crop(cell: Cell, seed: int) -> Cell:
    """A random rectangle of at least 6 learning rates, 5 batch sizes and 20 runs."""
    points, losses = cell
    rng = np.random.default_rng([seed, 1])
    while True:
        keep = np.ones(len(points), bool)
        for axis, least in ((0, 6), (1, 5)):
            values = np.unique(points[:, axis])
            size = int(rng.integers(least, len(values) + 1))
            first = int(rng.integers(0, len(values) - size + 1))
            keep &= (points[:, axis] >= values[first]) & (
                points[:, axis] <= values[first + size - 1]
            )
        if keep.sum() >= 20:
            return points[keep], losses[keep]


def ours(cell: Cell, seed: int) -> Iterator[int]:
    points, losses = cell
    seen: list[int] = []
    while len(seen) < len(points):
        seen.append(propose(points, seen, [losses[i] for i in seen], seed=seed).index)
        yield seen[-1]


def at_random(cell: Cell, seed: int) -> Iterator[int]:
    yield from np.random.default_rng([seed, 2]).permutation(len(cell[0])).tolist()


def by_optuna(make: Callable[[int], optuna.samplers.BaseSampler]) -> Search:
    def asked(cell: Cell, seed: int) -> Iterator[int]:
        points, losses = cell
        axes = [np.unique(points[:, axis]) for axis in (0, 1)]
        study = optuna.create_study(sampler=make(seed))
        for _ in range(6 * MOST):
            trial = study.ask()
            wanted = [
                values[trial.suggest_int(f"axis{axis}", 0, len(values) - 1)]
                for axis, values in enumerate(axes)
            ]
            index = int(
                np.abs(points - wanted).sum(1).argmin()
            )  # a grid with holes: the nearest run
            study.tell(trial, float(losses[index]))
            yield index

    return asked


METHODS: dict[str, Search] = {
    "random": at_random,
    "TPE (Optuna)": by_optuna(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "GP (Optuna)": by_optuna(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "CMA-ES (Optuna)": by_optuna(lambda seed: optuna.samplers.CmaEsSampler(seed=seed)),
    "scaletune": ours,
}


def runs_until(order: Iterator[int], losses: Array) -> list[int]:
    """Unique runs until each of WITHIN is reached; MOST + 1 when it is not."""
    needed, seen = [MOST + 1] * len(WITHIN), set[int]()
    for index in order:
        seen.add(index)
        for i, share in enumerate(WITHIN):
            if losses[index] <= (1 + share) * losses.min():
                needed[i] = min(needed[i], len(seen))
        if max(needed) <= MOST or len(seen) >= MOST:
            break
    return needed


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else DATA
    trials = int(sys.argv[2]) if len(sys.argv) > 2 else 5
    if not path.exists():
        raise SystemExit(
            f"{path} is not here: the grids of arXiv:2503.04715, its dense runs, are what this reads"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")  # Optuna's own, of experimental samplers
    cells = grids(path)
    print(
        f"{len(cells)} grids, {trials} seeds\n\n| search | whole: 0.25 % | 0.1 % | crops: 0.25 % | 0.1 % |\n|---|---|---|---|---|",
        flush=True,
    )
    for name, method in METHODS.items():
        shown = []
        for cut in (False, True):
            asked = [
                (crop(cell, 100 * seed + i) if cut else cell, seed)
                for i, cell in enumerate(cells)
                for seed in range(trials)
            ]
            needed = np.array([runs_until(method(cell, seed), cell[1]) for cell, seed in asked])
            shown += [
                f"{np.median(column):g} ({np.percentile(column, 90):g})" for column in needed.T
            ]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
