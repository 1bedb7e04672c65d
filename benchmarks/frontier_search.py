"""Measures how many FLOPs search kind "pareto" needs to find a known frontier of loss against cost.

The simulated loss has a closed form, with C the FLOPs counted for the point:

    loss = (E + A C**-a) exp(k/2 (ln lr - law(C))**2 + m/2 (ln batch - law(C))**2) (1 + noise)

After `POINTS` points this prints: FLOPs spent; how far the frontier that was found is above the
true one, as a mean over all costs of the grid; the error of the slope of ln lr against ln FLOPs in
standard errors; and the FLOPs that random search needs for a frontier as near, over those of the
search. Random search draws the points of the grid uniformly, or in inverse proportion to their
cost.

    python benchmarks/frontier_search.py [seeds]
"""

from __future__ import annotations

import math
import sys

import numpy as np

from scaletune.recipe import Recipe, SearchSection, validate_recipe
from scaletune.sweeping.search.pareto import (
    TALL,
    fit_scaling,
    flops_function,
    frontier_points,
    search_frontier,
)
from scaletune.sweeping.search.space import Cell, Point, build_cells

POINTS = (30, 60, 90)
MIN_LOSS, A, POWER = 2.0, 220.0, 0.17  # E, A, a
LR_SLOPE, BATCH_SLOPE = (-0.15, 0.25)  # against ln FLOPs
CURVATURE = (0.03, 0.02)  # k, m
HEADER = (
    "| points | noise | share of the grid's FLOPs | above the frontier | slope of ln lr "
    "| error / standard error, per seed | random search, uniform | random search, 1/cost |\n"
    + "|---" * 8
    + "|"
)


def search_recipe(seed: int, points: int) -> Recipe:
    axes = {
        "width": [2**k for k in range(5, 10)],
        "tokens": [2**k for k in range(18, 25)],
        "batch_tokens": [2**k for k in range(10, 17)],
        "lr": [2.0 ** (-k / 2) for k in range(24, 7, -1)],
    }
    values = {
        "model": {"width": 32, "depth": 2, "head_dim": 16},
        "parametrization": {"base_width": 32},
        "data": {"seq_len": 64},
        "budget": {"tokens": 2**18, "batch_tokens": 2**12},
        "axes": axes,
        "search": {"kind": "pareto", "budget": points, "seed": seed},
    }
    return validate_recipe(values, "planted")


def true_loss(cost: float, lr: float, batch: float, middle: float) -> float:
    """The loss without noise. At the middle of the costs the best lr is 2**-8, the batch 2**13."""
    x = math.log(cost / middle)
    d_lr = math.log(lr) + 8 * math.log(2) - LR_SLOPE * x
    d_batch = math.log(batch) - 13 * math.log(2) - BATCH_SLOPE * x
    penalty = CURVATURE[0] * d_lr**2 / 2 + CURVATURE[1] * d_batch**2 / 2
    return (MIN_LOSS + A * cost**-POWER) * math.exp(penalty)


class Simulation:
    """The grid of a search, and the simulated losses of its points."""

    def __init__(self, seed: int, n: int, noise: float):
        self.recipe = search_recipe(seed, n)
        self.cell: Cell = build_cells(self.recipe)[0]
        self.cost = flops_function(self.cell)
        self.grid = np.array(sorted({self.cost(point) for point in self.cell.points}))
        self.middle = math.sqrt(self.grid[0] * self.grid[-1])
        self.noise = noise

    def loss(self, point: Point) -> float:
        rng = np.random.default_rng([int(1e6 * abs(math.log(value))) for value in point])
        value = dict(zip([path.split(".")[-1] for path in self.cell.paths], point, strict=True))
        return true_loss(self.cost(point), value["lr"], value["batch_tokens"], self.middle) * (
            1 + self.noise * rng.normal()
        )

    def gap(self, losses: dict[Point, float]) -> float:
        """ln (lowest loss so far at each cost or less / true one), mean over the grid's costs.

        A cost contributes TALL at most, and TALL if no point is as cheap.
        """
        front = frontier_points(self.cost, losses)
        at = np.searchsorted([self.cost(point) for point in front], self.grid, side="right")
        lowest = np.array([math.inf, *(losses[point] for point in front)])[at]
        true = MIN_LOSS + A * self.grid**-POWER
        return float(np.minimum(np.log(lowest / true), TALL).mean())


def run_search(simulation: Simulation, search: SearchSection) -> dict[Point, float]:
    """{point: loss} of all points that the search trains."""
    waves, losses = search_frontier(simulation.cell, search), None
    results = dict[Point, float]()
    while True:
        try:
            wave = waves.send(losses)  # type: ignore[arg-type]
        except StopIteration:
            return results
        losses = [simulation.loss(point) for _, point, _ in wave]
        results |= zip((point for _, point, _ in wave), losses, strict=True)


def random_flops(simulation: Simulation, seed: int, gap: float, power: float) -> float:
    """FLOPs until random points, drawn in proportion to cost**-power, have a gap as small.

    No point is drawn twice (Efraimidis & Spirakis 2006).
    """
    grid = simulation.cell.points
    cost = np.array([simulation.cost(point) for point in grid])
    losses, spent = dict[Point, float](), 0.0
    keys = np.random.default_rng([seed, 5]).exponential(size=len(grid)) * cost**power
    for i in np.argsort(keys):
        losses[grid[i]] = simulation.loss(grid[i])
        spent += cost[i]
        if simulation.gap(losses) <= gap:
            break
    return spent


def measure(seed: int, n: int, noise: float) -> tuple[float, ...]:
    """(share of FLOPs, gap, slope, its standard error, error / standard error, random ratios)."""
    simulation = Simulation(seed, n, noise)
    whole = sum(simulation.cost(point) for point in simulation.cell.points)
    losses = run_search(simulation, simulation.recipe.search)
    gap, spent = simulation.gap(losses), sum(simulation.cost(point) for point in losses)
    front = frontier_points(simulation.cost, losses)
    laws = fit_scaling(simulation.cell.paths, front, [simulation.cost(p) for p in front])
    law = next((law for law in laws if law["axis"].endswith("lr")), None)
    slope, se = (law["slope"], law["slope_se"]) if law else (math.nan, math.nan)
    ratios = [random_flops(simulation, seed, gap, power) / spent for power in (0.0, 1.0)]
    return spent / whole, gap, slope, se, (slope - LR_SLOPE) / se, *ratios


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(HEADER)
    for noise in (0.0, 0.002):
        for n in POINTS:
            rows = [measure(seed, n, noise) for seed in range(seeds)]
            share, gap, slope, se, _, uniform, inverse = np.median(rows, 0)
            errors = ", ".join(f"{row[4]:.1f}" for row in rows)
            print(
                f"| {n} | {noise:g} | {100 * share:.2g} % | {100 * gap:.2g} % "
                f"| {slope:.3f} ± {se:.3f} | {errors} | {uniform:.3g} | {inverse:.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
