"""The joint surface: the loss of every run at once, as a floor and a basin whose centre follows a law.

    ln loss = ln F(n, d) + ln(1 + exp(w . (n, d)) height(x - x*(n, d))) + deviation of the cell's floor + noise
    F = E + A exp(-alpha n) + B exp(-beta d),    x* = c + along n + D (d - n) + deviation of the cell

n, d: ln n_params and ln tokens about the middle of the cells; x: ln lr, ln batch (, ln weight decay). Cells deviate from
the law as independent normals whose scatter is estimated with it (EM, with a guess that counts for SCATTER_WEIGHT cells).
Noise is Student's, of a scale that grows with the height: far up the sides the form is only roughly right, and runs spike.
MAP by damped Gauss-Newton, the cells' deviations eliminated first, so that the cost is linear in runs and in cells.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.joint.basin import directions, height
from scaletune.laws.surface import AXES

Array = NDArray[np.float64]

# Mean and sd of every parameter before any run is seen. `along` is the exponent when tokens grow with n_params, on which
# published laws agree better than on `D`, the exponent of tokens at fixed n_params (in which sequences and parametrizations
# differ). lr along: -0.41 Step Law, -0.36 Porian, -0.25 DeepSeek, -0.31 Ling, -0.11 Moonlight, -0.55 Bjorck; lr D: +0.31 Step
# Law, -0.32 Bjorck (at fixed batch). Batch along: 0.57 Step Law, 0.70 Porian, 0.65 DeepSeek, 0.73 Ling, 0.83 Moonlight, 0.38 Power
# Lines, 0.5 Time Transfer; critical 0.47 Zhang, 0.46 Power Lines, 0.5 Merrill: mean 0.58. Batch D: 0.57, 0.38, 0.5, critical 0.46 to 0.5.
# alpha, beta: 0.18 to 0.51, most near 0.35 (arXiv:2203.15556, 2404.10102, 2305.16264, 2502.06857). The shape is that of public sweeps.
PRIORS: dict[str, tuple[float, float]] = {
    "lr.along": (-0.33, 0.2), "lr.D": (0.1, 0.3),
    "batch.along": (0.58, 0.2), "batch.D": (0.5, 0.2),
    "wd.along": (0.0, 0.3), "wd.D": (0.0, 0.3),
    "loss.alpha": (0.35, 0.1), "loss.beta": (0.35, 0.1),
    "curvature.lr": (-4.5, 1.0), "curvature.batch": (-4.8, 1.0), "curvature.ratio": (-4.8, 1.0),
    "curvature.wd": (-5.5, 1.0), "curvature.product": (-5.5, 1.0),
    "skew.lr": (0.4, 0.4), "skew.batch": (0.7, 0.5), "skew.ratio": (0.7, 0.5), "skew.wd": (0.0, 0.5), "skew.product": (0.0, 0.5),
    "reach.lr": (0.0, 0.5),
    "width.n": (0.0, 0.15), "width.d": (0.0, 0.15),
}  # fmt: skip
CENTRE_SD = 1.5  # of a centre about the cells' best runs
E_SHARE = (0.7, 0.25)  # irreducible part of the lowest losses, and its sd in logs
TERM_SD = 1.0  # of ln A and ln B
SCATTER = {
    "lr": 0.18,
    "batch": 0.22,
    "wd": 0.3,
    "loss": 0.0025,
}  # guess of the sd of cells about the law, in logs
SCATTER_WEIGHT = 2.0  # cells the guess counts for
SETTLED = 0.02  # rounds stop when no parameter moved by more of its prior sd
NOISE, MISFIT, STUDENT = (
    1e-3,
    0.15,
    5.0,
)  # sd of ln loss at the bottom; its growth with height; degrees of freedom


@dataclass(frozen=True)
class Runs:
    """R runs of C cells, sorted by cell."""

    n: Array  # (R,)
    d: Array
    x: Array  # (R, axes)
    y: Array  # ln loss
    cell: NDArray[np.int_]  # 0 ... C - 1

    @property
    def n_cells(self) -> int:
        return int(self.cell[-1]) + 1

    def per_cell(self, values: Array) -> Array:
        """Sums over the runs of each cell, (R, ...) -> (C, ...)."""
        return np.add.reduceat(values, np.searchsorted(self.cell, np.arange(self.n_cells)), axis=0)


class Scales(NamedTuple):
    """What the fit weighs by: noise at the bottom, its growth with height, and the cells' scatter (axes + 1,)."""

    noise: float
    misfit: float
    scatter: Array


