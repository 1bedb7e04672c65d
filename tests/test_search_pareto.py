"""The search along the frontier of loss against compute.

Its parts are compared with references, the whole is run on a planted problem.
"""

import math

import numpy as np
import pytest
from scipy.integrate import quad
from scipy.stats import linregress, norm

from scaletune.sweeping.search.pareto import (
    expected_improvement,
    fit_scaling,
    flops_function,
    frontier,
    frontier_points,
    search_frontier,
)
from scaletune.sweeping.search.space import build_cells

pytest.importorskip("sklearn")

LR = [2.0 ** (-k / 2) for k in range(24, 7, -1)]
SLOPE, MINIMUM, A, POWER = -0.15, 2.0, 220.0, 0.17
AXES = {
    "width": [32, 64, 128, 256],
    "tokens": [2**k for k in range(13, 20)],
    "batch_tokens": [256, 512, 1024, 2048, 4096],
    "lr": LR,
}


def test_the_frontier_by_hand():
    """Dominated, equally costly but worse, and diverged points are not on the frontier."""
    assert frontier([1, 2, 2, 4, 3, 8, 9], [3.0, 2.5, 2.4, 2.4, 2.6, math.nan, 2.0]) == [0, 2, 6]
    assert frontier([], []) == []


@pytest.mark.parametrize(
    ("mean", "sd", "level"), [(1.0, 0.3, 1.2), (1.0, 0.01, 0.95), (2.0, 1.0, -1.0)]
)
def test_expected_improvement_is_its_integral(mean, sd, level):
    got = expected_improvement(np.array([mean]), np.array([sd]), np.array([level]))[0]
    expected, _ = quad(
        lambda y: (level - y) * norm.pdf(y, mean, sd), mean - 12 * sd, level, epsabs=1e-13
    )
    assert got == pytest.approx(expected, rel=1e-6, abs=1e-12)


def test_scaling_is_an_ordinary_regression():
    rng = np.random.default_rng(0)
    cost = np.exp(np.linspace(20, 30, 9))
    lr, width = np.exp(rng.normal(size=9)), np.exp(rng.normal(size=9))
    laws = fit_scaling(
        ["optimizer.lr", "model.width", "model.depth"],
        list(zip(lr, width, [2] * 9, strict=True)),
        cost,
    )
    # A constant depth has no scaling law.
    assert [law["axis"] for law in laws] == ["optimizer.lr", "model.width"]
    for law, values in zip(laws, (lr, width), strict=True):
        by = linregress(np.log(cost), np.log(values))
        assert (law["slope"], law["slope_se"], law["intercept"]) == pytest.approx(
            (by.slope, by.stderr, by.intercept)
        )


def planted_problem(tiny, **search):
    """A cell, its search settings, its cost function and the planted loss.

    The loss is E + A C**-a times a parabola in ln lr and ln batch size. With C the optimal lr falls
    and the optimal batch size rises.
    """
    recipe = tiny({"data.epochs": 100, "axes": AXES, "search": {"kind": "pareto", **search}})
    cell = build_cells(recipe)[0]
    cost = flops_function(cell)
    grid = sorted({cost(point) for point in cell.points})

    def loss(point):
        value, c = dict(zip(cell.paths, point, strict=True)), cost(point)
        log_ratio = math.log(c) - (math.log(grid[0]) + math.log(grid[-1])) / 2
        dx = math.log(value["optimizer.lr"] * 2**8) - SLOPE * log_ratio
        dy = math.log(value["budget.batch_tokens"] / 1024) - 0.25 * log_ratio
        return (MINIMUM + A * c**-POWER) * math.exp(0.015 * dx**2 + 0.01 * dy**2)

    return cell, recipe.search, cost, loss


def run_search(waves, loss):
    """{point: loss} of a search, in the order of its proposals."""
    seen, losses = {}, None
    while True:
        try:
            points = [point for _, point, _ in waves.send(losses)]
        except StopIteration:
            return seen
        losses = [loss(point) for point in points]
        seen |= zip(points, losses, strict=True)


def gap(cost, seen, grid):
    """Mean excess of ln(lowest loss) over the planted frontier, over the costs of the grid.

    The excess at one cost is at most 0.3, also where no point is as cheap.
    """
    front = frontier_points(cost, seen)
    lowest = np.array([math.inf, *(seen[p] for p in front)])[
        np.searchsorted([cost(p) for p in front], grid, side="right")
    ]
    return np.minimum(np.log(lowest / (MINIMUM + A * grid**-POWER)), 0.3).mean()


@pytest.mark.parametrize("seed", [0, 1])
def test_a_planted_frontier_and_its_scaling_are_found_for_fewer_flops_than_at_random(tiny, seed):
    cell, settings, cost, loss = planted_problem(tiny, budget=60, seed=seed)
    seen = run_search(search_frontier(cell, settings), loss)
    grid = np.array(sorted({cost(point) for point in cell.points}))
    near, spent = gap(cost, seen, grid), sum(map(cost, seen))
    law = next(law for law in cell.results["scaling"] if law["axis"] == "optimizer.lr")
    assert abs(law["slope"] - SLOPE) < 2.5 * law["slope_se"] < 0.15
    assert near < 0.06 and cell.results["flops"] == pytest.approx(spent)
    points, drawn, paid = cell.points, {}, 0.0
    for i in np.random.default_rng(seed).permutation(len(points)):
        drawn[points[i]] = loss(points[i])
        paid += cost(points[i])
        if gap(cost, drawn, grid) <= near:
            break
    assert spent < paid / 4


def test_flops_are_a_budget(tiny):
    cell, settings, cost, loss = planted_problem(tiny, flops=1e11)
    spent = sum(map(cost, run_search(search_frontier(cell, settings), loss)))
    assert 0.9e11 < spent <= 1e11
    cell, settings, cost, loss = planted_problem(tiny, flops=1.0)
    assert run_search(search_frontier(cell, settings), loss) == {}


def test_the_search_avoids_diverged_points_and_none_is_on_the_frontier(tiny):
    cell, settings, _, loss = planted_problem(tiny, budget=40)
    limit = 2.0**-7
    seen = run_search(
        search_frontier(cell, settings),
        lambda point: math.nan if point[cell.paths.index("optimizer.lr")] > limit else loss(point),
    )
    off = [math.isnan(value) for value in seen.values()]
    assert sum(off[:10]) >= sum(off[-10:]) and sum(off) < 15
    assert all(row["optimizer.lr"] <= limit for row in cell.results["frontier"])


def test_a_range_with_the_frontier_at_its_end_is_extended(tiny):
    cell, settings, _, _ = planted_problem(tiny, budget=40)
    run_search(
        search_frontier(cell, settings),
        lambda point: (
            point[cell.paths.index("optimizer.lr")] ** -0.05
            / point[cell.paths.index("budget.tokens")] ** 0.1
        ),
    )
    lr = cell.axes[cell.paths.index("optimizer.lr")]
    assert lr[-1] == pytest.approx(2.0**-3)
    assert cell.axes[cell.paths.index("budget.tokens")] == AXES["tokens"]
    assert any("is the largest of its range; the range is extended" in note for note in cell.notes)
