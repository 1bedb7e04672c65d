"""Which runs to train: a greedy Bayesian design for the joint surface, run by run.

With the law near theta every loss is linear in theta and in its cell's deviations, so what runs tell is known before
they are trained: information = prior + sum of J'J * weight, the deviations integrated out (surface.expected_information).
What it is for is the target: criterion = E[trace(H cov(ln lr, ln batch)) / 2 + LOSS_WEIGHT * var(ln loss)], where H is the
curvature of ln loss there, so that the first term is the loss expected to be lost by a misplaced lr and batch. The mean is
over draws of the belief (pseudo-Bayesian: Chaloner & Verdinelli 1995, section 4), as a point that teaches under one theta lies up
a wall under another. The next run is that of the largest fall of the criterion a price; a larger budget goes further along
the same path, so it never widens an interval.
"""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import optimize, stats
from tqdm import tqdm

from scaletune.fitting.joint.basin import directions
from scaletune.fitting.joint.surface import (
    SCATTER_WEIGHT,
    Runs,
    expected_information,
    expected_weight,
    law_basis,
    model,
)
from scaletune.fitting.optimum.lr_basin import REACH
from scaletune.planning.cost import Candidates, Prices
from scaletune.planning.prior import Belief

Array = NDArray[np.float64]
Indices = NDArray[np.int_]

LOSS_WEIGHT = 5.0  # a loss missed by 1 % counts as much as 0.05 % of loss lost
LAW = 3  # parameters of a centre
SLOW = 2.0  # seconds from which progress is shown


def target_slopes(belief: Belief, target: tuple[float, float], theta: Array) -> Array:
    """(3, P): of ln lr*, ln batch* and ln floor at the target."""
    n, d = np.array([target[0]]), np.array([target[1]])
    basis, k = law_basis(n, d)[0], len(belief.scales.scatter) - 1
    out = np.zeros((k + 1, len(theta)))
    for i in range(k):
        out[i, LAW * i : LAW * i + LAW] = basis
    at = Runs(n, d, (theta[: LAW * k].reshape(k, LAW) @ basis)[None], np.zeros(1), np.zeros(1, int))
    out[k] = model(theta, np.zeros((1, k + 1)), at)[1][0]  # at the bottom the height has no slope
    return out


def weights_of(belief: Belief, target: tuple[float, float], theta: Array) -> Array:
    """(3, 3): the criterion is its trace with the covariance of what `target_slopes` are of."""
    k = len(belief.scales.scatter) - 1
    ways = np.array(list(directions(k).values()), float)
    bend = np.exp(
        theta[LAW * k + 5 : LAW * k + 5 + len(ways)] + theta[-2] * target[0] + theta[-1] * target[1]
    )
    out = np.zeros((k + 1, k + 1))
    out[:k, :k] = (ways.T * bend) @ ways / 2
    out[k, k] = LOSS_WEIGHT
    return out


def information(belief: Belief, candidates: Candidates, chosen: Indices, draws: Array) -> Array:
    """(S, C, P, P): what the chosen runs of each cell tell of the law, if it were each of `draws`."""
    runs, chosen = part(candidates.runs, chosen), np.sort(chosen)
    copies = [candidates.seeds * _within_reach(candidates.runs, theta)[chosen] for theta in draws]
    return np.array(
        [
            expected_information(runs, theta, belief.scales, each)
            for theta, each in zip(draws, copies, strict=True)
        ]
    )


def covariances(belief: Belief, target: tuple[float, float], told: Array, draws: Array) -> Array:
    """(S, 3, 3): of (ln lr*, ln batch*, ln loss) at the target by a fit of runs that told (S, P, P) of the law."""
    slopes = np.array([target_slopes(belief, target, theta) for theta in draws])
    return (
        slopes
        @ np.linalg.inv(told + np.diag(belief.given[:, 1] ** -2.0))
        @ slopes.transpose(0, 2, 1)
    )


