"""Counts the runs that a search inside one (lr, batch size) setting needs to find a good one.

Public grids serve as lookup tables. A run counts once, however often a sampler proposes it. Result:
unique runs until one is within 0.25 % and within 0.1 % of the grid's lowest loss, median (90th
percentile) over grids and seeds; on whole grids and on random crops, which are not centred on the
optimum. Optuna's samplers work on the same grid of indices. Needs the public data.

    python benchmarks/search_methods.py [path/to/steplaw_dense_dev.csv] [trials]
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
MOST = 80  # unique runs after which a search counts as failed
Array = NDArray[np.float64]
Cell = tuple[Array, Array]  # [G, 2] of ln lr and ln batch_tokens; [G] losses
Search = Callable[[Cell, int], Iterator[int]]  # the order in which points are proposed


def grids(path: Path) -> list[Cell]:
    """The grids. Of runs at the same (lr, batch size) the lowest loss counts."""
    results = []
    for _, rows in pd.read_csv(path).groupby("cell_id"):
        best = rows.groupby(["lr_grid", "batch_tokens"], as_index=False)["loss"].min()
        results.append(
            (
                np.log(best[["lr_grid", "batch_tokens"]].to_numpy(float)),
                best["loss"].to_numpy(float),
            )
        )
    return results


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


def optuna_search(make: Callable[[int], optuna.samplers.BaseSampler]) -> Search:
    def propose_all(cell: Cell, seed: int) -> Iterator[int]:
        points, losses = cell
        axes = [np.unique(points[:, axis]) for axis in (0, 1)]
        study = optuna.create_study(sampler=make(seed))
        for _ in range(6 * MOST):
            trial = study.ask()
            wanted = [
                values[trial.suggest_int(f"axis{axis}", 0, len(values) - 1)]
                for axis, values in enumerate(axes)
            ]
            # The grid has holes: take the nearest run.
            index = int(np.abs(points - wanted).sum(1).argmin())
            study.tell(trial, float(losses[index]))
            yield index

    return propose_all


METHODS: dict[str, Search] = {
    "random": at_random,
    "TPE (Optuna)": optuna_search(lambda seed: optuna.samplers.TPESampler(seed=seed)),
    "GP (Optuna)": optuna_search(lambda seed: optuna.samplers.GPSampler(seed=seed)),
    "CMA-ES (Optuna)": optuna_search(lambda seed: optuna.samplers.CmaEsSampler(seed=seed)),
    "scaletune": ours,
}


def runs_until(order: Iterator[int], losses: Array) -> list[int]:
    """Unique runs until each of WITHIN is reached; MOST + 1 if it is not."""
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
            f"{path} does not exist: this benchmark reads the dense runs of arXiv:2503.04715"
        )
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    warnings.simplefilter("ignore")  # Optuna warns that some samplers are experimental
    cells = grids(path)
    print(f"{len(cells)} grids, {trials} seeds\n")
    print("| search | whole grids: 0.25 % | 0.1 % | crops: 0.25 % | 0.1 % |")
    print("|---|---|---|---|---|", flush=True)
    for name, method in METHODS.items():
        shown = []
        for cut in (False, True):
            cases = [
                (crop(cell, 100 * seed + i) if cut else cell, seed)
                for i, cell in enumerate(cells)
                for seed in range(trials)
            ]
            needed = np.array([runs_until(method(cell, seed), cell[1]) for cell, seed in cases])
            shown += [
                f"{np.median(column):g} ({np.percentile(column, 90):g})" for column in needed.T
            ]
        print(f"| {name} | {' | '.join(shown)} |", flush=True)


if __name__ == "__main__":
    main()
