"""What published laws of the loss say about parameters that the runs do not identify.

Every law of the form E + A / n_params**alpha + B / tokens**beta in the catalogue is moved to the
centre of the runs and to their loss, in two ways: all its terms times one factor, because data and
tokenizers differ; and its E in nats/token kept, the other two terms times one factor. The mean
and covariance of these laws, in the logs of the terms and in the exponents, are the prior of a fit
that has too few runs. With one run, the law goes through it and its interval elsewhere is the
spread of the published laws.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune import laws
from scaletune.fitting.loss.functional_forms import LN_ABSENT

CHINCHILLA_FORM = (
    *("hoffmann_tex", "besiroglu", "sardana_fit", "gemstones_hot", "gemstones_cool_end"),
    "krajewski_dense",
)
OVERTRAINED = ("gadre_loss_c4", "gadre_loss_rpj", "gadre_loss_rw")
"""Laws with alpha = beta = 2 eta, in compute and tokens per parameter."""
LEVEL_SD = 0.1
"""Sd of ln loss at the centre of the runs: the runs measure it far better."""
WIDER = 2.5
"""Factor of the covariance: runs differ from the published laws more than these from each other
(fits/README.md, 2026-11-28)."""
MAX_E_SHARE = 0.95
"""A published E is kept in nats/token only if it is below this share of the loss of the runs."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class PublishedPrior:
    """A normal prior on (ln E, ln A, ln B, alpha, beta), the terms at the centre of the runs."""

    mean: Array
    """(5,)"""
    covariance: Array
    """(5, 5)"""

    def on(self, base: Array, free: Array) -> tuple[Array, Array]:
        """Mean (P) and covariance (P, P) of phi where the parameters are base + free @ phi.

        A term that is fixed as absent tells nothing about the others.
        """
        kept = free.any(1) | (base > LN_ABSENT)
        free, rest = free[kept], (self.mean - base)[kept]
        covariance = self.covariance[np.ix_(kept, kept)]
        precision = free.T @ np.linalg.solve(covariance, free)
        pull = free.T @ np.linalg.solve(covariance, rest)
        return np.linalg.solve(precision, pull), np.linalg.inv(precision)


def published_parameters() -> Array:
    """(K, 5): E, A, B, alpha, beta of the published laws, n_params and tokens as plain counts."""
    rows = []
    for name in CHINCHILLA_FORM:
        c = laws.law(name).coefficients
        rows.append(tuple(c[symbol] for symbol in ("E0", "A", "B", "alpha", "beta")))
    for name in OVERTRAINED:
        c = laws.law(name).coefficients
        shrink, exponent = 6.0 ** -c["eta"], 2 * c["eta"]
        rows.append((c["E0"], c["a"] * shrink, c["b"] * shrink, exponent, exponent))
    return np.array(rows)


def published_prior(ln_n: float, ln_d: float, ln_loss: float) -> PublishedPrior:
    """The prior at the centre of the runs.

    Args:
        ln_n: Mean ln n_params.
        ln_d: Mean ln tokens.
        ln_loss: Mean ln loss.
    """
    parameters, loss = published_parameters(), np.exp(ln_loss)
    e, exponents = parameters[:, 0], parameters[:, 3:]
    terms = parameters[:, :3].copy()
    terms[:, 1:] *= np.exp(-exponents * [ln_n, ln_d])
    scaled = terms * (loss / terms.sum(1))[:, None]
    kept = e < MAX_E_SHARE * loss
    rest = ((loss - e) / terms[:, 1:].sum(1))[:, None]
    in_nats = np.column_stack([e, terms[:, 1:] * rest])[kept]
    rows = np.column_stack(
        [np.log(np.vstack([scaled, in_nats])), np.vstack([exponents, exponents[kept]])]
    )
    level = np.array([1.0, 1.0, 1.0, 0.0, 0.0])
    covariance = WIDER * np.cov(rows.T) + LEVEL_SD**2 * np.outer(level, level)
    return PublishedPrior(rows.mean(0), covariance)
