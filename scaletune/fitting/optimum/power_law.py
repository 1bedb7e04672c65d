"""Fits lr = c * n_params**a * tokens**b (* batch_tokens**d) to the optima of cells.

The fit is a random-effects regression in logs. The optimum of a cell differs from the law by more
than its standard error, so a between-cell scatter is estimated too (Paule & Mandel 1982). The
covariance is that of Knapp & Hartung 2003, never below the plain one, and quantiles are Student's t
with (cells - parameters) degrees of freedom. The interval of a prediction for a new cell includes
the scatter.

With fewer than FEW_DOF degrees of freedom the scatter has a prior about SCATTER. If the cells then
do not tell the exponents better than published laws do, these have a normal prior about 0
with the spread of published laws. A column that the cells do not vary has the exponent 0, and the
spread enters predictions at its other values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.optimum.published import COLUMNS, describe_spread, published_covariance
from scaletune.fitting.table import SAME_SCALE, n_levels

EXPONENTS = {"n_params": "a", "tokens": "b", "batch_tokens": "d"}
# Between-cell scatter in ln lr before any cell is seen, and the degrees of freedom it counts for
# (fits/README.md).
SCATTER, SCATTER_DOF = 0.15, 3
FEW_DOF = 3  # degrees of freedom below which priors are used
CLEAR = 1.0  # share of the published sd below which the se of an exponent needs no prior
MIN_SE = 0.01  # no optimum is known better, in ln lr
WIDE_INTERVAL = 1.0  # width of the interval of an exponent from which a warning is given
MIN_SPREAD = 1e-3  # sd of the log of a column, given the other columns, that its exponent needs

Array = NDArray[np.float64]


@dataclass(frozen=True)
class UnmeasuredColumn:
    """A column whose exponent the cells do not identify."""

    column: str

    slopes: list[float]
    """ln column = centre + slopes @ (ln of the measured columns, centred) in all cells."""

    sentence: str


def choose_columns(
    cells: list[dict[str, Any]], columns: list[str]
) -> tuple[list[str], list[UnmeasuredColumn]]:
    """The columns whose exponents the cells identify, and the others."""
    kept: list[str] = []
    others: list[UnmeasuredColumn] = []
    for column in columns:
        values = np.array([cell[column] for cell in cells], float)
        spread = f"carry the spread of published laws, {describe_spread([column])}"
        if n_levels(values) == 1:
            sentence = (
                f"`{column}` is the same in every fitted setting, so its effect on lr is not"
                f" measured: its exponent is fixed at 0, and intervals at another `{column}`"
                f" {spread}; add settings with another `{column}`"
            )
            others.append(UnmeasuredColumn(column, [0.0] * len(kept), sentence))
            continue
        slopes, rest = _line(np.log(values), _centred_logs(cells, kept))
        if np.abs(rest).max() >= math.log(SAME_SCALE):
            kept.append(column)
            continue
        names = " and ".join(f"`{name}`" for name in kept)
        sentence = (
            f"`{column}` follows from {names} in the fitted settings, so its own effect on lr is"
            " not measured: its exponent is fixed at 0, the other exponents include its effect,"
            f" and intervals off this line {spread}; vary `{column}` independently"
        )
        others.append(UnmeasuredColumn(column, slopes, sentence))
    return kept, others


def _line(y: Array, x: Array) -> tuple[list[float], Array]:
    """Slopes of y in the columns of x, by least squares, and the residuals."""
    y = y - y.mean()
    slopes = np.linalg.lstsq(x, y, rcond=None)[0]
    return [float(slope) for slope in slopes], y - x @ slopes


def _centred_logs(cells: list[dict[str, Any]], columns: list[str]) -> Array:
    x = np.log([[cell[column] for column in columns] for cell in cells])
    x = x.reshape(len(cells), len(columns))
    return x - x.mean(0)


def regress(
    x: Array,
    y: Array,
    se: Array,
    cluster: list[int] | None = None,
    prior: Array | None = None,
    level: float = 0.95,
) -> dict[str, Any]:
    """Random-effects regression of y on [1, x]: vector, covariance, scatter, dof, chi2.

    `prior` is the covariance of the slopes about 0 (module docstring). If a cell has several rows
    (one per batch size), `cluster` numbers the cell of each row. The deviations of these rows are
    correlated, so the degrees of freedom count cells, and the covariance is at least the
    cluster-robust one.
    """
    design = np.column_stack([np.ones(len(y)), x])
    se = np.maximum(se, MIN_SE)
    numbers = np.arange(len(y)) if cluster is None else np.array(cluster)
    if prior is not None and len(set(numbers.tolist())) - design.shape[1] < FEW_DOF:
        return _regress_few(design, y, se, numbers, prior, level)
    dof = len(y) - design.shape[1]
    scatter2 = _between_cell_variance(design, y, se, dof) if dof > 0 else SCATTER**2
    vector, covariance, chi2 = _weighted(design, y, se**2 + scatter2)
    inflate = max(1.0, chi2 / dof) if dof > 0 else 1.0
    scatter = math.sqrt(scatter2 * inflate)
    if cluster is not None and len(set(cluster)) < len(cluster):
        dof = len(set(cluster)) - design.shape[1]
        weighted = (y - design @ vector) / (se**2 + scatter2)
        factor = _cluster_factor(design, weighted, covariance, np.array(cluster))
        inflate = max(inflate, factor)
    if prior is not None and (np.diag(covariance)[1:] * inflate > np.diag(prior)).any():
        return _regress_few(design, y, se, numbers, prior, level)
    return {
        "vector": vector,
        "covariance": covariance * inflate,
        "scatter": scatter,
        "dof": max(dof, 0),
        "chi2": chi2,
    }


def _regress_few(
    design: Array,
    y: Array,
    se: Array,
    numbers: NDArray[np.int_],
    prior: Array,
    level: float,
) -> dict[str, Any]:
    """`regress` with priors on the scatter and, unless all are clear, on the slopes.

    Half of the variance between cells is common to the rows of a cell. The scatter is multiplied by
    the ratio of the quantiles of Student's t and of the normal distribution, because the quantile
    of the result is normal: the spread of the prior is known.
    """
    from scipy import stats

    rows, parameters = design.shape
    dof = max(len(set(numbers.tolist())) - parameters, 0)
    own = _between_cell_variance(design, y, se, rows - parameters) if rows > parameters else 0.0
    scatter2 = (SCATTER_DOF * SCATTER**2 + dof * own) / (SCATTER_DOF + dof)
    tail = 0.5 + level / 2
    scatter2 *= float(stats.t.ppf(tail, SCATTER_DOF + dof) / stats.norm.ppf(tail)) ** 2
    common = (numbers[:, None] == numbers[None]) / 2 + np.eye(rows) / 2
    weight = np.linalg.inv(np.diag(se**2) + scatter2 * common)
    precision = np.zeros((parameters, parameters))
    precision[1:, 1:] = np.linalg.inv(prior)
    information = design.T @ weight @ design
    covariance = np.linalg.inv(information + precision)
    if np.linalg.matrix_rank(design) == parameters:
        alone = np.linalg.inv(information)
        if (np.diag(alone)[1:] < CLEAR**2 * np.diag(prior)).all():
            covariance = alone
    vector = covariance @ design.T @ weight @ y
    rest = y - design @ vector
    return {
        "vector": vector,
        "covariance": covariance,
        "scatter": math.sqrt(scatter2),
        "dof": dof,
        "chi2": float(rest @ weight @ rest),
        "quantile": float(stats.norm.ppf(tail)),
    }


def _cluster_factor(
    design: Array, weighted: Array, covariance: Array, cluster: NDArray[np.int_]
) -> float:
    """The largest ratio of a cluster-robust variance to the plain one, over the parameters."""
    scores = np.array([design[cluster == c].T @ weighted[cluster == c] for c in np.unique(cluster)])
    small = len(scores) / max(len(scores) - design.shape[1], 1)
    robust = small * covariance @ scores.T @ scores @ covariance
    return float((np.diag(robust) / np.diag(covariance)).max())


def _weighted(design: Array, y: Array, variance: Array) -> tuple[Array, Array, float]:
    covariance: Array = np.linalg.inv(design.T @ (design / variance[:, None])).astype(float)
    vector = covariance @ (design.T @ (y / variance))
    return vector, covariance, float((((y - design @ vector) ** 2) / variance).sum())


def _between_cell_variance(design: Array, y: Array, se: Array, dof: int) -> float:
    """The between-cell variance at which chi2 equals its dof; 0 if the standard errors suffice."""
    if _weighted(design, y, se**2)[2] <= dof:
        return 0.0
    low, high = 0.0, 1e-4
    while _weighted(design, y, se**2 + high)[2] > dof:
        high *= 4
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _weighted(design, y, se**2 + middle)[2] > dof else (low, middle)
        )
    return (low + high) / 2


def fit_power_law(
    cells: list[dict[str, Any]], columns: list[str], level: float = 0.95
) -> dict[str, Any]:
    """Fits the law to the optima of the cells.

    Args:
        cells: Rows with an optimum `x` (ln lr) and its standard error `se`.
        columns: Columns with an exponent, of "n_params", "tokens" and "batch_tokens".
        level: Coverage of the intervals.

    Returns:
        A dict of `params`, `solution`, `objective` (chi2), `unmeasured` (sentences that come first
        in the status) and `warnings`.
    """
    from scipy import stats

    kept, others = choose_columns(cells, columns)
    x = np.log([[cell[column] for column in kept] for cell in cells]).reshape(len(cells), len(kept))
    prior = _prior(kept, others)
    result = regress(
        x - x.mean(0),
        np.array([c["x"] for c in cells]),
        np.array([c["se"] for c in cells]),
        [c["cell"] for c in cells],
        prior[: len(kept), : len(kept)],
        level,
    )
    dof, warnings = result["dof"], []
    if dof < 1:
        warnings.append(
            f"{len(cells)} usable settings leave no degree of freedom for {len(kept) + 1} "
            f"parameters: intervals assume a between-setting scatter of {SCATTER:.0%}"
            + (f" and exponents within published ones, {describe_spread(kept)}" if kept else "")
            + "; add settings"
        )
    quantile = result.get("quantile") or float(stats.t.ppf(0.5 + level / 2, dof))
    solution = {
        "columns": kept,
        "vector": [float(v) for v in result["vector"]],  # ln lr at the centre, then the exponents
        "covariance": [[float(v) for v in row] for row in result["covariance"]],
        "centre": [float(v) for v in x.mean(0)],  # mean of ln column over cells
        "quantile": quantile,
        "dof": dof,
        "scatter": result["scatter"],  # sd between cells, in ln lr
        # of the near-optimal band, in ln lr
        "half_width": [float(np.median([c["half_width"][side] for c in cells])) for side in (0, 1)],
    }
    if others:
        solution["unmeasured"] = _unmeasured(cells, others, prior, result)
    params = _params(solution, columns)
    for column in kept:
        low, high = params[EXPONENTS[column]]["interval"]
        if high - low > WIDE_INTERVAL:
            warnings.append(
                f"the exponent of `{column}` is poorly constrained: its interval is "
                f"[{low:.2g}, {high:.2g}]; add settings over a wider range of `{column}`"
            )
    return {
        "params": params,
        "solution": solution,
        "objective": result["chi2"],
        "unmeasured": [other.sentence for other in others],
        "warnings": warnings,
    }


def _prior(kept: list[str], others: list[UnmeasuredColumn]) -> Array:
    """Covariance about 0 of the exponents of the measured columns, then of the others.

    The exponent of a measured column includes the effects of the columns that follow from it.
    """
    at = [COLUMNS.index(column) for column in (*kept, *(other.column for other in others))]
    included = np.eye(len(at))
    for i, other in enumerate(others, start=len(kept)):
        included[: len(other.slopes), i] = other.slopes
    covariance: Array = included @ published_covariance()[np.ix_(at, at)] @ included.T
    return covariance


def _unmeasured(
    cells: list[dict[str, Any]],
    others: list[UnmeasuredColumn],
    prior: Array,
    result: dict[str, Any],
) -> dict[str, Any]:
    """What a prediction adds to its variance for exponents that are not measured."""
    names = [other.column for other in others]
    return {
        "columns": names,
        "centre": [float(np.mean(np.log([c[name] for c in cells]))) for name in names],
        "slopes": [other.slopes for other in others],  # in the measured columns
        # of the exponents, about 0
        "covariance": [[float(v) for v in row] for row in _given_measured(prior, result)],
        "sentences": [other.sentence for other in others],
    }


def _given_measured(prior: Array, result: dict[str, Any]) -> Array:
    """Second moments of the unmeasured exponents about 0, given the measured ones.

    Published laws agree better on the sum of the exponents of n_params and tokens than on each.
    """
    exponents = result["vector"][1:]
    k = len(exponents)
    across = prior[k:, :k] @ np.linalg.inv(prior[:k, :k])
    square = np.outer(exponents, exponents) + result["covariance"][1:, 1:]
    rest: Array = prior[k:, k:] - across @ prior[:k, k:]
    return rest + across @ square @ across.T


def _params(solution: dict[str, Any], columns: list[str]) -> dict[str, dict[str, Any]]:
    """c, a, b (and d) with intervals; c is lr at one parameter and one token: a wide interval."""
    vector, covariance = np.array(solution["vector"]), np.array(solution["covariance"])
    at_origin = np.concatenate([[1.0], -np.array(solution["centre"])])
    ln_c, sd = float(at_origin @ vector), math.sqrt(float(at_origin @ covariance @ at_origin))
    ends = [
        math.exp(min(max(ln_c + sign * solution["quantile"] * sd, -600.0), 600.0))
        for sign in (-1, 1)
    ]
    params: dict[str, dict[str, Any]] = {"c": {"value": math.exp(ln_c), "interval": ends}}
    for column in columns:
        if column in solution["columns"]:
            i = 1 + solution["columns"].index(column)
            value, half = (
                float(vector[i]),
                solution["quantile"] * math.sqrt(float(covariance[i, i])),
            )
            params[EXPONENTS[column]] = {"value": value, "interval": [value - half, value + half]}
        else:
            params[EXPONENTS[column]] = {"value": 0.0, "interval": None, "fixed": True}
    return params
