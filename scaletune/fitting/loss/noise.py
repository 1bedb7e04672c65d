"""The sd of ln L about a loss law: from its residuals, or, with few runs, their likelihood."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.variable_projection import Problem

MIN_NOISE = 5e-4
"""The least sd in the interval of a prediction: half the run-to-run noise of public sweeps."""
NOISE = 2e-3
"""The sd if there is no degree of freedom and no prior."""
FEW_NOISE, FEW_DOF = 6e-3, 2
"""Prior guess of the sd in a fit of few runs, and its degrees of freedom. It includes what the
form misses between distant scales (fits/README.md, 2026-11-28)."""
DRAWN_DOF = 3
"""Degrees of freedom of this sd in the draws."""
NOISES = np.geomspace(1e-3, 0.1, 41)

Array = NDArray[np.float64]


def residual_noise(problem: Problem, phi: Array, se: Array | None) -> tuple[float, int]:
    """sd of ln L around the law, at least the rms standard error of the losses, and its dof."""
    dof = problem.ln_loss.shape[1] - len(phi)
    own = root_mean_square(se)
    if dof < 1:
        return max(own, NOISE), 0
    r = (problem.ln_loss - problem.ln_model(phi[None]))[0]
    return max(float(np.sqrt(r @ r / dof)), own), dof


def few_run_noise(
    problem: Problem, mean: Array, covariance: Array, se: Array | None
) -> tuple[float, int]:
    """sd of ln L of a fit with a prior on all parameters, and the dof of its draws.

    The rms of the posterior of the sd on a grid. The runs deviate from the law at the mean of the
    prior by the law's own error (linearized) and by the noise: with few runs this tells whether
    they agree with the prior, which residuals of a fit with as many parameters cannot.
    """
    residuals = (problem.ln_loss - problem.ln_model(mean[None]))[0]
    size, basis = np.linalg.eigh(covariance)
    effect = _jacobian(problem, mean) @ (basis * np.sqrt(np.maximum(size, 0.0)))
    rows, sds, _ = np.linalg.svd(effect, full_matrices=False)
    along = (rows.T @ residuals) ** 2
    across = max(float(residuals @ residuals - along.sum()), 0.0)
    variance = NOISES[:, None] ** 2 + sds**2
    cost = (np.log(variance) + along / variance).sum(1) + across / NOISES**2
    cost += 2 * (len(residuals) - len(sds)) * np.log(NOISES)
    cost += FEW_DOF * (2 * np.log(NOISES) + (FEW_NOISE / NOISES) ** 2)
    weight = np.exp(-(cost - cost.min()) / 2)
    sd = float(np.sqrt(weight @ NOISES**2 / weight.sum()))
    return max(sd, root_mean_square(se)), DRAWN_DOF


def root_mean_square(se: Array | None) -> float:
    return float(np.sqrt(np.mean(se**2))) if se is not None else 0.0


def _jacobian(problem: Problem, phi: Array) -> Array:
    """d ln L / d phi (R, P)."""
    _, share = problem.shares(problem.parameters(phi[None]))
    full = np.zeros((problem.ln_loss.shape[1], problem.free.shape[0]))
    for part, term in zip(share, problem.terms, strict=True):
        full[:, list(term.columns)] += part[0][:, None] * term.features
    return full @ problem.free
