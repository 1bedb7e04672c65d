"""The over-training law of arXiv:2403.08540: loss from compute and tokens per parameter.

The downstream error as a function of the loss is the relation `error_of_loss`.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.loss.law import Estimator, solve
from scaletune.fitting.stats.robust import SQUARES


@dataclass(frozen=True)
class Overtraining:
    """loss = E + (a * M**eta + b * M**-eta) * flops**-eta in nats/token (eq. 4).

    M = tokens / n_params, flops = 6 * n_params * tokens.
    """

    E: float
    a: float
    b: float
    eta: float

    def __call__(self, n_params: float, tokens: float) -> float:
        ratio, flops = tokens / n_params, 6.0 * n_params * tokens
        return self.E + (self.a * ratio**self.eta + self.b * ratio**-self.eta) * flops**-self.eta


def fit_overtraining(runs: pd.DataFrame) -> Overtraining:
    """Fits the law by least squares of the loss, as published.

    It is the Chinchilla form with alpha = beta = 2 eta.

    Args:
        runs: At least 4 rows with columns `n_params` (all parameters), `tokens` and `loss`.

    Raises:
        UserError: There are fewer than 4 runs.
    """
    if len(runs) < 4:
        raise UserError(f"an over-training law needs at least 4 runs, but got {len(runs)}")
    columns = (runs[column].to_numpy(float) for column in ("n_params", "tokens", "loss"))
    solved = solve(
        *columns, estimator=Estimator(cost=SQUARES, linear_residuals=True), fixed={"beta": "alpha"}
    )
    e, a, b, alpha, _ = (float(v) for v in solved.vector)
    return Overtraining(e, a * 6 ** (alpha / 2), b * 6 ** (alpha / 2), alpha / 2)