def part(runs: Runs, chosen: Indices) -> Runs:
    """These runs, cells numbered anew."""
    chosen = np.sort(chosen)
    cell = np.unique(runs.cell[chosen], return_inverse=True)[1]
    return Runs(runs.n[chosen], runs.d[chosen], runs.x[chosen], runs.y[chosen], cell)


def _within_reach(runs: Runs, theta: Array) -> Array:
    """1 for the runs that a fit would not drop as far above the lowest of their cell's, 0 for the others."""
    tall = model(theta, np.zeros((runs.n_cells, runs.x.shape[1] + 1)), runs)[3]
    lowest = np.minimum.reduceat(tall, np.searchsorted(runs.cell, np.arange(runs.n_cells)))[
        runs.cell
    ]
    return (1 + tall <= (1 + REACH) * (1 + lowest)).astype(float)


def criterion(belief: Belief, candidates: Candidates, chosen: Indices) -> float:
    """In shares of the loss."""
    weights = np.array([weights_of(belief, candidates.target, theta) for theta in belief.draws])
    told = information(belief, candidates, chosen, belief.draws).sum(1)
    return float(
        np.einsum("sij,sij->", weights, covariances(belief, candidates.target, told, belief.draws))
        / len(weights)
    )


def half_widths(
    belief: Belief, candidates: Candidates, chosen: Indices, level: float
) -> tuple[Array, Array]:
    """(3,): half the expected interval of ln lr, ln batch and ln loss of the target, its own deviation from the law within; and (C, 3): without each cell.

    With the fit's quantile, that of Student's t, the interval holds the error with the chance `level` over all that is believed:
    under some of it the error is small, under some large.
    """
    told = information(belief, candidates, chosen, belief.judges)
    n_cells = told.shape[1]
    whole = _half(belief, candidates.target, told.sum(1), n_cells, level)
    return whole, np.array(
        [
            _half(belief, candidates.target, told.sum(1) - told[:, i], n_cells - 1, level)
            for i in range(n_cells)
        ]
    )


def _half(
    belief: Belief, target: tuple[float, float], told: Array, n_cells: int, level: float
) -> Array:
    variance = (
        np.einsum("sii->si", covariances(belief, target, told, belief.judges))
        + belief.scales.scatter**2
    )
    t = stats.t(SCATTER_WEIGHT + max(n_cells - LAW, 0))
    return np.array([_holding(np.sqrt(each), t, level) for each in variance.T])


def _holding(sd: Array, t: Any, level: float) -> float:
    """h with mean P(|t| sd <= h) = level."""
    ends = [float(t.ppf(0.5 + level / 2)) * end for end in (sd.min(), sd.max())]
    return float(
        optimize.brentq(
            lambda h: 1 - 2 * t.sf(h / sd).mean() - level, 0.99 * ends[0], 1.01 * ends[1]
        )
    )


def core(candidates: Candidates) -> Indices:
    """The cheapest identifiable study: three sizes and three horizons, each a factor of about two apart, in an L; five runs crossed in each cell.

    The middle ones are there to be checked by. Empty where the candidates have no such cells.
    """
    runs = candidates.runs
    starts = np.searchsorted(runs.cell, np.arange(runs.n_cells))
    n, d = runs.n[starts], runs.d[starts]
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
    """The next two cells beyond the corner, each at least `step` beyond the last; shorter steps where there is no room for these."""
    for share in (1.0, 0.5, 0.1):
        found, last = list[int](), along[corner]
        for cell in sorted(cells, key=lambda i: along[i]):
            if along[cell] >= last + share * step and len(found) < 2:
                found, last = [*found, int(cell)], along[cell]
        if len(found) == 2:
            return found
    return found


def _cross(runs: Runs, cell: int) -> list[int]:
    """The run in the middle of the cell's candidates, and one well to each side of it in lr and in batch."""
    own = np.flatnonzero(runs.cell == cell)
    middle, reach = np.median(runs.x[own], 0), 0.6 * np.ptp(runs.x[own], axis=0) / 2
    arms = np.array([(0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)]) * reach
    scaled = np.maximum(reach, 1e-9)
    return sorted(
        {int(own[np.argmin((((runs.x[own] - middle - arm) / scaled) ** 2).sum(1))]) for arm in arms}
    )


