"""The loss law as a `Fit` holds it: parameters with intervals, and what a prediction needs."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.discrepancy import LENGTHS, discrepancy, quantile
from scaletune.fitting.loss.functional_forms import CHINCHILLA, EXPONENT_BOUNDS, LN_ABSENT
from scaletune.fitting.loss.law import NAMES, LossSolution, draw, solve
from scaletune.fitting.loss.noise import MIN_NOISE

N_DRAWS = 200
MAX_ROWS = 500_000  # rows of all resamples together: about a second of computation

Array = NDArray[np.float64]


def fit_loss_law(
    n_params: Array,
    tokens: Array,
    loss: Array,
    se: Array | None = None,
    *,
    level: float = 0.95,
    n_draws: int | None = None,
    **how: Any,
) -> dict[str, Any]:
    """Fits the loss law.

    Args:
        n_params: (R) non-embedding parameters.
        tokens: (R) tokens.
        loss: (R) losses, or minimum losses, in nats/token.
        se: (R) standard errors of minimum losses.
        level: Coverage of the intervals.
        n_draws: Number of resamples.
        **how: Further arguments of `law.solve`.

    Returns:
        A dict of `params`, `solution`, `objective`, `unmeasured` (sentences that come first in
        the status) and `warnings`.
    """
    solved = solve(n_params, tokens, loss, se, **how)
    n = n_draws or max(min(N_DRAWS, MAX_ROWS // len(loss)), 50)
    table = CHINCHILLA.natural(draw(solved, n), solved.centre)
    params, warnings = _params(solved, table, level, float(loss.min()))
    return {
        "params": params,
        "solution": solution(solved, table, level),
        "objective": solved.objective,
        "unmeasured": [solved.unmeasured.sentence] if solved.unmeasured else [],
        "warnings": [] if solved.unmeasured else warnings,
    }


def solution(solved: LossSolution, draws: Array, level: float) -> dict[str, Any]:
    """The part of a `Fit` that `predicting.loss_at` needs.

    Args:
        solved: The fitted law.
        draws: (n, 5) resampled parameters.
        level: Coverage of the intervals.
    """
    errors = discrepancy(solved)
    content = {
        "names": list(NAMES),
        "vector": [float(v) for v in solved.vector],
        "draws": _format_rows(draws, 8),
        "scatter": max(solved.noise[0], MIN_NOISE),  # sd of ln L around the law
        "discrepancy": _format_rows(errors.covariance, 12),  # of (ln E, ln A, ln B, alpha, beta)
        "quantile": quantile(solved, level),
    }
    if solved.unmeasured:
        content["unmeasured"] = {
            "columns": list(solved.unmeasured.columns),
            "sentences": [solved.unmeasured.sentence],
        }
    if solved.estimator.use_discrepancy:
        # ln n_params, ln tokens and weight of each run
        content |= {"near": _format_rows(errors.rows, 12), "lengths": list(LENGTHS)}
    return content


def _format_rows(table: Array, digits: int) -> list[str]:
    """One line per row, which keeps a fit file readable."""
    return [" ".join(f"{v:.{digits}g}" for v in row) for row in table]


def _params(
    solved: LossSolution, draws: Array, level: float, lowest_loss: float
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Values with percentile intervals, and warnings about poorly constrained parameters."""
    params: dict[str, dict[str, Any]] = {}
    warnings, vector, free = [], solved.vector, solved.shape.free
    ends = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    for i, name in enumerate(NAMES):
        if not free[i].any():
            params[name] = {
                "value": float(vector[i]) if i > 2 or solved.shape.base[i] > LN_ABSENT else 0.0,
                "interval": None,
                "fixed": True,
            }
            continue
        low, high = float(min(ends[0, i], vector[i])), float(max(ends[1, i], vector[i]))
        params[name] = {"value": float(vector[i]), "interval": [low, high]}
        interval = f"its interval is [{low:.2g}, {high:.2g}]"
        wide_e = high - low > 0.8 * lowest_loss or vector[i] < 1e-3 * lowest_loss
        if i == 0 and free.shape[1] > 1 and wide_e:
            warnings.append(
                f"the irreducible loss E is poorly constrained: {interval}, and the lowest loss is "
                f"{lowest_loss:.3g}; add larger runs with more tokens"
            )
        lowest, highest = EXPONENT_BOUNDS
        at_bound = low <= lowest * 1.001 or high >= highest * 0.999
        if i > 2 and (high - low > 0.8 * (highest - lowest) or at_bound):
            warnings.append(
                f"the loss-law exponent {name} is poorly constrained: {interval}, and the allowed "
                f"range is {list(EXPONENT_BOUNDS)}; add runs over a wider range of "
                f"`{('n_params', 'tokens')[i - 3]}`"
            )
    return params, warnings