@dataclass(frozen=True)
class Solved:
    """The MAP, and the blocks of its covariance."""

    theta: Array  # (P,)
    delta: Array  # (C, axes + 1): deviations of the cells, of the floor last
    covariance: Array  # (P, P)
    own: Array  # (C, axes + 1, axes + 1): covariance of delta
    cross: Array  # (C, P, axes + 1)
    scales: Scales
    height: Array  # (R,)
    left: Array  # (R,) residuals of ln loss
    objective: float


def names(n_axes: int) -> list[str]:
    """The parameters, in the order of the vector."""
    axes, ways = AXES[:n_axes], directions(n_axes)
    law = [f"{axis}.{part}" for axis in axes for part in ("c", "along", "D")]
    floor = [f"loss.{part}" for part in ("E", "A", "B", "alpha", "beta")]
    return [
        *law,
        *floor,
        *(f"curvature.{way}" for way in ways),
        *(f"skew.{way}" for way in ways),
        "reach.lr",
        "width.n",
        "width.d",
    ]


def prior(runs: Runs) -> Array:
    """(P, 2): mean and sd; centres about the cells' best runs, the floor's terms about the lowest losses."""
    starts = np.searchsorted(runs.cell, np.arange(runs.n_cells))
    best = [
        a + int(np.argmin(part))
        for a, part in zip(starts, np.split(runs.y, starts[1:]), strict=True)
    ]
    lowest, middle = float(np.exp(runs.y[best].mean())), runs.x[best].mean(0)
    known = {f"{axis}.c": (float(at), CENTRE_SD) for axis, at in zip(AXES, middle, strict=False)}
    known |= {"loss.E": (math.log(E_SHARE[0] * lowest), E_SHARE[1])}
    known |= {f"loss.{term}": (math.log((1 - E_SHARE[0]) / 2 * lowest), TERM_SD) for term in "AB"}
    return np.array([(PRIORS | known)[name] for name in names(runs.x.shape[1])])


def law_basis(n: Array, d: Array) -> Array:
    """What c, along and D of a centre are multiplied by: (R, 3)."""
    return np.column_stack([np.ones_like(n), n, d - n])


def model(theta: Array, delta: Array, runs: Runs) -> tuple[Array, Array, Array, Array]:
    """ln loss (R,), its derivatives to theta (R, P) and to the cell's own delta (R, axes + 1), and the height (R,)."""
    k = runs.x.shape[1]
    law, (e, a, b, alpha, beta), shape = (
        theta[: 3 * k].reshape(k, 3),
        theta[3 * k : 3 * k + 5],
        theta[3 * k + 5 : -2],
    )
    n, d, basis = runs.n, runs.d, law_basis(runs.n, runs.d)
    tall, to_offset, to_shape = height(runs.x - basis @ law.T - delta[runs.cell, :k], shape)
    wide = np.exp(np.clip(n * theta[-2] + d * theta[-1], -5.0, 5.0))
    tall = tall * wide
    scale = (wide / (1 + tall))[:, None]
    terms = np.exp(np.column_stack([e + 0 * n, a - alpha * n, b - beta * d]))
    share = terms / terms.sum(1, keepdims=True)
    to_centre, ratio = -to_offset * scale, tall / (1 + tall)
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
    value = np.log(terms.sum(1)) + np.log1p(tall) + delta[runs.cell, k]
    return value, to_theta, np.column_stack([to_centre, np.ones_like(n)]), tall


