"""All cells at once: a belief about one law for every cell's optimum says which point, of which cell, is worth its FLOPs.

Every cell is a basin (see `searching`) of one shape; its optimum lies near a law, ln lr = c + along ln n + D ln(d / n) for n_params and
tokens n and d over their geometric means, likewise ln batch_tokens, by a deviation of its own. The belief is Gaussian: the most
probable parameters by least squares, and the curvature there (Laplace). A point's worth is by how much it lowers the loss expected to be
lost at the target, where the law is asked for an answer: half the trace of the basin's curvature times the optimum's covariance, which
one more run lowers by a rank-one term (Bayesian V-optimal design; Chaloner & Verdinelli 1995), over its FLOPs. So cheap cells come
first, and dear ones get the few points that cheap ones cannot stand in for.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from scaletune.recipe import Search
from scaletune.sweeping.search.lr_basin import TALL, Prior, phi
from scaletune.sweeping.search.space import Cell, Point, Waves, lowest

Array = NDArray[np.float64]
LAWS = {  # exponents (mean, sd): along: tokens grow with n_params; D: at fixed n_params. Broad around published laws, muP's among them
    "lr": ((-0.25, 0.25), (0.1, 0.3)), "batch": ((0.5, 0.3), (0.4, 0.3)),
}  # fmt: skip
SCATTER = (0.18, 0.25)  # sd of a cell's optimum about the law, ln lr and ln batch_tokens
SHAPE_SD = 2.0  # sds of a single cell's shape, twofold: all cells share one, which they soon know


@dataclass(frozen=True)
class Place:
    """What the belief needs of a cell: its size, what a point costs, its grid."""

    n_params: float
    tokens: float
    flops: float
    grid: Array  # [G, 1 or 2] of ln lr (and ln batch_tokens)


class Belief:
    """theta: per axis (c, along, D), ln a, s (and ln b, r, k), then per cell its deviations, then every cell's ln floor."""

    def __init__(self, places: Sequence[Place]):
        self.places, self.prior = places, Prior()
        self.axes, self.cells = places[0].grid.shape[1], len(places)
        self.scale = np.array(
            [[math.log(p.n_params), math.log(p.tokens / p.n_params)] for p in places]
        )
        self.middle = self.scale.mean(0)
        self.mean, self.sd = self._prior()
        self.theta, self.precision = self.mean, np.diag(self.sd**-2.0)  # to which `pending` adds

    def _prior(self) -> tuple[Array, Array]:
        low = np.min([p.grid.min(0) for p in self.places], 0)
        high = np.max([p.grid.max(0) for p in self.places], 0)
        law = [((low[i] + high[i]) / 2, max((high[i] - low[i]) / 2, 0.1)) for i in range(self.axes)]
        known = [
            pair
            for i, name in zip(range(self.axes), LAWS, strict=False)
            for pair in (law[i], *LAWS[name])
        ]
        p = self.prior
        known += [p.curvature, p.skew, p.batch_curvature, p.batch_skew, p.tilt][
            : 2 if self.axes == 1 else 5
        ]
        wide = len(known) - (2 if self.axes == 1 else 5)
        sd = np.array([s for _, s in known])
        sd[wide:] *= SHAPE_SD
        deviations = np.tile(SCATTER[: self.axes], self.cells)
        return (
            np.concatenate([[m for m, _ in known], np.zeros(deviations.size + self.cells)]),
            np.concatenate([sd, deviations, np.ones(self.cells)]),
        )

    @property
    def shared(self) -> int:
        return self.mean.size - self.cells * (self.axes + 1)

    def law(self, theta: Array, n_params: float, tokens: float) -> Array:
        """[axes]: the law's optimum at a scale."""
        at = np.array([math.log(n_params), math.log(tokens / n_params)]) - self.middle
        return theta[: 3 * self.axes].reshape(self.axes, 3) @ [1.0, *at]

    def optimum(self, theta: Array, cell: int) -> Array:
        """[axes]: of a cell, its own deviation in it."""
        first, p = self.shared + cell * self.axes, self.places[cell]
        return self.law(theta, p.n_params, p.tokens) + theta[first : first + self.axes]

    def heights(self, theta: Array, cell: int, x: Array) -> Array:
        """[R]: ln loss over the floor at points [R, axes] of a cell, bent to stay under TALL."""
        away, shape = x - self.optimum(theta, cell), theta[3 * self.axes : self.shared]
        if self.axes == 1:
            gap = math.exp(shape[0]) * phi(away[:, 0], shape[1])
        else:
            gap = math.exp(shape[0]) * phi(away[:, 0] + shape[4] * away[:, 1], shape[1]) + math.exp(
                shape[2]
            ) * phi(away[:, 1], shape[3])
        return TALL * np.tanh(gap / TALL)

    def learn(self, runs: Mapping[int, tuple[Array, Array]]) -> None:
        """Take in all runs so far: {cell: (points [R, axes], losses [R], NaN diverged)}."""
        seen = {
            cell: (x, np.log(np.where(np.isfinite(y), y, np.nan))) for cell, (x, y) in runs.items()
        }
        base = self.mean.copy()
        for cell, (_, y) in seen.items():
            base[self.mean.size - self.cells + cell] = np.nanmin(y) if np.isfinite(y).any() else 0.0

        def left(theta: Array) -> Array:
            misfits = [self._misfit(theta, c, x, y) for c, (x, y) in seen.items()]
            return np.concatenate([(theta - base) / self.sd, *misfits])

        found = least_squares(left, base, x_scale=self.sd, max_nfev=60)
        slope = np.asarray(found.jac, float)
        self.theta, self.precision = found.x, slope.T @ slope

    def pending(self, cell: int, index: int) -> None:
        """Count a run as seen with the loss expected of it: it moves no parameter, and makes them surer."""
        row = self.rows(cell)[index]
        self.precision = self.precision + np.outer(row, row)

    def _misfit(self, theta: Array, cell: int, x: Array, y: Array) -> Array:
        """[R]: how far ln losses (NaN: diverged) are from the belief, in sds that grow with their height."""
        heights, known = self.heights(theta, cell, x), np.isfinite(y)
        left = (TALL - heights) / self.prior.cliff
        if known.any():
            above = np.minimum(y[known] - y[known].min(), TALL)
            trust = self.prior.noise + self.prior.misfit * above
            left[known] = (
                self._floor(theta, cell) + heights[known] - y[known].min() - above
            ) / trust
        return left

    def _floor(self, theta: Array, cell: int) -> float:
        return float(theta[self.mean.size - self.cells + cell])

    def rows(self, cell: int) -> Array:
        """[G, parameters]: how a loss at each of the cell's points depends on theta, over the sd it would be trusted by."""
        grid = self.places[cell].grid
        at = self.heights(self.theta, cell, grid)
        own = [
            *range(self.shared),
            *range(self.shared + cell * self.axes, self.shared + (cell + 1) * self.axes),
        ]
        rows = np.zeros((len(grid), self.theta.size))
        for i in own:
            step = np.zeros(self.theta.size)
            step[i] = 1e-4 * self.sd[i]
            rows[:, i] = (self.heights(self.theta + step, cell, grid) - at) / step[i]
        rows[:, self.mean.size - self.cells + cell] = 1.0
        return rows / (self.prior.noise + self.prior.misfit * at)[:, None]

    def aim(self, n_params: float, tokens: float) -> Array:
        """[axes, parameters] M: the loss expected to be lost at a scale is the trace of M cov(theta) M' (half the curvature, in M)."""
        at = np.array(
            [1.0, *(np.array([math.log(n_params), math.log(tokens / n_params)]) - self.middle)]
        )
        to_law = np.zeros((self.axes, self.theta.size))
        for i in range(self.axes):
            to_law[i, 3 * i : 3 * i + 3] = at
        shape = self.theta[3 * self.axes : self.shared]
        if self.axes == 1:
            return math.sqrt(math.exp(shape[0]) / 2) * to_law
        tilted = np.array(
            [[math.sqrt(math.exp(shape[0]) / 2), 0.0], [0.0, math.sqrt(math.exp(shape[2]) / 2)]]
        )
        return tilted @ np.array([[1.0, shape[4]], [0.0, 1.0]]) @ to_law


