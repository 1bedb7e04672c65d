"""Measures the FLOPs that a study needs until its law predicts a good (lr, batch size).

Public Step Law runs serve as lookup tables. Each setting is held out in turn; the other seven may
be trained, and all of their runs are the full grid. After every wave (lr, batch size) of the
held-out setting is predicted and scored as in joint_surface.py: excess loss on the setting's own
smoothed surface. Result: the share of the grid's FLOPs from which on the excess loss stays within
0.15 %, as long as the method is watched. Methods: search kind "joint", with its own prediction and
with that of `scaletune fit --law joint` on the same runs; and runs in random order with the latter.
Takes a quarter of an hour on a busy core.

    OMP_NUM_THREADS=1 python benchmarks/whole_study.py
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
from joint_surface import Array, Smooth, joint, runs, smooth

from scaletune.errors import UserError
from scaletune.sweeping.search.joint_design import CellGrid, fit_surface, next_wave

WITHIN, WATCHED = 0.15, 0.05  # % of loss; share of the full grid's FLOPs
SEEDS = 3
Run = tuple[int, int]  # cell, index in its grid
# The cells, their losses (NaN: diverged), and the same as a table with `cell` and `index`.
Study = tuple[list[CellGrid], list[Array], pd.DataFrame]


def build_study(table: pd.DataFrame) -> Study:
    """The cells of a table. Of runs at the same (lr, batch size) the lowest loss counts."""
    cells, losses, rows = [], [], []
    table = table.assign(loss=table["loss"].where(table["status"] == "done"))
    for cell, (_, runs_of_cell) in enumerate(table.groupby("cell_id")):
        lowest = runs_of_cell.sort_values("loss").drop_duplicates(["lr", "batch_tokens"])
        best = lowest.sort_values(["lr", "batch_tokens"])
        n, d = float(best["n_params"].median()), float(best["tokens_nominal"].median())
        cells.append(
            CellGrid(n, d, 6 * n * d, np.log(best[["lr", "batch_tokens"]].to_numpy(float)))
        )
        losses.append(best["loss"].to_numpy(float))
        rows.append(best.assign(cell=cell, index=range(len(best))))
    return cells, losses, pd.concat(rows, ignore_index=True)


def search_waves(others: Study, target: CellGrid) -> Iterator[list[Run]]:
    """The waves of search kind "joint"."""
    cells, losses, _ = others
    seen: dict[Run, float] = {}
    while True:
        wave = next_wave(cells, seen, (target.n_params, target.tokens), 1).runs
        seen |= {(cell, index): losses[cell][index] for cell, index in wave}
        yield wave


def random_waves(others: Study, seed: int) -> Iterator[list[Run]]:
    order = others[2].sample(frac=1, random_state=seed)[["cell", "index"]].to_numpy()
    yield from ([(int(c), int(i)) for c, i in order[k : k + 8]] for k in range(0, len(order), 8))


def search_prediction(others: Study, trained: list[Run], target: CellGrid) -> Array:
    losses = {(c, i): others[1][c][i] for c, i in trained}
    return fit_surface(others[0], losses).law.optimum(target.n_params, target.tokens)


def law_prediction(others: Study, trained: list[Run], target: CellGrid) -> Array | None:
    """None while there are too few runs to fit."""
    try:
        here = others[2].merge(pd.DataFrame(trained, columns=["cell", "index"]))
        lr, batch, _ = joint(here.drop(columns=["cell", "index"]))(target.n_params, target.tokens)
    except UserError:
        return None
    return np.log([lr, batch])


def share_needed(
    waves: Iterator[list[Run]],
    others: Study,
    target: CellGrid,
    surface: Smooth,
    predict,
    watched: float,
) -> tuple[float, float]:
    """(share of FLOPs from which on the excess loss stays within WITHIN, last excess loss in %).

    The share is infinite if the excess loss does not stay within WITHIN.
    """
    full = sum(cell.flops * len(cell.grid) for cell in others[0])
    trained: list[Run] = []
    since, gap, spent = math.inf, math.inf, 0.0
    while spent < watched and len(trained) < len(others[2]):
        trained += next(waves)
        spent = sum(others[0][cell].flops for cell, _ in trained) / full
        at = predict(others, trained, target)
        gap = math.inf if at is None else 100 * math.expm1(float(surface(at)[0]) - surface.lowest)
        since = math.inf if gap > WITHIN else min(since, spent)
    return since, gap


def main() -> None:
    table = runs()
    surfaces = {
        cell: smooth(rows) for cell, rows in table[table["status"] == "done"].groupby("cell_id")
    }
    methods = {
        'search kind "joint", its own prediction': (
            lambda others, target, seed: search_waves(others, target),
            search_prediction,
            WATCHED,
            1,
        ),
        "same runs, prediction of `fit --law joint`": (
            lambda others, target, seed: search_waves(others, target),
            law_prediction,
            WATCHED,
            1,
        ),
        "random order, prediction of `fit --law joint`": (
            lambda others, target, seed: random_waves(others, seed),
            law_prediction,
            4 * WATCHED,
            SEEDS,
        ),
    }
    print("| method | median | largest | reached | mean excess loss at the end, % |")
    print("|---|---|---|---|---|", flush=True)
    for name, (order, predict, watched, seeds) in methods.items():
        results = []
        for cell, surface in surfaces.items():
            others = build_study(table[table["cell_id"] != cell])
            target = CellGrid(surface.n_params, surface.tokens, 1.0, np.empty((0, 2)))
            results += [
                share_needed(order(others, target, seed), others, target, surface, predict, watched)
                for seed in range(seeds)
            ]
        shares, gaps = np.array(results).T
        most = f"{shares.max():.1%}" if np.isfinite(shares).all() else f"not within {watched:.0%}"
        print(
            f"| {name} | {np.median(shares):.1%} | {most} "
            f"| {np.isfinite(shares).sum()} of {len(shares)} | {gaps.mean():.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s")