def solve(
    runs: Runs,
    given: Array,
    *,
    scatter: Array | None = None,
    noise: tuple[float, float] | None = None,
    rounds: int = 12,
) -> Solved:
    """The MAP under the prior `given` (P, 2); scatter and (noise, misfit) estimated with it unless they are given."""
    k = runs.x.shape[1]
    guess = np.array([SCATTER[axis] for axis in (*AXES[:k], "loss")])
    scales = Scales(*(noise or (NOISE, MISFIT)), guess if scatter is None else scatter)
    theta, delta = given[:, 0], np.zeros((runs.n_cells, k + 1))
    tall = np.expm1(
        runs.y
        - np.repeat(
            np.minimum.reduceat(runs.y, np.searchsorted(runs.cell, np.arange(runs.n_cells))),
            np.bincount(runs.cell),
        )
    )
    for _ in range(rounds):
        theta, delta, objective, moved = _descend(runs, given, scales, theta, delta, tall)
        value, to_theta, to_delta, tall = model(theta, delta, runs)
        left = runs.y - value
        if noise is None:
            scales = Scales(*_noise(left, tall), scales.scatter)
        blocks = _blocks(runs, given, scales, _weight(left, tall, scales), to_theta, to_delta)
        covariance, own, cross = _covariance(*blocks)
        if scatter is None:
            square = delta**2 + np.einsum("cii->ci", own)
            scales = scales._replace(
                scatter=np.sqrt(
                    (square.sum(0) + SCATTER_WEIGHT * guess**2) / (runs.n_cells + SCATTER_WEIGHT)
                )
            )
        if moved < SETTLED:
            break
    return Solved(theta, delta, covariance, own, cross, scales, tall, left, objective)


def _descend(
    runs: Runs,
    given: Array,
    scales: Scales,
    theta: Array,
    delta: Array,
    tall: Array,
    steps: int = 12,
) -> tuple[Array, Array, float, float]:
    """Levenberg-Marquardt at fixed scales: theta, delta, objective, and how far theta went in prior sds."""
    scale2, damping, start = scales.noise**2 + (scales.misfit * tall) ** 2, 1e-3, theta
    value, to_theta, to_delta, _ = model(theta, delta, runs)
    objective = _objective(runs.y - value, scale2, given, scales, theta, delta)
    for _ in range(steps):
        left = runs.y - value
        weight = (STUDENT + 1) / (STUDENT * scale2 + left**2)
        step_theta, step_delta = _step(
            runs, given, scales, weight, left, to_theta, to_delta, theta, delta, damping
        )
        tried = model(theta + step_theta, delta + step_delta, runs)
        new = _objective(
            runs.y - tried[0], scale2, given, scales, theta + step_theta, delta + step_delta
        )
        if new > objective or not math.isfinite(new):
            damping *= 8
            if damping > 1e8:
                break
            continue
        gained, objective, damping = objective - new, new, damping / 5
        theta, delta, (value, to_theta, to_delta, _) = theta + step_theta, delta + step_delta, tried
        if gained < 1e-6 * (1 + abs(objective)):
            break
    return theta, delta, objective, float(np.abs((theta - start) / given[:, 1]).max())


def _objective(
    left: Array, scale2: Array, given: Array, scales: Scales, theta: Array, delta: Array
) -> float:
    """Minus the log posterior, up to what does not depend on theta and delta."""
    misfit = (STUDENT + 1) / 2 * np.log1p(left**2 / (STUDENT * scale2)).sum()
    return float(
        misfit
        + (((theta - given[:, 0]) / given[:, 1]) ** 2).sum() / 2
        + ((delta / scales.scatter) ** 2).sum() / 2
    )


def _weight(left: Array, tall: Array, scales: Scales) -> Array:
    return (STUDENT + 1) / (STUDENT * (scales.noise**2 + (scales.misfit * tall) ** 2) + left**2)


def _blocks(
    runs: Runs,
    given: Array,
    scales: Scales,
    weight: Array,
    to_theta: Array,
    to_delta: Array,
    damping: float = 0.0,
) -> tuple[Array, Array, Array]:
    """The information matrix in blocks: theta (P, P), cross (C, P, axes + 1), delta (C, axes + 1, axes + 1)."""
    weighted = to_delta * weight[:, None]
    # einsum and not @: threads of a BLAS cost far more than a matrix this narrow
    of_theta = np.einsum("rp,rq->pq", to_theta, to_theta * weight[:, None]) + np.diag(
        given[:, 1] ** -2.0
    )
    of_delta = runs.per_cell(np.einsum("ri,rj->rij", weighted, to_delta)) + np.diag(
        scales.scatter**-2.0
    )
    cross = runs.per_cell(np.einsum("rp,ri->rpi", to_theta, weighted))
    of_theta[np.diag_indices_from(of_theta)] *= 1 + damping
    np.einsum("cii->ci", of_delta)[:] *= 1 + damping
    return of_theta, cross, of_delta


