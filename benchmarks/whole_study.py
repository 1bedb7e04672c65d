"""What share of a full grid's FLOPs does a study need until the law names a good (lr, batch) at a cell nobody has trained?

    OMP_NUM_THREADS=1 python benchmarks/whole_study.py

Public Step Law runs as lookup tables. One cell at a time is held out; the other seven are what may be trained, and all of their runs
are the full grid. After every wave the held-out cell's (lr, batch) is predicted, and scored as in joint_surface.py: loss of the cell's own
smoothed surface there over its lowest. Needed: the share of FLOPs from which the gap stays within 0.15 % for as long as the method
is watched. Methods: search kind "joint", asked by its own belief and by the surface that `scaletune fit --law joint` fits to the
same runs; and runs in random order, with that surface. A quarter of an hour on a busy core.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator

import numpy as np
import pandas as pd
from joint_surface import Array, Smooth, joint, runs, smooth

from scaletune.errors import UserError
from scaletune.sweeping.search.joint_design import Place, believe, next_wave

WITHIN, WATCHED = 0.15, 0.05  # % of loss; share of the full grid's FLOPs
SEEDS = 3
Run = tuple[int, int]  # cell, index of its grid
Study = tuple[
    list[Place], list[Array], pd.DataFrame
]  # cells, their losses (NaN: diverged), the same as a table with `cell` and `index`


def study(table: pd.DataFrame) -> Study:
    """The cells; of runs that share a point the lowest loss."""
    places, losses, rows = [], [], []
    for cell, (_, found) in enumerate(
        table.assign(loss=table["loss"].where(table["status"] == "done")).groupby("cell_id")
    ):
        best = (
            found.sort_values("loss")
            .drop_duplicates(["lr", "batch_tokens"])
            .sort_values(["lr", "batch_tokens"])
        )
        n, d = float(best["n_params"].median()), float(best["tokens_nominal"].median())
        places.append(Place(n, d, 6 * n * d, np.log(best[["lr", "batch_tokens"]].to_numpy(float))))
        losses.append(best["loss"].to_numpy(float))
        rows.append(best.assign(cell=cell, index=range(len(best))))
    return places, losses, pd.concat(rows, ignore_index=True)


def by_search(known: Study, target: Place) -> Iterator[list[Run]]:
    """The waves that kind "joint" asks for."""
    places, losses, _ = known
    seen: dict[Run, float] = {}
    while True:
        _, wave = next_wave(places, seen, (target.n_params, target.tokens), 1)
        seen |= {(cell, index): losses[cell][index] for cell, index in wave}
        yield wave


def at_random(known: Study, seed: int) -> Iterator[list[Run]]:
    order = known[2].sample(frac=1, random_state=seed)[["cell", "index"]].to_numpy()
    yield from ([(int(c), int(i)) for c, i in order[k : k + 8]] for k in range(0, len(order), 8))


def believed(known: Study, trained: list[Run], target: Place) -> Array:
    belief = believe(known[0], {(c, i): known[1][c][i] for c, i in trained})
    return belief.law(belief.theta, target.n_params, target.tokens)


def fitted(known: Study, trained: list[Run], target: Place) -> Array | None:
    """None while there is too little to fit."""
    try:
        here = known[2].merge(pd.DataFrame(trained, columns=["cell", "index"]))
        lr, batch, _ = joint(here.drop(columns=["cell", "index"]))(target.n_params, target.tokens)
    except UserError:
        return None
    return np.log([lr, batch])


def needed(
    waves: Iterator[list[Run]],
    known: Study,
    target: Place,
    surface: Smooth,
    predict,
    watched: float,
) -> tuple[float, float]:
    """(share of FLOPs from which the gap stays within, the gap in % at the end); infinite when it does not."""
    full = sum(place.flops * len(place.grid) for place in known[0])
    trained: list[Run] = []
    since, gap, spent = math.inf, math.inf, 0.0
    while spent < watched and len(trained) < len(known[2]):
        trained += next(waves)
        spent = sum(known[0][cell].flops for cell, _ in trained) / full
        at = predict(known, trained, target)
        gap = math.inf if at is None else 100 * math.expm1(float(surface(at)[0]) - surface.lowest)
        since = math.inf if gap > WITHIN else min(since, spent)
    return since, gap


def main() -> None:
    table = runs()
    surfaces = {
        cell: smooth(rows) for cell, rows in table[table["status"] == "done"].groupby("cell_id")
    }
    methods = {
        "joint, own belief": (
            lambda known, target, seed: by_search(known, target),
            believed,
            WATCHED,
            1,
        ),
        "joint, fitted surface": (
            lambda known, target, seed: by_search(known, target),
            fitted,
            WATCHED,
            1,
        ),
        "random order, fitted surface": (
            lambda known, target, seed: at_random(known, seed),
            fitted,
            4 * WATCHED,
            SEEDS,
        ),
    }
    print(
        "| method | median | largest | reached | mean gap at the end, % |\n|---|---|---|---|---|",
        flush=True,
    )
    for name, (order, predict, watched, seeds) in methods.items():
        found = []
        for cell, surface in surfaces.items():
            known = study(table[table["cell_id"] != cell])
            target = Place(surface.n_params, surface.tokens, 1.0, np.empty((0, 2)))
            found += [
                needed(order(known, target, seed), known, target, surface, predict, watched)
                for seed in range(seeds)
            ]
        shares, gaps = np.array(found).T
        most = f"{shares.max():.1%}" if np.isfinite(shares).all() else f"not within {watched:.0%}"
        print(
            f"| {name} | {np.median(shares):.1%} | {most} | {np.isfinite(shares).sum()} of {len(shares)} | {gaps.mean():.3f} |",
            flush=True,
        )


if __name__ == "__main__":
    start = time.perf_counter()
    main()
    print(f"\n{time.perf_counter() - start:.0f} s")
