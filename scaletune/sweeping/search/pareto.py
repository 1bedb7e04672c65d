"""Along the frontier of loss against cost: the local, cost-aware search of CARBS (arXiv:2306.08055) on the axes' grid.

A point is on the frontier where nothing cheaper is as good. A wave's points are drawn about frontier points, in log space, no dearer than a
cost drawn log-uniformly over the frontier and a step beyond; a Gaussian process on ln values and ln FLOPs says which of them is expected
to fall furthest under the frontier at its own cost. Costs are counted and not learned, so no process models them. It starts at the
cheapest sizes, and dear points are asked for near what cheap ones have shown.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtr
from scipy.stats import linregress

from scaletune import counting, data
from scaletune.errors import UserError
from scaletune.recipe import Search
from scaletune.sweeping.search.space import Cell, Point, Waves

Array = NDArray[np.float64]
Cost = Callable[[Point], float]  # FLOPs
SIZES = (
    "model.",
    "data.",
    "budget.tokens",
)  # axes that a point's cost depends on: their ranges are the user's, and do not grow
RADIUS = 1.5  # sd of a move from the frontier, in steps of each axis
DRAWS = 600  # moves a proposal is chosen from
FIRST = 5  # points about the start before the process is asked
TALL = (
    0.3  # of ln loss over the frontier: above it points are alike, and so are those that diverged
)
LEANING = 4  # points of a frontier that say together that a range is too small
ENOUGH = 6  # points of a frontier that may say how a value scales


def _regression() -> Any:
    try:
        from sklearn import gaussian_process
    except ImportError:
        raise UserError(
            "search.kind 'pareto' needs scikit-learn: pip install 'scaletune[search]'"
        ) from None
    return gaussian_process


def costs(cell: Cell) -> Cost:
    """FLOPs of a point, counted once for each of its sizes."""
    sizes = [i for i, path in enumerate(cell.paths) if path.startswith(SIZES)]
    known: dict[Point, float] = {}

    def cost(point: Point) -> float:
        key = tuple(point[i] for i in sizes)
        if key not in known:
            made = cell.recipe(point)
            per_token = counting.flops_per_token(
                made.model, data.load(made.data).vocab_size, made.data.seq_len
            )
            known[key] = per_token * made.budget.tokens
        return known[key]

    return cost


def frontier(cost: Sequence[float] | Array, loss: Sequence[float] | Array) -> list[int]:
    """Indices of the points that nothing as cheap or cheaper is as good as, by ascending cost; of NaN none."""
    lowest, found = math.inf, list[int]()
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], loss[i])):
        if loss[i] < lowest:
            found.append(i)
            lowest = loss[i]
    return found


def best(cost: Cost, seen: Mapping[Point, float]) -> list[Point]:
    """The frontier of what is trained."""
    known = list(seen)
    return [known[i] for i in frontier([cost(point) for point in known], [*seen.values()])]


def surrogate(x: Array, y: Array) -> Any:
    """A Gaussian process through y [R] at x [R, axes]: a plane, and a smooth part with a length for each axis, its numbers by likelihood."""
    process = _regression()
    kernels = process.kernels
    smooth = kernels.ConstantKernel(1.0, (1e-3, 1e3)) * kernels.Matern(
        np.full(x.shape[1], 0.5), (0.05, 20.0), nu=2.5
    )
    kernel = smooth + kernels.DotProduct(1.0, (1e-2, 1e2)) + kernels.WhiteKernel(1e-3, (1e-7, 0.3))
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # a number at its bound, as a length is along an axis that does nothing
        return process.GaussianProcessRegressor(kernel, normalize_y=True).fit(x, y)


def improvement(mean: Array, sd: Array, level: Array) -> Array:
    """Expected fall under `level` of a Gaussian: (level - mean) Phi(z) + sd phi(z)."""
    sd = np.maximum(sd, 1e-12)
    z = (level - mean) / sd
    return (level - mean) * ndtr(z) + sd * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _features(cell: Cell, points: Sequence[Point], cost: Cost) -> Array:
    """[points, axes + 1]: ln values and ln FLOPs, each over the range of its axis."""
    low, high = (np.log([values[end] for values in cell.axes]) for end in (0, -1))
    values = (np.log(np.array(points, float)) - low) / np.where(high > low, high - low, 1.0)
    ends = [math.log(cost(tuple(values[end] for values in cell.axes))) for end in (0, -1)]
    paid = (np.log([cost(point) for point in points]) - ends[0]) / max(ends[1] - ends[0], 1e-9)
    return np.column_stack([values, paid])


def _moved(
    cell: Cell, parents: Sequence[Point], draws: int, rng: np.random.Generator
) -> list[Point]:
    """Grid points nearest to normal moves in log space from parents drawn alike; each once."""
    near = np.array(parents, float)[rng.integers(len(parents), size=draws)]
    columns = []
    for i, values in enumerate(cell.axes):
        logs = np.log(np.array(values, float))
        step = float(np.median(np.diff(logs))) if len(values) > 1 else 0.0
        to = np.log(near[:, i]) + RADIUS * step * rng.normal(size=draws)
        columns.append([values[k] for k in np.abs(to[:, None] - logs).argmin(1)])
    return list(dict.fromkeys(zip(*columns, strict=True)))


def _heights(cost: Array, loss: Array) -> tuple[Array, Array, Array]:
    """(ln loss [R], no further than TALL over the frontier, where it diverged at that; the frontier's ln costs; its ln losses)."""
    found = frontier(cost, loss)
    paid, level = np.log(cost[found]), np.log(loss[found])
    tall = np.interp(np.log(cost), paid, level) + TALL
    return np.where(np.isfinite(loss), np.minimum(np.log(loss), tall), tall), paid, level


def propose(
    cell: Cell, cost: Cost, seen: Mapping[Point, float], left: float, rng: np.random.Generator
) -> tuple[Point, float] | None:
    """The point to train next and the loss expected there, of those that cost no more than `left` FLOPs; None where there is none."""
    known, losses = list(seen), np.array([*seen.values()], float)
    if len(seen) < FIRST or not np.isfinite(losses).any():
        return _opening(cell, cost, seen, left, rng)
    y, paid, level = _heights(np.array([cost(point) for point in known]), losses)
    beyond = math.log(2) + (paid[-1] - paid[0]) / len(paid)
    most = min(left, math.exp(rng.uniform(paid[0], paid[-1] + beyond)))
    parents = best(cost, seen)
    pool = _fresh(cell, cost, parents, seen, most, rng) or _fresh(
        cell, cost, parents, seen, left, rng
    )
    if not pool:
        return None
    mean, sd = surrogate(_features(cell, known, cost), y).predict(
        _features(cell, pool, cost), return_std=True
    )
    at = np.interp(np.log([cost(point) for point in pool]), paid, level)
    chosen = int(improvement(mean, sd, at).argmax())
    return pool[chosen], math.exp(mean[chosen])


def _opening(
    cell: Cell, cost: Cost, seen: Mapping[Point, float], left: float, rng: np.random.Generator
) -> tuple[Point, float] | None:
    """The smallest sizes and the middle of all else, then moves from there."""
    start = tuple(
        values[0 if path.startswith(SIZES) else len(values) // 2]
        for path, values in zip(cell.paths, cell.axes, strict=True)
    )
    pool = (
        _fresh(cell, cost, [start], seen, left, rng)
        if seen
        else [start]
        if cost(start) <= left
        else []
    )
    good = [loss for loss in seen.values() if math.isfinite(loss)]
    return (pool[0], sum(good) / len(good) if good else 1.0) if pool else None


def _fresh(
    cell: Cell,
    cost: Cost,
    parents: Sequence[Point],
    seen: Mapping[Point, float],
    most: float,
    rng: np.random.Generator,
) -> list[Point]:
    """Moves from the parents that are not trained yet and cost no more than `most`; where there is none, whatever is left of the grid."""
    moves = _moved(cell, parents, DRAWS, rng)
    return [point for point in moves if point not in seen and cost(point) <= most] or [
        point for point in cell.points if point not in seen and cost(point) <= most
    ]


def pareto(cell: Cell, asked: Search) -> Waves:
    """One frontier, until `budget` points or `flops` FLOPs are spent; leaves the scaling of every axis along it in the cell's notes."""
    _regression()
    cost, seen, spent = costs(cell), dict[Point, float](), 0.0
    most, total = asked.budget or math.inf, asked.flops or math.inf
    while len(seen) < most:
        wave = dict[Point, float]()
        while len(wave) < min(asked.wave, most - len(seen)):
            rng = np.random.default_rng([asked.seed, len(seen) + len(wave)])
            found = propose(cell, cost, seen | wave, total - spent, rng)
            if found is None:
                break
            wave[found[0]] = found[1]
            spent += cost(found[0])
        if not wave:
            break
        seen |= zip(wave, (yield [(cell, point, None) for point in wave]), strict=True)
        _grow(cell, cost, seen)
    _conclude(cell, cost, seen, spent)


def _grow(cell: Cell, cost: Cost, seen: Mapping[Point, float]) -> None:
    """Lengthen by a step each range, but of sizes, on an end of which the dearest points of the frontier all sit."""
    dearest = best(cost, seen)[-LEANING:]
    for i, path in enumerate(cell.paths):
        for upper in (False, True):
            if (
                not path.startswith(SIZES)
                and len(dearest) == LEANING
                and all((i, upper) in cell.ends(point) for point in dearest)
            ):
                cell.lengthen(i, upper)


def _conclude(cell: Cell, cost: Cost, seen: Mapping[Point, float], spent: float) -> None:
    front = best(cost, seen)
    paid = [cost(point) for point in front]
    cell.say(
        f"{len(seen)} of {len(cell.points)} points, {spent:.3g} FLOPs; {len(front)} on the frontier"
    )
    rows = [
        dict(zip(cell.paths, point, strict=True)) | {"flops": c, "loss": seen[point]}
        for point, c in zip(front, paid, strict=True)
    ]
    laws = scaling(cell.paths, front, paid)
    cell.found = {"cell": cell.name, "flops": spent, "frontier": rows, "scaling": laws}
    for law in laws:
        cell.say(said(law))


def scaling(
    paths: Sequence[str], front: Sequence[Point], cost: Sequence[float]
) -> list[dict[str, Any]]:
    """Per axis the line of ln value against ln FLOPs through the frontier, by least squares: slope, its standard error, intercept.

    An axis is left out of which the frontier knows one value; all are, where it has fewer than ENOUGH points or 3 costs. Values are the
    grid's: steps that are large beside what a value moves by along the frontier bend the slope by more than the error says.
    """
    if len(front) < ENOUGH or len(set(cost)) < 3:
        return []
    lines = {
        path: linregress(np.log(cost), values)
        for path, values in zip(paths, np.log(np.array(front, float)).T, strict=True)
        if np.ptp(values)
    }
    return [
        {
            "axis": path,
            "slope": float(line.slope),
            "slope_se": float(line.stderr),
            "intercept": float(line.intercept),
            "n": len(cost),
        }
        for path, line in lines.items()
    ]


def said(law: Mapping[str, Any]) -> str:
    """`lr ~ FLOPs**-0.21 (standard error 0.03)`, and where that starts from."""
    name = law["axis"].split(".")[-1]
    return f"{name} = {math.exp(law['intercept']):.3g} FLOPs**{law['slope']:.3g} along the frontier (standard error {law['slope_se']:.2g})"
