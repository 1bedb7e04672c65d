"""Searches the frontier of loss against compute: the local, cost-aware search of CARBS on a grid.

CARBS is arXiv:2306.08055. A point is on the frontier if no cheaper point has a loss as low. The
candidates of a wave are drawn around frontier points, in log space, with at most a cost that is
drawn log-uniformly over the frontier and one step beyond. A Gaussian process on ln values and ln
FLOPs predicts their losses; the candidate with the largest expected improvement over the frontier
at its own cost is trained. Costs are counted, not learned, so no process models them. The search
starts with the smallest sizes and spends more compute near the points that were good at less.
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

from scaletune.errors import UserError
from scaletune.recipe import SearchSection
from scaletune.sweeping.search.space import Cell, Point, Waves
from scaletune.sweeping.sizes import point_sizes, require_known

Array = NDArray[np.float64]
Cost = Callable[[Point], float]  # FLOPs
# Axes that determine a point's cost, or may do so. The user chooses their ranges, so they are never
# extended.
SIZES = ("model.", "data.", "budget.tokens", "my.")
RADIUS = 1.5  # sd of a move from the frontier, in steps of each axis
DRAWS = 600  # moves that a proposal is chosen from
FIRST = 5  # points around the start before the Gaussian process is used
TALL = 0.3  # clip of ln loss above the frontier; a diverged point counts as this
LEANING = 4  # consecutive frontier points at the end of a range that extend it
ENOUGH = 6  # frontier points needed to fit how a value scales


def _gaussian_process() -> Any:
    """scikit-learn's module."""
    try:
        from sklearn import gaussian_process
    except ImportError:
        raise UserError(
            "search.kind 'pareto' needs scikit-learn: pip install 'scaletune[search]'"
        ) from None
    return gaussian_process


def flops_function(cell: Cell) -> Cost:
    """A function from a point to its FLOPs, which are counted once per size."""
    sizes = [i for i, path in enumerate(cell.paths) if path.startswith(SIZES)]
    known: dict[Point, float] = {}

    def cost(point: Point) -> float:
        key = tuple(point[i] for i in sizes)
        if key not in known:
            measured = point_sizes(recipe := cell.recipe(point))
            require_known(measured, "search.kind 'pareto'", recipe, ("flops",))
            known[key] = measured.flops
        return known[key]

    return cost


def frontier(cost: Sequence[float] | Array, loss: Sequence[float] | Array) -> list[int]:
    """Indices of the frontier, by ascending cost. NaN losses are not on it."""
    lowest, indices = math.inf, list[int]()
    for i in sorted(range(len(cost)), key=lambda i: (cost[i], loss[i])):
        if loss[i] < lowest:
            indices.append(i)
            lowest = loss[i]
    return indices


def frontier_points(cost: Cost, seen: Mapping[Point, float]) -> list[Point]:
    """The frontier of the trained points."""
    points = list(seen)
    return [points[i] for i in frontier([cost(point) for point in points], [*seen.values()])]


def fit_surrogate(x: Array, y: Array) -> Any:
    """Fits a Gaussian process to y [R] at x [R, axes] by maximum likelihood.

    Its kernel is a plane plus a Matern-5/2 part with one length scale per axis, plus noise.
    """
    process = _gaussian_process()
    kernels = process.kernels
    smooth = kernels.ConstantKernel(1.0, (1e-3, 1e3)) * kernels.Matern(
        np.full(x.shape[1], 0.5), (0.05, 20.0), nu=2.5
    )
    kernel = smooth + kernels.DotProduct(1.0, (1e-2, 1e2)) + kernels.WhiteKernel(1e-3, (1e-7, 0.3))
    with warnings.catch_warnings():
        # sklearn warns about a value at its bound, which is normal for an axis without effect
        warnings.simplefilter("ignore")
        return process.GaussianProcessRegressor(kernel, normalize_y=True).fit(x, y)


