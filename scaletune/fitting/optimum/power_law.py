"""Fits lr = c * n_params**a * tokens**b (* batch_tokens**d) to the optima of cells.

The fit is a random-effects regression in logs. The optimum of a cell differs from the law by more
than its standard error, so a between-cell scatter is estimated too (Paule & Mandel 1982). The
covariance is that of Knapp & Hartung 2003, never below the plain one, and quantiles are Student's t
with (cells - parameters) degrees of freedom. The interval of a prediction for a new cell includes
the scatter.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXPONENTS = {"n_params": "a", "tokens": "b", "batch_tokens": "d"}
# Between-cell scatter in ln lr that is assumed if no degree of freedom is left to estimate it
# (fits/README.md).
SCATTER = 0.15
WIDE_INTERVAL = 1.0  # width of the interval of an exponent from which a warning is given
MIN_SPREAD = 1e-3  # sd of the log of a column, given the other columns, that its exponent needs

Array = NDArray[np.float64]


def choose_columns(cells: list[dict[str, Any]], columns: list[str]) -> tuple[list[str], list[str]]:
    """The columns whose exponents the cells identify, and a warning for each other column."""
    kept: list[str] = []
    warnings = []
    for column in columns:
        x = np.log([cell[column] for cell in cells])
        x = x - x.mean()
        if x.std() < MIN_SPREAD:
            warnings.append(
                f"`{column}` is the same in every fitted setting, so its exponent is fixed at 0; "
                f"add settings with another `{column}`"
            )
            continue
        others = _centred_logs(cells, kept)
        rest = x - others @ np.linalg.lstsq(others, x, rcond=None)[0] if kept else x
        if rest.std() < MIN_SPREAD:
            names = " and ".join(f"`{name}`" for name in kept)
            warnings.append(
                f"`{column}` follows from {names} in the fitted settings, so its exponent is fixed "
                f"at 0 and the other exponents include its effect; vary `{column}` independently"
            )
        else:
            kept.append(column)
    return kept, warnings


def _centred_logs(cells: list[dict[str, Any]], columns: list[str]) -> Array:
    x = np.log([[cell[column] for column in columns] for cell in cells])
    return x - x.mean(0)


def regress(x: Array, y: Array, se: Array, cluster: list[int] | None = None) -> dict[str, Any]:
    """Random-effects regression of y on [1, x]: vector, covariance, scatter, dof, chi2.

    If a cell has several rows (one per batch size), `cluster` numbers the cell of each row. The
    deviations of these rows are correlated, so the degrees of freedom count cells, and the
    covariance is at least the cluster-robust one.
    """
    design = np.column_stack([np.ones(len(y)), x])
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
    return {
        "vector": vector,
        "covariance": covariance * inflate,
        "scatter": scatter,
        "dof": max(dof, 0),
        "chi2": chi2,
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
        A dict of `params`, `solution`, `objective` (chi2) and `warnings`.
    """
    from scipy import stats

    kept, warnings = choose_columns(cells, columns)
    x = np.log([[cell[column] for column in kept] for cell in cells]).reshape(len(cells), len(kept))
    result = regress(
        x - x.mean(0),
        np.array([c["x"] for c in cells]),
        np.array([c["se"] for c in cells]),
        [c["cell"] for c in cells],
    )
    dof = result["dof"]
    if dof < 1:
        warnings.append(
            f"{len(cells)} usable settings leave no degree of freedom for {len(kept) + 1} "
            f"parameters: intervals assume a between-setting scatter of {SCATTER:.0%}; add settings"
        )
    quantile = float(
        stats.t.ppf(0.5 + level / 2, dof) if dof > 0 else stats.norm.ppf(0.5 + level / 2)
    )
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
        "warnings": warnings,
    }


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
