"""Which runs to train: a greedy Bayesian design for the joint surface.

The information of a run and the criterion at the target are those of `surface/design.py`, starting
from the prior. The next run is the one that decreases the criterion most per unit of cost. The path
starts with the cheapest identifiable study (`core`). A larger budget goes further along the same
path, so it never widens an interval.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from tqdm import tqdm

from scaletune.planning.cost import Candidates, Prices
from scaletune.surface.design import (
    GreedyDesign,
    criterion_weights,
    expected_information,
    target_gradient,
    within_reach,
)
from scaletune.surface.model import LAW, SurfaceRuns, ln_loss
from scaletune.surface.prior import SCATTER_WEIGHT, SurfaceDistribution

Array = NDArray[np.float64]
Indices = NDArray[np.int_]

N_AXES = 2
"""lr and batch size."""
SLOW = 2.0
"""Seconds after which progress is shown."""


def information(
    prior: SurfaceDistribution, candidates: Candidates, chosen: Indices, draws: Array
) -> Array:
    """(S, C, P, P) expected information of the chosen runs of each cell, under each draw."""
    runs, rows = candidates.runs.select(chosen), np.sort(chosen)
    nothing = np.zeros((candidates.runs.n_cells, N_AXES + 1))
    parts = []
    for theta in draws:
        excess = ln_loss(theta, nothing, candidates.runs)[3]
        copies = candidates.seeds * within_reach(candidates.runs, excess)[rows].astype(float)
        parts.append(expected_information(runs, theta, prior.scales, copies))
    return np.array(parts)


def covariances(
    prior: SurfaceDistribution, target: tuple[float, float], info: Array, draws: Array
) -> Array:
    """(S, 3, 3) covariance of ln lr*, ln batch* and ln loss at the target.

    Args:
        prior: The prior.
        target: (n, d).
        info: (S, P, P) information of the runs.
        draws: (S, P) parameters.
    """
    slopes = np.array([target_gradient(theta, target, N_AXES) for theta in draws])
    before = np.diag(prior.fit_prior[:, 1] ** -2.0)
    return slopes @ np.linalg.inv(info + before) @ slopes.transpose(0, 2, 1)


def criterion(prior: SurfaceDistribution, candidates: Candidates, chosen: Indices) -> float:
    """The criterion of `surface/design.py` for the chosen runs, in shares of the loss."""
    target, draws = candidates.target, prior.draws
    weights = np.array([criterion_weights(t, target, N_AXES) for t in draws])
    info = information(prior, candidates, chosen, draws).sum(1)
    total = np.einsum("sij,sij->", weights, covariances(prior, target, info, draws))
    return float(total / len(weights))


def half_widths(
    prior: SurfaceDistribution, candidates: Candidates, chosen: Indices, level: float
) -> tuple[Array, Array]:
    """Half the expected interval of ln lr, ln batch and ln loss at the target.

    The target's own deviation from the law is included. With the fit's quantile, that of Student's
    t, the interval contains the error with probability `level`, averaged over the prior: the error
    is small for some surfaces and large for others.

    Returns:
        The half widths (3,), and those without each cell (C, 3).
    """
    info = information(prior, candidates, chosen, prior.test_draws)
    n_cells = info.shape[1]

    def half(total: Array, n: int) -> Array:
        return _half_width(prior, candidates.target, total, n, level)

    without = [half(info.sum(1) - info[:, i], n_cells - 1) for i in range(n_cells)]
    return half(info.sum(1), n_cells), np.array(without)


def _half_width(
    prior: SurfaceDistribution, target: tuple[float, float], info: Array, n_cells: int, level: float
) -> Array:
    cov = covariances(prior, target, info, prior.test_draws)
    variance = np.einsum("sii->si", cov) + prior.scales.scatter**2
    t = stats.t(SCATTER_WEIGHT + max(n_cells - LAW, 0))
    return np.array([_mixture_half_width(np.sqrt(each), t, level) for each in variance.T])


def _mixture_half_width(sd: Array, t: Any, level: float) -> float:
    """h with mean P(|t| sd <= h) = level."""
    ends = [float(t.ppf(0.5 + level / 2)) * end for end in (sd.min(), sd.max())]

    def excess_coverage(h: float) -> float:
        return 1 - 2 * t.sf(h / sd).mean() - level

    return float(optimize.brentq(excess_coverage, 0.99 * ends[0], 1.01 * ends[1]))


def core(candidates: Candidates) -> Indices:
    """The cheapest identifiable study.

    Three sizes at one horizon and three horizons of one size, each a factor of about two apart; the
    third of each tests the law. Each of these cells has five runs in a cross. Empty if the
    candidates have no such cells.
    """
    runs = candidates.runs
    n, d = runs.n[runs.starts], runs.d[runs.starts]
    cost = np.array([candidates.cost[runs.cell == cell].sum() for cell in range(runs.n_cells)])
    best: tuple[float, list[int]] = (math.inf, [])
    for corner in range(runs.n_cells):
        sizes = _ladder(corner, np.flatnonzero(np.abs(d - d[corner]) < 0.5), n, 2 * math.log(1.8))
        horizons = _ladder(corner, np.flatnonzero(np.abs(n - n[corner]) < 0.01), d, math.log(1.8))
        cells = sorted({corner, *sizes, *horizons})
        if len(sizes) == len(horizons) == 2 and cost[cells].sum() < best[0]:
            best = (float(cost[cells].sum()), cells)
    return np.array([i for cell in best[1] for i in _cross(runs, cell)], int)


def _ladder(corner: int, cells: Indices, along: Array, step: float) -> list[int]:
    """The next two cells above the corner, each at least `step` above the last.

    The steps are shorter if there is no room for these.
    """
    for share in (1.0, 0.5, 0.1):
        chosen, last = list[int](), along[corner]
        for cell in sorted(cells, key=lambda i: along[i]):
            if along[cell] >= last + share * step and len(chosen) < 2:
                chosen, last = [*chosen, int(cell)], along[cell]
        if len(chosen) == 2:
            return chosen
    return chosen


def _cross(runs: SurfaceRuns, cell: int) -> list[int]:
    """The run in the middle of the cell's candidates, and one on each side in lr and in batch."""
    own = np.flatnonzero(runs.cell == cell)
    middle, arm = np.median(runs.x[own], 0), 0.6 * np.ptp(runs.x[own], axis=0) / 2
    points = middle + np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]) * arm
    scale = np.maximum(arm, 1e-9)
    nearest = [np.argmin((((runs.x[own] - point) / scale) ** 2).sum(1)) for point in points]
    return sorted({int(own[i]) for i in nearest})


