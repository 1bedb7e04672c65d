"""The loss law as a `Fit` keeps it: parameters with intervals, resampled laws, and what an interval of the loss is made of."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.discrepancy import LENGTHS, discrepancy, quantile
from scaletune.fitting.loss.functional_forms import BOX, CHINCHILLA, OFF
from scaletune.fitting.loss.law import NAMES, Solved, draw, solve

N_DRAWS = 200
ROWS = 500_000  # rows of all resamples together: more than a second's work otherwise

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
    """`params`, `solution`, `objective` and status `said` of the law through losses; `how` as for `solve`."""
    solved = solve(n_params, tokens, loss, se, **how)
    n = n_draws or max(min(N_DRAWS, ROWS // len(loss)), 50)
    table = CHINCHILLA.natural(draw(solved, n), solved.centre)
    params, said = _params(solved, table, level, float(loss.min()))
    made = solution(solved, table, level)
    return {
        "params": params,
        "solution": made,
        "objective": solved.objective,
        "said": [*solved.shape.said, *said],
    }


def solution(solved: Solved, draws: Array, level: float) -> dict[str, Any]:
    """What `predicting.loss_at` needs: the law, its resamples (n, 5), what its interval is made of, and for PREDICT how it strays near the runs."""
    found = discrepancy(solved)
    made = {
        "names": list(NAMES),
        "vector": [float(v) for v in solved.vector],
        "draws": _lines(draws, 8),  # one line a resample: a fit file is read by people too
        "scatter": solved.noise[0],  # sd of ln L about the law
        "discrepancy": _lines(found.covariance, 12),  # of (ln E, ln A, ln B, alpha, beta)
        "quantile": quantile(solved, level),
    }
    near = {
        "near": _lines(found.rows, 12),
        "lengths": list(LENGTHS),
    }  # ln n_params, ln tokens, weight of each run
    return made | near if solved.estimator.near else made


def _lines(table: Array, digits: int) -> list[str]:
    return [" ".join(f"{v:.{digits}g}" for v in row) for row in table]


def _params(
    solved: Solved, draws: Array, level: float, lowest_loss: float
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """Values with percentile intervals; those whose interval covers most of what is possible are said to be unidentified."""
    params: dict[str, dict[str, Any]] = {}
    said, vector, free = [], solved.vector, solved.shape.free
    ends = np.quantile(draws, [0.5 - level / 2, 0.5 + level / 2], axis=0)
    for i, name in enumerate(NAMES):
        if not free[i].any():
            params[name] = {
                "value": float(vector[i]) if i > 2 or solved.shape.base[i] > OFF else 0.0,
                "interval": None,
                "fixed": True,
            }
            continue
        low, high = float(min(ends[0, i], vector[i])), float(max(ends[1, i], vector[i]))
        params[name] = {"value": float(vector[i]), "interval": [low, high]}
        if (
            i == 0
            and free.shape[1] > 1
            and (high - low > 0.8 * lowest_loss or vector[i] < 1e-3 * lowest_loss)
        ):
            found = f"its interval is [{low:.2g}, {high:.2g}], the lowest loss {lowest_loss:.3g}"
            said.append(
                f"the data do not identify the irreducible loss E: {found}; larger runs trained longer would"
            )
        if i > 2 and (
            high - low > 0.8 * (BOX[1] - BOX[0]) or low <= BOX[0] * 1.001 or high >= BOX[1] * 0.999
        ):
            found = f"its interval is [{low:.2g}, {high:.2g}] in the box {list(BOX)}"
            said.append(
                f"the data do not identify the loss-law exponent {name}: {found}; a wider range of `{('n_params', 'tokens')[i - 3]}` would"
            )
    return params, said