def path(
    belief: Belief, candidates: Candidates, *, until: float, most: int, trouble: float = 0.0
) -> Indices:
    """Runs in the order they are worth training, the core first, until they cost more than `until` or are `most`.

    `trouble` is put on the price of every run: a study of thousands of runs that cost nothing teaches, and is a nuisance.
    """
    state = _State(belief, candidates, most)
    prices, spent = Prices(candidates), 0.0
    order = [int(i) for i in core(candidates)]
    for i in order:
        state.take(i)
        spent += prices.take(i)
    bar = tqdm(
        total=most,
        initial=len(order),
        desc="runs planned",
        delay=SLOW,
        disable=None,
        leave=False,
        file=sys.stderr,
    )
    with bar:
        while len(order) < most:
            i = int(np.argmax(state.gains() / (prices.now + trouble)))
            if spent + prices.now[i] > until or state.taken[i]:
                break
            spent += prices.take(i)
            state.take(i)
            order.append(i)
            bar.update()
    return np.array(order, int)


class _State:
    """What is known after the runs taken so far, of every candidate's ln loss and of the target, by each draw.

    Runs are taken one by one (a pivoted Cholesky factor of the candidates' covariance grows by a row): O(S R) a row.
    """

    def __init__(self, belief: Belief, candidates: Candidates, most: int) -> None:
        runs, scales = candidates.runs, belief.scales
        nothing = np.zeros((runs.n_cells, len(scales.scatter)))
        parts = [model(theta, nothing, runs) for theta in belief.draws]
        self.to_theta, self.to_delta = (
            np.array([p[i] for p in parts]) for i in (1, 2)
        )  # (S, R, P), (S, R, 3)
        tall = np.array([p[3] for p in parts])
        kept = np.array([_within_reach(runs, theta) for theta in belief.draws])
        self.noise = np.where(
            kept > 0, 1 / (candidates.seeds * expected_weight(tall, scales)), math.inf
        )
        self.variance, self.scatter2, self.cell = (
            belief.given[:, 1] ** 2,
            scales.scatter**2,
            runs.cell,
        )
        self.known = np.einsum("srp,p->sr", self.to_theta**2, self.variance) + np.einsum(
            "srk,k->sr", self.to_delta**2, self.scatter2
        )
        target = [self._rows(belief, candidates.target, theta) for theta in belief.draws]
        self.to_target = np.einsum("sqp,p,srp->sqr", np.array(target), self.variance, self.to_theta)
        self.factor, self.rows = np.zeros((most, *self.known.shape)), 0
        self.taken = np.zeros(len(runs.n), bool)

    @staticmethod
    def _rows(belief: Belief, target: tuple[float, float], theta: Array) -> Array:
        """Slopes of the target times a root of the weights: the criterion is the sum of their variances."""
        return np.linalg.cholesky(weights_of(belief, target, theta)).T @ target_slopes(
            belief, target, theta
        )

    def gains(self) -> Array:
        """(R,): the fall of the criterion by one more run."""
        found = ((self.to_target**2).sum(1) / (self.known + self.noise)).mean(0)
        return np.where(self.taken, 0.0, found)

    def take(self, i: int) -> None:
        """Condition on run i."""
        row = np.einsum("sp,srp->sr", self.to_theta[:, i] * self.variance, self.to_theta)
        row += np.where(
            self.cell == self.cell[i],
            np.einsum("sk,srk->sr", self.to_delta[:, i] * self.scatter2, self.to_delta),
            0.0,
        )
        known = self.factor[: self.rows]
        row -= np.einsum("ts,tsr->sr", known[:, :, i], known)
        root = np.sqrt(self.known[:, i] + self.noise[:, i])
        row, target = row / root[:, None], self.to_target[:, :, i] / root[:, None]
        self.to_target = self.to_target - target[:, :, None] * row[:, None]
        self.known = self.known - row**2
        self.factor[self.rows] = row
        self.rows += 1
        self.taken[i] = True