def expected_improvement(mean: Array, sd: Array, level: Array) -> Array:
    """Expected fall of a Gaussian below `level`: (level - mean) Phi(z) + sd phi(z)."""
    sd = np.maximum(sd, 1e-12)
    z = (level - mean) / sd
    return (level - mean) * ndtr(z) + sd * np.exp(-0.5 * z**2) / math.sqrt(2 * math.pi)


def _features(cell: Cell, points: Sequence[Point], cost: Cost) -> Array:
    """[points, axes + 1]: ln values and ln FLOPs, each scaled to the range of its axis."""
    low, high = (np.log([values[end] for values in cell.axes]) for end in (0, -1))
    values = (np.log(np.array(points, float)) - low) / np.where(high > low, high - low, 1.0)
    ends = [math.log(cost(tuple(values[end] for values in cell.axes))) for end in (0, -1)]
    ln_cost = (np.log([cost(point) for point in points]) - ends[0]) / max(ends[1] - ends[0], 1e-9)
    return np.column_stack([values, ln_cost])


def _draw_moves(
    cell: Cell, parents: Sequence[Point], draws: int, rng: np.random.Generator
) -> list[Point]:
    """Grid points nearest to normal moves in log space from random parents, without repeats."""
    start = np.array(parents, float)[rng.integers(len(parents), size=draws)]
    columns = []
    for i, values in enumerate(cell.axes):
        logs = np.log(np.array(values, float))
        step = float(np.median(np.diff(logs))) if len(values) > 1 else 0.0
        to = np.log(start[:, i]) + RADIUS * step * rng.normal(size=draws)
        columns.append([values[k] for k in np.abs(to[:, None] - logs).argmin(1)])
    return list(dict.fromkeys(zip(*columns, strict=True)))


def _clipped_losses(cost: Array, loss: Array) -> tuple[Array, Array, Array]:
    """(ln losses [R]; the frontier's ln costs; its ln losses).

    ln losses are at most TALL above the frontier; diverged points count as that.
    """
    indices = frontier(cost, loss)
    ln_cost, level = np.log(cost[indices]), np.log(loss[indices])
    highest = np.interp(np.log(cost), ln_cost, level) + TALL
    clipped = np.where(np.isfinite(loss), np.minimum(np.log(loss), highest), highest)
    return clipped, ln_cost, level


def propose(
    cell: Cell, cost: Cost, seen: Mapping[Point, float], budget: float, rng: np.random.Generator
) -> tuple[Point, float] | None:
    """The point to train next and its expected loss; None if none costs at most `budget` FLOPs."""
    points, losses = list(seen), np.array([*seen.values()], float)
    if len(seen) < FIRST or not np.isfinite(losses).any():
        return _propose_start(cell, cost, seen, budget, rng)
    y, ln_cost, level = _clipped_losses(np.array([cost(point) for point in points]), losses)
    beyond = math.log(2) + (ln_cost[-1] - ln_cost[0]) / len(ln_cost)
    most = min(budget, math.exp(rng.uniform(ln_cost[0], ln_cost[-1] + beyond)))
    parents = frontier_points(cost, seen)
    candidates = _untrained_moves(cell, cost, parents, seen, most, rng) or _untrained_moves(
        cell, cost, parents, seen, budget, rng
    )
    if not candidates:
        return None
    mean, sd = fit_surrogate(_features(cell, points, cost), y).predict(
        _features(cell, candidates, cost), return_std=True
    )
    at = np.interp(np.log([cost(point) for point in candidates]), ln_cost, level)
    chosen = int(expected_improvement(mean, sd, at).argmax())
    return candidates[chosen], math.exp(mean[chosen])