def expected_weight(tall: Array, scales: Scales) -> Array:
    """Fisher information of a run about its own ln loss: (nu + 1) / (nu + 3) / scale**2 of Student's t (Lange, Little & Taylor 1989)."""
    return (STUDENT + 1) / (STUDENT + 3) / (scales.noise**2 + (scales.misfit * tall) ** 2)


def expected_information(runs: Runs, theta: Array, scales: Scales, copies: Array) -> Array:
    """(C, P, P): of each cell's runs about theta, its deviations integrated out, if the law were theta; losses are not read.

    `copies` (R,): seeds of each run. With the prior's, the sum is the inverse of the covariance that a fit of these runs would have.
    """
    _, to_theta, to_delta, tall = model(theta, np.zeros((runs.n_cells, len(scales.scatter))), runs)
    weight = (copies * expected_weight(tall, scales))[:, None]
    of_theta = runs.per_cell(np.einsum("rp,rq->rpq", to_theta, to_theta * weight))
    of_delta = runs.per_cell(np.einsum("ri,rj->rij", to_delta * weight, to_delta)) + np.diag(
        scales.scatter**-2.0
    )
    cross = runs.per_cell(np.einsum("rp,ri->rpi", to_theta, to_delta * weight))
    return of_theta - cross @ np.linalg.inv(of_delta) @ cross.transpose(0, 2, 1)


def _step(
    runs: Runs, given: Array, scales: Scales, weight: Array, left: Array, to_theta: Array, to_delta: Array,
    theta: Array, delta: Array, damping: float,
) -> tuple[Array, Array]:  # fmt: skip
    """The damped Gauss-Newton step, each cell's deviations eliminated (Schur complement)."""
    of_theta, cross, of_delta = _blocks(runs, given, scales, weight, to_theta, to_delta, damping)
    slope = to_theta.T @ (weight * left) - (theta - given[:, 0]) / given[:, 1] ** 2
    own_slope = runs.per_cell(to_delta * (weight * left)[:, None]) - delta / scales.scatter**2
    through = cross @ np.linalg.inv(of_delta)
    step = np.linalg.solve(
        of_theta - np.einsum("cpi,cqi->pq", through, cross),
        slope - np.einsum("cpi,ci->p", through, own_slope),
    )
    return step, np.linalg.solve(
        of_delta, (own_slope - np.einsum("cpi,p->ci", cross, step))[..., None]
    )[..., 0]


def _covariance(of_theta: Array, cross: Array, of_delta: Array) -> tuple[Array, Array, Array]:
    """The inverse of the information in blocks: theta, each cell's delta, and theta with each cell's delta."""
    inverse = np.linalg.inv(of_delta)
    through = cross @ inverse
    covariance = np.linalg.inv(of_theta - np.einsum("cpi,cqi->pq", through, cross))
    between = -np.einsum("pq,cqi->cpi", covariance, through)
    return covariance, inverse - np.einsum("cpi,cpj->cij", through, between), between


def _noise(left: Array, tall: Array) -> tuple[float, float]:
    """(noise, misfit) of highest Student likelihood on a grid, each with a log-normal prior; a misfit is never taken for less than a tenth: form errors of neighbours are alike."""
    noises, misfits = (
        NOISE * np.geomspace(0.25, 32, 22)[:, None],
        MISFIT * np.geomspace(2 / 3, 4, 8),
    )
    cost = 4 * (np.log(noises / NOISE) ** 2 + np.log(misfits / MISFIT) ** 2)
    for i, j in np.ndindex(cost.shape):
        scale2 = noises[i] ** 2 + (misfits[j] * tall) ** 2
        cost[i, j] += (
            np.log(scale2) / 2 + (STUDENT + 1) / 2 * np.log1p(left**2 / (STUDENT * scale2))
        ).sum()
    i, j = np.unravel_index(np.argmin(cost), cost.shape)
    return float(noises[i, 0]), float(misfits[j])
