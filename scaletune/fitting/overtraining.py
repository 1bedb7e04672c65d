"""Laws of over-training and of downstream error (arXiv:2403.08540): the loss from compute and tokens per parameter, the error from the loss."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.fitting.losslaw import Estimator, solve
from scaletune.fitting.robust import SQUARES

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Overtraining:
    """loss = E + (a * M**eta + b * M**-eta) * flops**-eta, nats/token; M = tokens / n_params, flops = 6 * n_params * tokens (eq. 4)."""

    E: float
    a: float
    b: float
    eta: float

    def __call__(self, n_params: float, tokens: float) -> float:
        ratio, flops = tokens / n_params, 6.0 * n_params * tokens
        return self.E + (self.a * ratio**self.eta + self.b * ratio**-self.eta) * flops**-self.eta


@dataclass(frozen=True)
class Downstream:
    """error = eps - k * exp(-gamma * loss), a share in [0, 1] (eq. 5)."""

    eps: float
    k: float
    gamma: float

    def __call__(self, loss: float) -> float:
        return self.eps - self.k * math.exp(-self.gamma * loss)


def fit_overtraining(runs: pd.DataFrame) -> Overtraining:
    """Least squares of the loss, as published: the chinchilla form with alpha = beta = 2 eta. Columns n_params (total), tokens, loss; 4 runs or more."""
    if len(runs) < 4:
        raise UserError(f"an over-training law needs 4 runs or more, but got {len(runs)}")
    columns = (runs[column].to_numpy(float) for column in ("n_params", "tokens", "loss"))
    solved = solve(*columns, estimator=Estimator(cost=SQUARES, linear=True), fixed={"beta": "alpha"})
    e, a, b, alpha, _ = (float(v) for v in solved.vector)
    return Overtraining(e, a * 6 ** (alpha / 2), b * 6 ** (alpha / 2), alpha / 2)


def fit_downstream(loss: Array, error: Array) -> Downstream:
    """Least squares of the error; linear in eps and k once gamma is known, so gamma alone is searched for."""
    from scipy.optimize import minimize_scalar

    if len(loss) < 3:
        raise UserError(f"a law of downstream error needs 3 runs or more, but got {len(loss)}")

    def linear(gamma: float) -> tuple[Array, float]:
        design = np.column_stack([np.ones(len(loss)), -np.exp(-gamma * (loss - loss.mean()))])
        found = np.linalg.lstsq(design, error, rcond=None)[0]
        return found, float(((error - design @ found) ** 2).sum())

    grid = np.geomspace(0.05, 10, 60)
    best = int(np.argmin([linear(gamma)[1] for gamma in grid]))
    low, high = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    gamma = float(minimize_scalar(lambda g: linear(g)[1], bounds=(low, high), method="bounded", options={"xatol": 1e-12}).x)
    eps, k = linear(gamma)[0]
    return Downstream(float(eps), float(k * math.exp(gamma * loss.mean())), gamma)