def _propose_start(
    cell: Cell, cost: Cost, seen: Mapping[Point, float], budget: float, rng: np.random.Generator
) -> tuple[Point, float] | None:
    """The point with the smallest sizes and middle values; after it, moves from there."""
    start = tuple(
        values[0 if path.startswith(SIZES) else len(values) // 2]
        for path, values in zip(cell.paths, cell.axes, strict=True)
    )
    if seen:
        candidates = _untrained_moves(cell, cost, [start], seen, budget, rng)
    else:
        candidates = [start] if cost(start) <= budget else []
    finite = [loss for loss in seen.values() if math.isfinite(loss)]
    return (candidates[0], sum(finite) / len(finite) if finite else 1.0) if candidates else None


def _untrained_moves(
    cell: Cell,
    cost: Cost,
    parents: Sequence[Point],
    seen: Mapping[Point, float],
    most: float,
    rng: np.random.Generator,
) -> list[Point]:
    """Untrained moves from the parents that cost at most `most`; without any, such grid points."""
    moves = _draw_moves(cell, parents, DRAWS, rng)
    return [point for point in moves if point not in seen and cost(point) <= most] or [
        point for point in cell.points if point not in seen and cost(point) <= most
    ]


def search_frontier(cell: Cell, search: SearchSection) -> Waves:
    """Searches one cell's frontier until `budget` points or `flops` FLOPs are used.

    Fits how each axis scales along the frontier, into the cell's results and messages.
    """
    _gaussian_process()
    cost, seen, spent = flops_function(cell), dict[Point, float](), 0.0
    most, total = search.budget or math.inf, search.flops or math.inf
    while len(seen) < most:
        wave = dict[Point, float]()
        while len(wave) < min(search.wave, most - len(seen)):
            rng = np.random.default_rng([search.seed, len(seen) + len(wave)])
            proposal = propose(cell, cost, seen | wave, total - spent, rng)
            if proposal is None:
                break
            wave[proposal[0]] = proposal[1]
            spent += cost(proposal[0])
        if not wave:
            break
        seen |= zip(wave, (yield [(cell, point, None) for point in wave]), strict=True)
        _extend_ranges(cell, cost, seen)
    _conclude(cell, cost, seen, spent)


def _extend_ranges(cell: Cell, cost: Cost, seen: Mapping[Point, float]) -> None:
    """Extends axes, except sizes, at an end where the most expensive frontier points all lie."""
    largest = frontier_points(cost, seen)[-LEANING:]
    for i, path in enumerate(cell.paths):
        for upper in (False, True):
            if (
                not path.startswith(SIZES)
                and len(largest) == LEANING
                and all((i, upper) in cell.ends(point) for point in largest)
            ):
                cell.extend_axis(i, upper)


def _conclude(cell: Cell, cost: Cost, seen: Mapping[Point, float], spent: float) -> None:
    points = frontier_points(cost, seen)
    flops = [cost(point) for point in points]
    cell.add_note(
        f"stopped after {cell.fraction(len(seen))} and {spent:.3g} FLOPs: {len(points)} points are"
        " on the frontier of loss against compute"
    )
    rows = [
        dict(zip(cell.paths, point, strict=True)) | {"flops": c, "loss": seen[point]}
        for point, c in zip(points, flops, strict=True)
    ]
    laws = fit_scaling(cell.paths, points, flops)
    cell.results = {"cell": cell.name, "flops": spent, "frontier": rows, "scaling": laws}
    for law in laws:
        cell.add_note(describe_scaling(law))


def fit_scaling(
    paths: Sequence[str], front: Sequence[Point], cost: Sequence[float]
) -> list[dict[str, Any]]:
    """Fits ln value against ln FLOPs along the frontier, per axis, by least squares.

    Values are grid values: grid steps that are large beside the change along the frontier bias the
    slope by more than its standard error.

    Returns:
        Per axis `axis`, `slope`, `slope_se` (standard error), `intercept` and `n`. Axes with one
        value on the frontier are left out; all are if it has fewer than ENOUGH points or 3 costs.
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


def describe_scaling(law: Mapping[str, Any]) -> str:
    """`lr = 0.5 FLOPs**-0.21 along the frontier (standard error of the exponent 0.03)`."""
    name, factor = law["axis"].split(".")[-1], math.exp(law["intercept"])
    return (
        f"{name} = {factor:.3g} FLOPs**{law['slope']:.3g} along the frontier"
        f" (standard error of the exponent {law['slope_se']:.2g})"
    )
