"""MAP estimate of the joint surface and its covariance, by damped Gauss-Newton and empirical Bayes.

theta (shared by all runs) has independent normal priors, delta (the deviations of each cell)
normal priors with the sds `Scales.scatter`, and the noise is Student's t. The scales are estimated
with theta and delta: the scatter by EM with a prior guess that counts for SCATTER_WEIGHT cells,
the noise by its likelihood on a grid. In every linear solve the deviations of each cell are
eliminated first (Schur complement), so the cost is linear in runs and in cells. The covariance is
the inverse of the Gauss-Newton information at the MAP (Laplace approximation).

A diverged run (ln loss NaN) is a censored observation: its excess is at least DIVERGED_EXCESS.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.surface.model import LAW, STUDENT, Scales, SurfaceRuns, ln_loss
from scaletune.surface.prior import MISFIT, NOISE, SCATTER_WEIGHT, guessed_scales

LARGE, SAMPLE = 10_000, 4_000
"""Of more than LARGE runs, the estimate from SAMPLE of them is the start."""
SETTLED = 0.02
"""The estimate of the scales ends when no parameter moves by more of its prior sd."""
DIVERGED_EXCESS = 0.3
"""A diverged run has at least this relative excess."""
DIVERGED_SD = 0.1
"""Scale of ln(1 + excess) by which a diverged run may be below it."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class JointSolution:
    """The MAP estimate, and the blocks of its covariance."""

    theta: Array
    """(P,)"""
    delta: Array
    """(C, axes + 1) deviations of the cells, that of ln minimum loss last."""
    covariance: Array
    """(P, P) of theta."""
    own: Array
    """(C, axes + 1, axes + 1) covariance of delta."""
    cross: Array
    """(C, P, axes + 1) covariance of theta with delta."""
    scales: Scales
    excess: Array
    """(R,) fitted relative excess of the runs."""
    residuals: Array
    """(R,) of ln loss."""
    objective: float


def linearize(theta: Array, delta: Array, runs: SurfaceRuns) -> tuple[Array, Array, Array, Array]:
    """Residuals (R,), the derivatives of ln loss to theta and to delta, and the excess (R,).

    The residual of a diverged run does not depend on the minimum loss, and is 0 where the excess is
    large enough.
    """
    value, to_theta, to_delta, excess = ln_loss(theta, delta, runs)
    residuals, diverged = runs.y - value, np.isnan(runs.y)
    if diverged.any():
        k = runs.x.shape[1]
        missing = np.log1p(DIVERGED_EXCESS) - np.log1p(excess[diverged])
        residuals[diverged] = np.maximum(missing, 0.0)
        to_theta[diverged, LAW * k : LAW * k + 5], to_delta[diverged, k] = 0.0, 0.0
        inactive = diverged & (residuals == 0)
        to_theta[inactive], to_delta[inactive] = 0.0, 0.0
    return residuals, to_theta, to_delta, excess


def _variance(runs: SurfaceRuns, excess: Array, scales: Scales) -> Array:
    """(R,) squared scales of the residuals."""
    return np.where(np.isnan(runs.y), DIVERGED_SD**2, scales.variance(excess))


def solve(
    runs: SurfaceRuns,
    prior: Array,
    *,
    scatter: Array | None = None,
    noise: tuple[float, float] | None = None,
    rounds: int = 12,
) -> JointSolution:
    """Estimates the surface.

    Args:
        runs: The runs.
        prior: (P, 2) mean and sd of theta.
        scatter: Known scatter of the cells; None: estimate it.
        noise: Known (noise, misfit); None: estimate them.
        rounds: Largest number of alternations between (theta, delta) and the scales.
    """
    k = runs.x.shape[1]
    guess = guessed_scales(k)
    scales = Scales(*(noise or (NOISE, MISFIT)), guess.scatter if scatter is None else scatter)
    theta, delta = prior[:, 0], np.zeros((runs.n_cells, k + 1))
    lowest = np.repeat(np.fmin.reduceat(runs.y, runs.starts), np.bincount(runs.cell))
    excess = np.expm1(runs.y - lowest)
    if len(runs.y) > LARGE:
        start = solve(runs.sample(SAMPLE), prior, scatter=scatter, noise=noise, rounds=rounds)
        theta, delta, scales = start.theta, start.delta, start.scales
        excess = linearize(theta, delta, runs)[3]
    for _ in range(rounds):
        theta, delta, objective, moved = _descend(runs, prior, scales, theta, delta, excess)
        residuals, to_theta, to_delta, excess = linearize(theta, delta, runs)
        if noise is None:
            finite = ~np.isnan(runs.y)
            scales = Scales(*_estimate_noise(residuals[finite], excess[finite]), scales.scatter)
        weight = _weight(residuals, _variance(runs, excess, scales))
        blocks = _blocks(runs, prior, scales, weight, to_theta, to_delta)
        covariance, own, cross = _covariance(*blocks)
        if scatter is None:
            square = delta**2 + np.einsum("cii->ci", own)
            weighted = square.sum(0) + SCATTER_WEIGHT * guess.scatter**2
            scales = scales._replace(scatter=np.sqrt(weighted / (runs.n_cells + SCATTER_WEIGHT)))
        if moved < SETTLED:
            break
    return JointSolution(theta, delta, covariance, own, cross, scales, excess, residuals, objective)


