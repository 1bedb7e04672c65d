"""Errors of a loss law that runs at similar scales share, because no sum of power laws is exact.

A bootstrap of rows treats residuals as independent, so its intervals are too narrow and miss the
next larger size. Here ln L = law + discrepancy + noise (Kennedy & O'Hagan 2001). The discrepancy is
a Gaussian process with covariance sill * share * correlation; the correlation decreases with the
distance in tokens per parameter and, more slowly, in compute. Sill and share maximize the
restricted likelihood of the residuals (Patterson & Thompson 1971). The effect on the parameters is
the influence of the rows around that covariance, a sandwich for spatially correlated errors (Conley
1999). The effect on a prediction is the mean of the process given the residuals (kriging). If the
runs follow the form, the share is 0 and nothing changes. The correlation lengths were chosen on
five public families of runs: benchmarks/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.law import LossSolution
from scaletune.fitting.loss.uncertainty import influence
from scaletune.fitting.table import n_levels

# Correlation lengths, in ln(tokens / n_params) and in ln sqrt(n_params * tokens).
LENGTHS = (3.0, 6.0)
# Shares of the variance around the law that near runs may have in common.
SHARES = np.append(0.0, 1 - np.geomspace(1.0, 0.01, 21)[1:])
MIN_DOF = 2  # degrees of freedom below which residuals do not identify a share
MIN_QUANTILE_DOF = 3  # the smallest degrees of freedom of a quantile
SIZE_PARAMETERS = 2  # parameters that only sizes identify: A and alpha
MAX_ROWS = 300  # rows that are compared with each other: the cost grows with their cube

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Discrepancy:
    """What correlated residuals add to a law."""

    covariance: Array
    """(5, 5): added to the covariance of (ln E, ln A, ln B, alpha, beta) by a bootstrap."""

    rows: Array
    """(R, 3): ln n_params, ln tokens and weight of each row; (0, 3) if the share is 0.

    The mean of ln L - law at a target is the sum of weight * correlation(row, target).
    """


def discrepancy(solved: LossSolution) -> Discrepancy:
    """Estimates the discrepancy of a fitted law from its residuals."""
    moves, jacobian = influence(solved)
    kept = np.random.default_rng(len(jacobian)).permutation(len(jacobian))[:MAX_ROWS]
    at, residuals = log_scales(solved)[kept], solved.residuals[kept]
    near = correlation(at, at)
    share, sill = _shared_variance(residuals, jacobian[kept], near)
    moves = moves[:, kept] * (len(jacobian) / len(kept))
    weights = share * np.linalg.solve(share * near + (1 - share) * np.eye(len(at)), residuals)
    return Discrepancy(
        moves @ (share * sill * near) @ moves.T,
        np.column_stack([at, weights])[: len(at) if share else 0],
    )


def quantile(solved: LossSolution, level: float) -> float:
    """Quantile of Student's t by which a standard error is multiplied.

    Its degrees of freedom are the number of sizes minus the parameters that sizes identify.
    """
    from scipy.stats import t

    sizes = n_levels(np.exp(log_scales(solved)[:, 0]))
    return float(t.ppf(0.5 + level / 2, max(sizes - SIZE_PARAMETERS, MIN_QUANTILE_DOF)))


def log_scales(solved: LossSolution) -> Array:
    """(R, 2): ln n_params and ln tokens of the rows."""
    return solved.centre[[1, 2], [0, 1]] - np.column_stack(
        [term.features[:, 1] for term in solved.problem.terms[1:]]
    )


def correlation(a: Array, b: Array) -> Array:
    """(A, B): correlation of the discrepancy between scales a (A, 2) and b (B, 2)."""
    apart = a[:, None] - b[None]
    return np.exp(
        -np.abs(apart[..., 1] - apart[..., 0]) / LENGTHS[0] - np.abs(apart.sum(-1)) / 2 / LENGTHS[1]
    )


def _shared_variance(residuals: Array, jacobian: Array, near: Array) -> tuple[float, float]:
    """(share, sill) at the maximum of the restricted likelihood; (0, 0) with too few rows."""
    dof = len(residuals) - jacobian.shape[1]
    if dof < MIN_DOF or not np.abs(residuals).max() > 1e-9:
        return 0.0, 0.0
    size, basis = np.linalg.eigh(near)
    residuals, jacobian = basis.T @ residuals, basis.T @ jacobian
    results = [
        restricted_likelihood(residuals, jacobian, 1 + share * (size - 1), dof) for share in SHARES
    ]
    best = int(np.argmax([likelihood for likelihood, _ in results]))
    return float(SHARES[best]), results[best][1]


def restricted_likelihood(
    residuals: Array, jacobian: Array, spread: Array, dof: int
) -> tuple[float, float]:
    """ln restricted likelihood, up to a constant, and sill of independent residuals.

    Their variance is sill * spread.
    """
    inner = jacobian.T @ (jacobian / spread[:, None])
    inner += 1e-9 * np.trace(inner) * np.eye(len(inner))
    slope = jacobian.T @ (residuals / spread)
    square = float(residuals @ (residuals / spread) - slope @ np.linalg.solve(inner, slope))
    log_determinant = float(np.linalg.slogdet(inner)[1])
    ln_likelihood = -(dof * np.log(square) + np.log(spread).sum() + log_determinant) / 2
    return ln_likelihood, square / dof
