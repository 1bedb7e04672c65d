"""The optimal learning rate of one cell and its uncertainty, from a few losses along the lr axis.

In x = ln lr a loss basin is skewed: it is steeper where training becomes unstable. The form is

    L(x) = floor + curvature * phi(x - x0),    phi(t) = (exp(s t) - 1 - s t) / s**2,

with the minimum loss `floor` and the skew s. It is a parabola at s = 0 and
`const - p ln(lr) + q lr` at s = 1, the value that public sweeps prefer (fits/README.md). For a
given (x0, s) the form is linear in floor and curvature, so both are solved exactly on a grid of
(x0, s). The grid is weighted by its likelihood and a prior on s; the optimum is the mean over it,
so its interval includes the uncertainty of s. The variance of a point is the noise plus the square
of a fraction of its rise above the minimum: far from the optimum the form is only approximate, and
such points should have little weight.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune.surface.basin import phi

BAND = 0.0025  # near-optimal: loss within this fraction above the minimum loss
SKEWS = np.linspace(-0.5, 2.5, 16)
SKEW_PRIOR = (0.9, 0.5)  # mean, sd of s
MISFIT = 0.15  # sd of the error of the form, as a fraction of the rise above the minimum loss
LN_VARIANCES = (-32.0, 2.0)  # range of ln noise variance
NOISE_CELLS = 100  # at most so many cells are used to estimate the noise
N_GRID = 241  # values of x0 on the grid, from the first lr to the last

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Basin:
    """A fitted loss basin in x = ln lr; a call with learning rates returns losses in nats/token."""

    floor: float
    """Minimum loss, nats/token."""

    x: float
    """ln of the optimal lr."""

    curvature: float
    """Second derivative of the loss at x, nats/token."""

    skew: float
    """s."""

    def __call__(self, lr: Any) -> Any:
        return self.floor + self.curvature * phi(np.log(lr) - self.x, self.skew)

    def half_width(self, side: int, share: float = BAND) -> float:
        """Distance in ln lr to where the loss has risen by `share` of the minimum loss.

        Below (side -1) or above (side +1) the optimum.
        """
        rise = share * self.floor / self.curvature
        low, high = 0.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if phi(side * middle, self.skew) < rise else (low, middle)
        return low


def estimate_noise(points: list[dict[str, Any]]) -> tuple[float, int]:
    """Variance of the loss of one run around its cell's curve, pooled over cells, and its dof.

    It comes from replicates if there are enough, else from the residuals of the fitted basins. The
    effect of a seed that is the same at every lr of a cell is not included: it moves no optimum.
    """
    from scipy.optimize import brentq

    dof = sum(p["dof"] for p in points)
    if dof >= 3:
        return max(sum(p["ss"] for p in points) / dof, 1e-12), dof
    usable = [p for p in points if len(p["x"]) > 3]
    dof = sum(len(p["x"]) - 3 for p in usable)
    if not dof:  # 0.1 %, the noise of language models in public sweeps
        return (1e-3 * float(np.mean([p["y"].min() for p in points]))) ** 2, 0
    usable = usable[:: max(len(usable) // NOISE_CELLS, 1)]
    dof = sum(len(p["x"]) - 3 for p in usable)

    def excess(ln_variance: float) -> float:
        """ln(chi2 / dof) at this variance."""
        chi2 = sum(float(_profile(p, math.exp(ln_variance))["chi2"].min()) for p in usable)
        return math.log(max(chi2, 1e-300) / dof)

    low, high = LN_VARIANCES
    ln_variance = low
    if excess(high) > 0:
        ln_variance = high
    elif excess(low) > 0:
        ln_variance = brentq(excess, low, high, xtol=1e-6)
    smallest_sd = 1e-4 * float(np.mean([p["y"].min() for p in points]))
    return max(math.exp(ln_variance), smallest_sd**2), dof


def _profile(point: dict[str, Any], variance: float) -> dict[str, Array]:
    """chi2, minimum loss with its variance, and curvature on the (x0, s) grid, by regression."""
    x, y = point["x"], point["y"]
    centres = np.linspace(x[0], x[-1], N_GRID)
    shape = phi(x - centres[:, None, None], SKEWS[:, None])  # (x0, s, lr)
    rise = y - y.min()
    for _ in range(3):  # the rise above a fitted minimum, not above the lowest point
        weight = 1 / (variance / point["n"] + (MISFIT * rise) ** 2)
        total = weight.sum()
        mean_f, mean_y = shape @ weight / weight.sum(), y @ weight / weight.sum()
        sff = (shape - mean_f[..., None]) ** 2 @ weight
        curvature = ((shape - mean_f[..., None]) @ (weight * (y - mean_y))) / sff
        minimum = mean_y - curvature * mean_f
        residuals = y - minimum[..., None] - curvature[..., None] * shape
        chi2 = np.where(curvature > 0, residuals**2 @ weight, np.inf)
        if not np.isfinite(chi2).any():
            break
        best = np.unravel_index(np.argmin(chi2), chi2.shape)
        rise = curvature[best] * shape[best]
    return {
        "x": centres,
        "chi2": chi2,
        "floor": minimum,
        "curvature": curvature,
        "floor_var": 1 / total + mean_f**2 / sff,
    }


def locate(
    point: dict[str, Any], variance: float, dof: int, level: float = 0.95
) -> dict[str, Any] | None:
    """Optimum, interval, minimum loss, basin and band of one cell.

    None if no basin that opens upwards fits its losses.

    Args:
        point: The points of the cell, from `cells.split_cells`.
        variance: Noise variance of the loss of one run.
        dof: Degrees of freedom of `variance`.
        level: Coverage of the interval.
    """
    from scipy import stats

    grid = _profile(point, variance)
    if not np.isfinite(grid["chi2"]).any():
        return None
    prior = ((SKEWS - SKEW_PRIOR[0]) / SKEW_PRIOR[1]) ** 2
    log = -(grid["chi2"] + prior) / 2
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    over_x = weight.sum(1)
    x = float(over_x @ grid["x"])
    skew = float(weight.sum(0) @ SKEWS)
    widen = 2.0
    if dof:
        widen = float(stats.t.ppf(0.5 + level / 2, dof) / stats.norm.ppf(0.5 + level / 2))
    step = grid["x"][1] - grid["x"][0]
    se = widen * math.sqrt(float(over_x @ (grid["x"] - x) ** 2) + step**2 / 12)
    cumulative = np.cumsum(over_x) - over_x / 2
    ends = np.interp([0.5 - level / 2, 0.5 + level / 2], cumulative, grid["x"])
    floor = float((weight * grid["floor"]).sum())
    spread = float((weight * ((grid["floor"] - floor) ** 2 + grid["floor_var"])).sum())
    basin = _basin(point, variance, x, skew)
    return {
        "x": x,
        "se": se,
        "interval": [math.exp(x + widen * (float(end) - x)) for end in ends],
        "floor": floor,
        "floor_se": math.sqrt(spread),
        "basin": asdict(basin),
        "half_width": [basin.half_width(-1), basin.half_width(1)],
    }


def _basin(point: dict[str, Any], variance: float, x: float, skew: float) -> Basin:
    """The form at (x, skew), with minimum loss and curvature by weighted least squares."""
    shape = phi(point["x"] - x, skew)
    weight = 1 / (variance / point["n"] + (MISFIT * (point["y"] - point["y"].min())) ** 2)
    mean_f, mean_y = shape @ weight / weight.sum(), point["y"] @ weight / weight.sum()
    curvature = float(
        (weight * (shape - mean_f)) @ (point["y"] - mean_y) / (weight @ (shape - mean_f) ** 2)
    )
    curvature = max(curvature, 1e-6 * float(mean_y))  # a flat cell has a very wide band
    return Basin(float(mean_y - curvature * mean_f), x, curvature, skew)
