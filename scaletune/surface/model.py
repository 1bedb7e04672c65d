"""The joint loss surface: ln loss of many runs and its Jacobian.

    ln loss = ln F(n, d) + ln(1 + exp(w . (n, d)) excess(x - x*(n, d))) + deviation + noise
    F = E + A exp(-alpha n) + B exp(-beta d)
    x* = c + along n + D (d - n) + deviation

n, d: ln n_params and ln tokens about a centre. x: ln lr, ln batch size (, ln weight decay). F is
the minimum loss, x* the optimum, `excess` the loss basin of `basin.py`. Each cell (one n_params
and tokens) deviates from the law: its optimum and its ln minimum loss by independent normals whose
sds are `Scales.scatter`. The noise has Student's t distribution (STUDENT degrees of freedom) with
a scale that grows with the excess: far from the optimum the form is only roughly right, and losses
spike.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletune.surface.basin import basin_excess, directions
from scaletune.surface.evaluation import AXES

LAW = 3
"""Number of parameters of the law of one axis's optimum: c, along, D."""
STUDENT = 5.0
"""Degrees of freedom of the noise."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class SurfaceRuns:
    """R runs of C cells, sorted by cell."""

    n: Array
    """(R,) ln n_params about the centre."""
    d: Array
    """(R,) ln tokens about the centre."""
    x: Array
    """(R, axes) ln settings."""
    y: Array
    """(R,) ln loss; NaN: diverged."""
    cell: NDArray[np.int_]
    """(R,) cell numbers, 0 to C - 1."""

    @property
    def n_cells(self) -> int:
        return int(self.cell[-1]) + 1

    @property
    def starts(self) -> NDArray[np.int_]:
        """(C,) the first run of each cell."""
        return np.searchsorted(self.cell, np.arange(self.n_cells))

    def per_cell(self, values: Array) -> Array:
        """Sums over the runs of each cell, (R, ...) -> (C, ...)."""
        return np.add.reduceat(values, self.starts, axis=0)

    def sample(self, n: int, seed: int = 0) -> SurfaceRuns:
        """About `n` random runs and the first run of each cell: the cells stay."""
        drawn = np.random.default_rng(seed).permutation(len(self.y))[:n]
        return self.select(np.union1d(drawn, self.starts))

    def select(self, chosen: NDArray[np.int_]) -> SurfaceRuns:
        """The runs with these indices, in order, their cells renumbered."""
        rows = np.sort(chosen)
        cell = np.unique(self.cell[rows], return_inverse=True)[1]
        return SurfaceRuns(self.n[rows], self.d[rows], self.x[rows], self.y[rows], cell)


class Scales(NamedTuple):
    """Standard deviations that weigh runs and cells."""

    noise: float
    """Scale of ln loss of one run at the optimum."""
    misfit: float
    """Growth of this scale with the excess."""
    scatter: Array
    """(axes + 1,) sd of the cells about the law: ln optimum of each axis, ln minimum loss."""

    def variance(self, excess: Array) -> Array:
        """(R,) squared scale of ln loss of runs with this excess."""
        return self.noise**2 + (self.misfit * excess) ** 2


def parameter_names(n_axes: int) -> list[str]:
    """The parameters, in the order of the vector theta."""
    axes, ways = AXES[:n_axes], directions(n_axes)
    return [
        *(f"{axis}.{part}" for axis in axes for part in ("c", "along", "D")),
        *(f"loss.{part}" for part in ("E", "A", "B", "alpha", "beta")),
        *(f"curvature.{way}" for way in ways),
        *(f"skew.{way}" for way in ways),
        "reach.lr",
        "width.n",
        "width.d",
    ]


def law_basis(n: Array, d: Array) -> Array:
    """What c, along and D of a law are multiplied by: (R, 3)."""
    return np.column_stack([np.ones_like(n), n, d - n])


def ln_loss(theta: Array, delta: Array, runs: SurfaceRuns) -> tuple[Array, Array, Array, Array]:
    """ln loss of runs, without noise.

    Args:
        theta: (P,) parameters, named by `parameter_names`.
        delta: (C, axes + 1) deviations of the cells from the law.
        runs: Where to evaluate; the losses are not read.

    Returns:
        ln loss (R,), its derivatives to theta (R, P) and to the cell's own delta (R, axes + 1), and
        the relative excess above the minimum loss (R,).
    """
    k = runs.x.shape[1]
    law = theta[: 3 * k].reshape(k, 3)
    e, a, b, alpha, beta = theta[3 * k : 3 * k + 5]
    shape = theta[3 * k + 5 : -2]
    n, d, basis = runs.n, runs.d, law_basis(runs.n, runs.d)
    excess, to_offset, to_shape = basin_excess(runs.x - basis @ law.T - delta[runs.cell, :k], shape)
    wide = np.exp(np.clip(n * theta[-2] + d * theta[-1], -5.0, 5.0))
    excess = excess * wide
    scale = (wide / (1 + excess))[:, None]
    terms = np.exp(np.column_stack([e + 0 * n, a - alpha * n, b - beta * d]))
    share = terms / terms.sum(1, keepdims=True)
    to_centre, ratio = -to_offset * scale, excess / (1 + excess)
    to_theta = np.column_stack(
        [
            *(to_centre[:, i, None] * basis for i in range(k)),
            share,
            -n * share[:, 1],
            -d * share[:, 2],
            to_shape * scale,
            ratio * n,
            ratio * d,
        ]
    )
    value = np.log(terms.sum(1)) + np.log1p(excess) + delta[runs.cell, k]
    return value, to_theta, np.column_stack([to_centre, np.ones_like(n)]), excess
