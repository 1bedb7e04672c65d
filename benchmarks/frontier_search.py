"""How many FLOPs until a search over sizes and hyperparameters knows the frontier of loss against cost? A planted one, in closed form.

    python benchmarks/frontier_search.py [seeds]

loss = (E + A C**-a) exp(k/2 (ln lr - law(C))**2 + m/2 (ln batch - law(C))**2) (1 + noise), C the FLOPs counted for the point. Scored after
`POINTS` points: FLOPs spent; how far the frontier found is above the planted one, the mean over all costs of
the grid; by how many standard errors the slope of ln lr against ln FLOPs is off; and the FLOPs that random points
of the grid need until their frontier is as near, drawn alike and drawn in inverse proportion to their cost, over the FLOPs of the search.
"""

from __future__ import annotations

import math
import sys

import numpy as np

from scaletune.recipe import Recipe, Search, validated
from scaletune.sweeping.search.pareto import TALL, best, costs, pareto, scaling
from scaletune.sweeping.search.space import Cell, Point, cells

POINTS = (30, 60, 90)
FLOOR, A, POWER = 2.0, 220.0, 0.17  # E, A, a
LR, BATCH = (-0.15, 0.25)  # slopes against ln FLOPs
CURVED = (0.03, 0.02)


def space(seed: int, points: int) -> Recipe:
    return validated(
        {
            "model": {"width": 32, "depth": 2, "head_dim": 16},
            "parametrization": {"base_width": 32},
            "data": {"seq_len": 64},
            "budget": {"tokens": 2**18, "batch_tokens": 2**12},
            "axes": {
                "width": [2**k for k in range(5, 10)], "tokens": [2**k for k in range(18, 25)],
                "batch_tokens": [2**k for k in range(10, 17)], "lr": [2.0 ** (-k / 2) for k in range(24, 7, -1)],
            },
            "search": {"kind": "pareto", "budget": points, "seed": seed},
        },
        "planted",
    )  # fmt: skip


def planted(cost: float, lr: float, batch: float, middle: float) -> float:
    """The middle of the costs has its best lr at 2**-8 and its best batch at 2**13."""
    away = math.log(cost / middle)
    dx, dy = (
        math.log(lr) + 8 * math.log(2) - LR * away,
        math.log(batch) - 13 * math.log(2) - BATCH * away,
    )
    return (FLOOR + A * cost**-POWER) * math.exp(CURVED[0] * dx**2 / 2 + CURVED[1] * dy**2 / 2)


class World:
    """A cell of the planted space, and what its points are worth."""

    def __init__(self, seed: int, n: int, noise: float):
        self.asked = space(seed, n)
        self.cell: Cell = cells(self.asked)[0]
        self.cost = costs(self.cell)
        self.grid = np.array(sorted({self.cost(point) for point in self.cell.points}))
        self.middle = math.sqrt(self.grid[0] * self.grid[-1])
        self.noise = noise

    def loss(self, point: Point) -> float:
        rng = np.random.default_rng([int(1e6 * abs(math.log(value))) for value in point])
        value = dict(zip([path.split(".")[-1] for path in self.cell.paths], point, strict=True))
        return planted(self.cost(point), value["lr"], value["batch_tokens"], self.middle) * (
            1 + self.noise * rng.normal()
        )

    def gap(self, seen: dict[Point, float]) -> float:
        """Mean over the grid's costs of ln lowest loss so far at no more, over the planted one: TALL at most, and where nothing is as cheap."""
        front = best(self.cost, seen)
        at = np.searchsorted([self.cost(point) for point in front], self.grid, side="right")
        lowest = np.array([math.inf, *(seen[point] for point in front)])[at]
        return float(np.minimum(np.log(lowest / (FLOOR + A * self.grid**-POWER)), TALL).mean())


def searched(world: World, search: Search) -> dict[Point, float]:
    waves, losses, seen = pareto(world.cell, search), None, dict[Point, float]()
    while True:
        try:
            wanted = waves.send(losses)  # type: ignore[arg-type]
        except StopIteration:
            return seen
        losses = [world.loss(point) for _, point, _ in wanted]
        seen |= zip((point for _, point, _ in wanted), losses, strict=True)


def at_random(world: World, seed: int, near: float, power: float) -> float:
    """FLOPs until random points, drawn in proportion to cost**-power, have a frontier as near."""
    grid = world.cell.points
    cost = np.array([world.cost(point) for point in grid])
    seen, spent = dict[Point, float](), 0.0
    for i in np.argsort(
        np.random.default_rng([seed, 5]).exponential(size=len(grid)) * cost**power
    ):  # each once: Efraimidis & Spirakis 2006
        seen[grid[i]] = world.loss(grid[i])
        spent += cost[i]
        if world.gap(seen) <= near:
            break
    return spent


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(
        "| points | noise | FLOPs of the whole grid | above the planted frontier | slope of ln lr, planted -0.15 | sds off | random: FLOPs to as near | drawn as 1/cost |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for noise in (0.0, 0.002):
        for n in POINTS:
            rows = []
            for seed in range(seeds):
                world = World(seed, n, noise)
                whole = sum(world.cost(point) for point in world.cell.points)
                seen = searched(world, world.asked.search)
                gap, spent = world.gap(seen), sum(world.cost(point) for point in seen)
                front = best(world.cost, seen)
                law = next(
                    (
                        x
                        for x in scaling(world.cell.paths, front, [world.cost(p) for p in front])
                        if x["axis"].endswith("lr")
                    ),
                    None,
                )
                slope, se = (law["slope"], law["slope_se"]) if law else (math.nan, math.nan)
                others = [at_random(world, seed, gap, power) / spent for power in (0.0, 1.0)]
                rows.append((spent / whole, gap, slope, se, (slope - LR) / se, *others))
            m = np.median(rows, 0)
            off = [f"{r[4]:.1f}" for r in rows]
            print(
                f"| {n} | {noise:g} | {100 * m[0]:.2g} % | {100 * m[1]:.2g} % | {m[2]:.3f} +- {m[3]:.3f} | {', '.join(off)} | {m[5]:.3g} | {m[6]:.3g} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