def _descend(
    runs: SurfaceRuns,
    prior: Array,
    scales: Scales,
    theta: Array,
    delta: Array,
    excess: Array,
    steps: int = 12,
) -> tuple[Array, Array, float, float]:
    """Levenberg-Marquardt at fixed scales.

    Returns:
        theta, delta, the objective, and the largest move of a parameter in prior sds.
    """
    variance, damping, start = _variance(runs, excess, scales), 1e-3, theta
    residuals, to_theta, to_delta, _ = linearize(theta, delta, runs)
    objective = _objective(residuals, variance, prior, scales, theta, delta)
    for _ in range(steps):
        weight = _weight(residuals, variance)
        step_theta, step_delta = _step(
            runs, prior, scales, weight, residuals, to_theta, to_delta, theta, delta, damping
        )
        trial = linearize(theta + step_theta, delta + step_delta, runs)
        new = _objective(trial[0], variance, prior, scales, theta + step_theta, delta + step_delta)
        if new > objective or not math.isfinite(new):
            damping *= 8
            if damping > 1e8:
                break
            continue
        gained, objective, damping = objective - new, new, damping / 5
        theta, delta, (residuals, to_theta, to_delta, _) = (
            theta + step_theta,
            delta + step_delta,
            trial,
        )
        if gained < 1e-6 * (1 + abs(objective)):
            break
    return theta, delta, objective, float(np.abs((theta - start) / prior[:, 1]).max())


def _objective(
    residuals: Array, variance: Array, prior: Array, scales: Scales, theta: Array, delta: Array
) -> float:
    """Minus the log posterior, without the terms that do not depend on theta and delta."""
    misfit = (STUDENT + 1) / 2 * np.log1p(residuals**2 / (STUDENT * variance)).sum()
    return float(
        misfit
        + (((theta - prior[:, 0]) / prior[:, 1]) ** 2).sum() / 2
        + ((delta / scales.scatter) ** 2).sum() / 2
    )


def _weight(residuals: Array, variance: Array) -> Array:
    """(R,) Gauss-Newton weights of Student's t."""
    return (STUDENT + 1) / (STUDENT * variance + residuals**2)


def _blocks(
    runs: SurfaceRuns,
    prior: Array,
    scales: Scales,
    weight: Array,
    to_theta: Array,
    to_delta: Array,
    damping: float = 0.0,
) -> tuple[Array, Array, Array]:
    """The information matrix in blocks.

    Returns:
        theta (P, P), theta with delta (C, P, axes + 1), delta (C, axes + 1, axes + 1).
    """
    weighted = to_delta * weight[:, None]
    # einsum, not @, of few runs: the threads of a BLAS cost far more than a matrix this narrow
    product = "rp,rq->pq", to_theta, to_theta * weight[:, None]
    large = len(weight) > LARGE
    of_theta = product[1].T @ product[2] if large else np.einsum(*product)
    of_theta = of_theta + np.diag(prior[:, 1] ** -2.0)
    of_delta = runs.per_cell(np.einsum("ri,rj->rij", weighted, to_delta)) + np.diag(
        scales.scatter**-2.0
    )
    cross = runs.per_cell(np.einsum("rp,ri->rpi", to_theta, weighted))
    of_theta[np.diag_indices_from(of_theta)] *= 1 + damping
    np.einsum("cii->ci", of_delta)[:] *= 1 + damping
    return of_theta, cross, of_delta


def _step(
    runs: SurfaceRuns,
    prior: Array,
    scales: Scales,
    weight: Array,
    residuals: Array,
    to_theta: Array,
    to_delta: Array,
    theta: Array,
    delta: Array,
    damping: float,
) -> tuple[Array, Array]:
    """The damped Gauss-Newton step, each cell's deviations eliminated (Schur complement)."""
    of_theta, cross, of_delta = _blocks(runs, prior, scales, weight, to_theta, to_delta, damping)
    slope = to_theta.T @ (weight * residuals) - (theta - prior[:, 0]) / prior[:, 1] ** 2
    own_slope = runs.per_cell(to_delta * (weight * residuals)[:, None]) - delta / scales.scatter**2
    through = cross @ np.linalg.inv(of_delta)
    step = np.linalg.solve(
        of_theta - np.einsum("cpi,cqi->pq", through, cross),
        slope - np.einsum("cpi,ci->p", through, own_slope),
    )
    own_step = own_slope - np.einsum("cpi,p->ci", cross, step)
    return step, np.linalg.solve(of_delta, own_step[..., None])[..., 0]


def _covariance(of_theta: Array, cross: Array, of_delta: Array) -> tuple[Array, Array, Array]:
    """The inverse of the information, in the blocks of `JointSolution`: theta, delta, both."""
    inverse = np.linalg.inv(of_delta)
    through = cross @ inverse
    covariance = np.linalg.inv(of_theta - np.einsum("cpi,cqi->pq", through, cross))
    between = -np.einsum("pq,cqi->cpi", covariance, through)
    return covariance, inverse - np.einsum("cpi,cpj->cij", through, between), between


def _estimate_noise(residuals: Array, excess: Array) -> tuple[float, float]:
    """(noise, misfit) of the highest Student likelihood on a grid, with log-normal priors.

    The misfit is at least a tenth: neighbouring runs have similar errors of the form.
    """
    noises = NOISE * np.geomspace(0.25, 32, 22)[:, None]
    misfits = MISFIT * np.geomspace(2 / 3, 4, 8)
    cost = 4 * (np.log(noises / NOISE) ** 2 + np.log(misfits / MISFIT) ** 2)
    for i, j in np.ndindex(cost.shape):
        variance = noises[i] ** 2 + (misfits[j] * excess) ** 2
        likelihood = np.log(variance) / 2 + (STUDENT + 1) / 2 * np.log1p(
            residuals**2 / (STUDENT * variance)
        )
        cost[i, j] += likelihood.sum()
    i, j = np.unravel_index(np.argmin(cost), cost.shape)
    return float(noises[i, 0]), float(misfits[j])