def path(
    prior: SurfaceDistribution,
    candidates: Candidates,
    *,
    until: float,
    most: int,
    overhead: float = 0.0,
) -> Indices:
    """Runs in the order of their value per cost, the core first.

    Args:
        prior: The prior.
        candidates: The runs that could be trained.
        until: Largest total cost.
        most: Largest number of runs.
        overhead: Added to the price of each run: a study of thousands of runs that cost nothing is
            informative, but laborious.
    """
    design = GreedyDesign(
        candidates.runs,
        candidates.target,
        prior.draws,
        prior.fit_prior,
        prior.scales,
        most=most,
        copies=candidates.seeds,
    )
    prices, spent = Prices(candidates), 0.0
    order = [int(i) for i in core(candidates)]
    for i in order:
        design.take(i)
        spent += prices.take(i)
    bar = tqdm(
        total=most,
        initial=len(order),
        desc="planning runs",
        delay=SLOW,
        disable=None,
        leave=False,
        file=sys.stderr,
    )
    with bar:
        while len(order) < most:
            i = int(np.argmax(design.gains() / (prices.now + overhead)))
            if spent + prices.now[i] > until or design.taken[i]:
                break
            spent += prices.take(i)
            design.take(i)
            order.append(i)
            bar.update()
    return np.array(order, int)
