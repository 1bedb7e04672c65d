"""The law of over-training (arXiv:2403.08540): the loss from compute and tokens per parameter; the error from the loss is the relation `error_of_loss`."""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.loss.law import Estimator, solve
from scaletune.fitting.stats.robust import SQUARES


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


def fit_overtraining(runs: pd.DataFrame) -> Overtraining:
    """Least squares of the loss, as published: the chinchilla form with alpha = beta = 2 eta. Columns n_params (total), tokens, loss; 4 runs or more."""
    if len(runs) < 4:
        raise UserError(f"an over-training law needs 4 runs or more, but got {len(runs)}")
    columns = (runs[column].to_numpy(float) for column in ("n_params", "tokens", "loss"))
    solved = solve(
        *columns, estimator=Estimator(cost=SQUARES, linear=True), fixed={"beta": "alpha"}
    )
    e, a, b, alpha, _ = (float(v) for v in solved.vector)
    return Overtraining(e, a * 6 ** (alpha / 2), b * 6 ** (alpha / 2), alpha / 2)