def best_next(belief: Belief, aim: Array, trained: Mapping[int, set[int]]) -> list[tuple[int, int]]:
    """[(cell, index of its grid)]: the run that is worth most a FLOP, or the runs that open a cell, of which one alone says nothing."""
    covariance: Array = np.linalg.inv(belief.precision).astype(float)
    choices = []
    for cell, place in enumerate(belief.places):
        done = trained.get(cell, set())
        many = min(max(1, belief.axes + 1 - len(done)), len(place.grid) - len(done))
        worth, chosen = _greedy(belief.rows(cell), done, covariance, aim, many)
        if chosen:
            choices.append((worth / (many * place.flops), [(cell, index) for index in chosen]))
    return max(choices, key=lambda choice: choice[0])[1] if choices else []


def _greedy(
    rows: Array, done: set[int], covariance: Array, aim: Array, many: int
) -> tuple[float, list[int]]:
    """By how much `many` points, taken one after the other, lower the loss expected to be lost; and which."""
    chosen: list[int] = []
    total = 0.0
    for _ in range(many):
        half = rows @ covariance  # [G, parameters]
        spread = 1 + (half * rows).sum(1)
        worth = ((half @ aim.T) ** 2).sum(1) / spread
        worth[[*done, *chosen]] = -1.0
        chosen.append(int(worth.argmax()))
        total += worth[chosen[-1]]
        covariance = covariance - np.outer(half[chosen[-1]], half[chosen[-1]]) / spread[chosen[-1]]
    return total, chosen


