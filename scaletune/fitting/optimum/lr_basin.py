"""The best learning rate of one cell, from a handful of points, and how sure we are of it.

In x = ln lr a loss basin is skewed: steeper where training turns unstable. The form used here,

    L(x) = floor + curvature * phi(x - x0),    phi(t) = (exp(s t) - 1 - s t) / s**2,

is a parabola at s = 0 and `const - p ln(lr) + q lr` at s = 1, the value that public sweeps prefer (fits/README.md).
It is linear in its floor and curvature once (x0, s) are given, so both are solved exactly on a grid of (x0, s), and the
grid, weighted by its likelihood and a prior on s, gives the optimum with an interval that knows the form is uncertain.
A point's variance is that of the noise, plus the square of a share of its height: far up the sides the form is only
roughly right, and those points should say little about where the bottom is.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

BAND = 0.0025  # near-optimal: loss within this share of the floor
SKEWS = np.linspace(-0.5, 2.5, 16)
SKEW_PRIOR = (0.9, 0.5)  # mean, sd of s
MISFIT = 0.15  # sd of the form's error, as a share of the height above the floor
REACH = 0.06  # points higher than this share of the lowest are outside the basin that is fitted
LOGS = (-32.0, 2.0)  # ln of the noise variances tried
MANY = 100  # cells that are enough to know the noise from
N_GRID = 241  # values of x0 tried, from the first lr to the last

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Basin:
    """A fitted basin in x = ln lr; called with learning rates it gives losses in nats/token."""

    floor: float  # nats/token
    x: float  # ln of the optimal lr
    curvature: float  # second derivative of the loss at x, nats/token
    skew: float  # s

    def __call__(self, lr: Any) -> Any:
        return self.floor + self.curvature * phi(np.log(lr) - self.x, self.skew)

    def half_width(self, side: int, share: float = BAND) -> float:
        """How far below (side -1) or above (+1) the optimum, in ln lr, the loss has risen by `share` of the floor."""
        height = share * self.floor / self.curvature
        low, high = 0.0, 60.0
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if phi(side * middle, self.skew) < height else (low, middle)
        return low


def phi(t: Any, s: Any) -> Any:
    """(exp(s t) - 1 - s t) / s**2, which is t**2 / 2 at s = 0."""
    u = np.clip(np.asarray(s) * t, -60.0, 60.0)
    small = np.abs(u) < 1e-3
    safe = np.where(small, 1.0, u)
    return np.square(t) * np.where(small, 0.5 + u / 6, (np.expm1(safe) - safe) / safe**2)


def noise_of(points: list[dict[str, Any]]) -> tuple[float, int]:
    """Variance of one run's loss about its cell's curve, pooled over cells, and its degrees of freedom.

    From replicates when there are any (what seeds share over a cell's lrs does not move its optimum and is out already),
    else from what the basins leave over.
    """
    from scipy.optimize import brentq

    dof = sum(p["dof"] for p in points)
    if dof >= 3:
        return max(sum(p["ss"] for p in points) / dof, 1e-12), dof
    usable = [p for p in points if len(p["x"]) > 3]
    dof = sum(len(p["x"]) - 3 for p in usable)
    if not dof:
        return (
            1e-3 * float(np.mean([p["y"].min() for p in points]))
        ) ** 2, 0  # 0.1 %: what language models show in public sweeps
    usable = usable[:: max(len(usable) // MANY, 1)]
    dof = sum(len(p["x"]) - 3 for p in usable)

    def over(log: float) -> float:
        """ln of what is left over at this variance, over what noise leaves."""
        left = sum(float(_surface(p, math.exp(log))["chi2"].min()) for p in usable)
        return math.log(max(left, 1e-300) / dof)

    low, high = LOGS
    log = high if over(high) > 0 else brentq(over, low, high, xtol=1e-6) if over(low) > 0 else low
    floor = 1e-4 * float(np.mean([p["y"].min() for p in points]))
    return max(math.exp(log), floor**2), dof


def _surface(point: dict[str, Any], variance: float) -> dict[str, Array]:
    """chi2, floor, curvature and the floor's variance on the (x0, s) grid, by weighted linear regression."""
    x, y = point["x"], point["y"]
    centres = np.linspace(x[0], x[-1], N_GRID)
    shape = phi(x - centres[:, None, None], SKEWS[:, None])  # (x0, s, lr)
    height = y - y.min()
    for _ in range(3):  # heights above a fitted floor, not above the luckiest point
        weight = 1 / (variance / point["n"] + (MISFIT * height) ** 2)
        total, mean_f, mean_y = (
            weight.sum(),
            shape @ weight / weight.sum(),
            y @ weight / weight.sum(),
        )
        sff = (shape - mean_f[..., None]) ** 2 @ weight
        curvature = ((shape - mean_f[..., None]) @ (weight * (y - mean_y))) / sff
        floor = mean_y - curvature * mean_f
        chi2 = np.where(
            curvature > 0,
            ((y - floor[..., None] - curvature[..., None] * shape) ** 2) @ weight,
            np.inf,
        )
        if not np.isfinite(chi2).any():
            break
        best = np.unravel_index(np.argmin(chi2), chi2.shape)
        height = curvature[best] * shape[best]
    return {
        "x": centres,
        "chi2": chi2,
        "floor": floor,
        "curvature": curvature,
        "floor_var": 1 / total + mean_f**2 / sff,
    }


def locate(point: dict[str, Any], variance: float, dof: int, level: float = 0.95) -> dict[str, Any]:
    """Optimum, interval, floor, basin and band of one cell's points, given the noise variance of one run."""
    from scipy import stats

    grid = _surface(point, variance)
    prior = ((SKEWS - SKEW_PRIOR[0]) / SKEW_PRIOR[1]) ** 2
    log = -(grid["chi2"] + prior) / 2
    weight = np.exp(log - log.max())
    weight /= weight.sum()
    over_x = weight.sum(1)
    x = float(over_x @ grid["x"])
    skew = float(weight.sum(0) @ SKEWS)
    widen = (
        float(stats.t.ppf(0.5 + level / 2, dof) / stats.norm.ppf(0.5 + level / 2)) if dof else 2.0
    )
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
    """The one curve that stands for the cell: the form at (x, skew), floor and curvature by least squares."""
    shape = phi(point["x"] - x, skew)
    weight = 1 / (variance / point["n"] + (MISFIT * (point["y"] - point["y"].min())) ** 2)
    mean_f, mean_y = shape @ weight / weight.sum(), point["y"] @ weight / weight.sum()
    curvature = float(
        (weight * (shape - mean_f)) @ (point["y"] - mean_y) / (weight @ (shape - mean_f) ** 2)
    )
    curvature = max(
        curvature, 1e-6 * float(mean_y)
    )  # a flat cell: its band is then very wide, which is true
    return Basin(float(mean_y - curvature * mean_f), x, curvature, skew)
