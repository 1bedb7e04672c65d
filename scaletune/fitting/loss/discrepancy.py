"""How a loss law strays from what it is fitted to: runs of near scales miss it by like amounts, for no sum of power laws is quite true.

A bootstrap of rows takes residuals for independent, so a law through many runs seems known far better than it is, and misses the
next size. Here ln L = law + discrepancy + noise (Kennedy & O'Hagan 2001), the discrepancy a Gaussian process of covariance
sill * share * alike, where `alike` falls off with the distance in tokens a parameter and, more slowly, in compute: how a recipe ages
as tokens pile up is much the same at every size. Sill and share are those of highest restricted likelihood of the residuals
(Patterson & Thompson 1971). What it does to the fitted law is the estimator's influence around that covariance, a sandwich for
errors correlated in space (Conley 1999); what it says of a target is its mean there given the residuals (kriging).
Runs that follow the form show no share, and add nothing. Lengths were chosen on five public families: benchmarks/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.law import Solved
from scaletune.fitting.loss.uncertainty import influence
from scaletune.fitting.table import n_levels

LENGTHS = (
    3.0,
    6.0,
)  # e-folds of tokens / n_params and of sqrt(n_params * tokens) over which residuals stay alike
SHARES = np.append(
    0.0, 1 - np.geomspace(1.0, 0.01, 21)[1:]
)  # of the variance about the law that near runs may have in common
SPARE = 2  # degrees of freedom below which residuals say nothing of one another
KNOWN = 3  # and from which a quantile is taken at the least
OF_SIZE = 2  # parameters that sizes alone identify: A and alpha
ROWS = 300  # at most so many are compared with each other: the cost grows with their cube

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Discrepancy:
    """What residuals that go together add to a law: to its covariance, and to its mean near the rows."""

    covariance: Array  # (5, 5), of (ln E, ln A, ln B, alpha, beta) at one parameter and one token, beside a bootstrap's
    rows: Array  # (R, 3): ln n_params, ln tokens, weight; the mean of ln L - law is the weights' sum with `alike`; empty without a share


def discrepancy(solved: Solved) -> Discrepancy:
    """Of a fitted law, from its residuals."""
    moves, jacobian = influence(solved)
    kept = np.random.default_rng(len(jacobian)).permutation(len(jacobian))[:ROWS]
    at, left = scales(solved)[kept], solved.residuals[kept]
    near = alike(at, at)
    share, sill = _common(left, jacobian[kept], near)
    moves = moves[:, kept] * (len(jacobian) / len(kept))
    weights = share * np.linalg.solve(share * near + (1 - share) * np.eye(len(at)), left)
    return Discrepancy(
        moves @ (share * sill * near) @ moves.T,
        np.column_stack([at, weights])[: len(at) if share else 0],
    )


def quantile(solved: Solved, level: float) -> float:
    """Student's t, by which a standard error is multiplied: how sizes scatter is known from as many as there are, less what they fit."""
    from scipy.stats import t

    return float(
        t.ppf(0.5 + level / 2, max(n_levels(np.exp(scales(solved)[:, 0])) - OF_SIZE, KNOWN))
    )


def scales(solved: Solved) -> Array:
    """ln n_params and ln tokens (R, 2)."""
    return solved.centre[[1, 2], [0, 1]] - np.column_stack(
        [term.features[:, 1] for term in solved.problem.terms[1:]]
    )


def alike(a: Array, b: Array) -> Array:
    """Correlation of what runs at scales a (A, 2) and b (B, 2) have in common."""
    apart = a[:, None] - b[None]
    return np.exp(
        -np.abs(apart[..., 1] - apart[..., 0]) / LENGTHS[0] - np.abs(apart.sum(-1)) / 2 / LENGTHS[1]
    )


def _common(left: Array, jacobian: Array, near: Array) -> tuple[float, float]:
    """(share, sill) at the highest restricted likelihood; no share where there is too little to tell."""
    dof = len(left) - jacobian.shape[1]
    if dof < SPARE or not np.abs(left).max() > 1e-9:
        return 0.0, 0.0
    size, basis = np.linalg.eigh(near)
    left, jacobian = basis.T @ left, basis.T @ jacobian
    found = [restricted(left, jacobian, 1 + share * (size - 1), dof) for share in SHARES]
    best = int(np.argmax([likelihood for likelihood, _ in found]))
    return float(SHARES[best]), found[best][1]


def restricted(left: Array, jacobian: Array, spread: Array, dof: int) -> tuple[float, float]:
    """Restricted ln likelihood, up to a constant, and sill of independent residuals of variance sill * spread."""
    inner = jacobian.T @ (jacobian / spread[:, None])
    inner += 1e-9 * np.trace(inner) * np.eye(len(inner))
    slope = jacobian.T @ (left / spread)
    square = float(left @ (left / spread) - slope @ np.linalg.solve(inner, slope))
    return -(
        dof * np.log(square) + np.log(spread).sum() + float(np.linalg.slogdet(inner)[1])
    ) / 2, square / dof