def believe(places: Sequence[Place], seen: Mapping[tuple[int, int], float]) -> Belief:
    """The belief after the losses {(cell, index of its grid): loss}."""
    belief = Belief(places)
    runs: dict[int, list[tuple[int, float]]] = {}
    for (cell, index), loss in seen.items():
        runs.setdefault(cell, []).append((index, loss))
    belief.learn(
        {
            c: (places[c].grid[[i for i, _ in rows]], np.array([y for _, y in rows]))
            for c, rows in runs.items()
        }
    )
    return belief


def next_wave(
    places: Sequence[Place],
    seen: Mapping[tuple[int, int], float],
    target: tuple[float, float],
    size: int,
) -> tuple[float, list[tuple[int, int]]]:
    """(loss expected to be lost at the target's (n_params, tokens), what to train next); a cell is opened whole, so a wave may be larger."""
    belief = believe(places, seen)
    aim = belief.aim(*target)
    lost, wave = (
        float(np.trace(aim @ np.linalg.inv(belief.precision) @ aim.T)),
        list[tuple[int, int]](),
    )
    while len(wave) < size:
        trained = {c: {i for cell, i in [*seen, *wave] if cell == c} for c in range(len(places))}
        chosen = best_next(belief, aim, trained)
        if not chosen:
            break
        for cell, index in chosen:
            belief.pending(cell, index)
        wave += chosen
    return lost, wave


def joint(cells: list[Cell], asked: Search, target: tuple[float, float]) -> Waves:
    """All cells as one search, until `budget`, or until the loss expected to be lost at the target is under the noise."""
    seen: dict[tuple[int, Point], float] = {}
    most, lost = asked.budget or math.inf, math.inf
    while len(seen) < most:
        places = [Place(cell.n_params, cell.tokens, cell.flops, cell.logs) for cell in cells]
        known = {(c, cells[c].points.index(point)): loss for (c, point), loss in seen.items()}
        lost, wave = next_wave(places, known, target, int(min(asked.wave, most - len(seen))))
        if not wave or (lost < asked.noise and not _grown(cells, seen)):
            break
        points = [
            (c, cells[c].points[index])
            for c, index in wave[: int(min(len(wave), most - len(seen)))]
        ]
        seen |= zip(points, (yield [(cells[c], point, None) for c, point in points]), strict=True)
    left = f"{lost:.2g} of the loss is expected to be lost at n_params {target[0]:.3g}, tokens {target[1]:.3g}"
    for c, cell in enumerate(cells):
        cell.say(f"{sum(i == c for i, _ in seen)} of {len(cell.points)} points")
    cells[-1].say(left)


def _grown(cells: list[Cell], seen: Mapping[tuple[int, Point], float]) -> bool:
    """Lengthen the ranges of cells whose best point sits on their end."""
    best = [
        lowest({point: loss for (i, point), loss in seen.items() if i == c})
        for c in range(len(cells))
    ]
    return any([cell.grow(point) for cell, point in zip(cells, best, strict=True) if point])
