"""lr = c * n_params**a * tokens**b (* batch_tokens**d): regression in logs, with cells that deviate from the law.

A cell's optimum differs from the law by more than its own error, so a between-cell scatter is estimated with it
(Paule & Mandel 1982), the covariance is that of Knapp & Hartung 2003 (never below the plain one), and quantiles are
Student's t on cells minus parameters. A prediction for a new cell carries the scatter too.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

EXPONENTS = {"n_params": "a", "tokens": "b", "batch_tokens": "d"}
SCATTER = 0.15  # between-cell scatter in ln lr assumed when no degree of freedom is left to measure it (fits/README.md)
VAGUE = (
    1.0  # width of an exponent's interval from which the fit says that the data hardly identify it
)
VARIES = 1e-3  # a column whose logs the others explain to within this sd says nothing of its own

Array = NDArray[np.float64]


def choose_columns(cells: list[dict[str, Any]], columns: list[str]) -> tuple[list[str], list[str]]:
    """The columns whose exponents these cells can tell, and a sentence for each of the others."""
    kept: list[str] = []
    said = []
    for column in columns:
        x = np.log([cell[column] for cell in cells])
        x = x - x.mean()
        if x.std() < VARIES:
            said.append(
                f"`{column}` is the same in every fitted cell, so its exponent is fixed at 0: the data cannot say"
            )
            continue
        others = _centred(cells, kept)
        left = x - others @ np.linalg.lstsq(others, x, rcond=None)[0] if kept else x
        if left.std() < VARIES:
            said.append(
                f"`{column}` follows from {' and '.join(f'`{k}`' for k in kept)} in the fitted cells, so its exponent is fixed at 0 and theirs carries both"
            )
        else:
            kept.append(column)
    return kept, said


def _centred(cells: list[dict[str, Any]], columns: list[str]) -> Array:
    x = np.log([[cell[column] for column in columns] for cell in cells])
    return x - x.mean(0)


def regress(x: Array, y: Array, se: Array, cluster: list[int] | None = None) -> dict[str, Any]:
    """Random-effects regression of y on [1, x]: vector, covariance, scatter, dof, chi2.

    `cluster` numbers the cells that rows come from, when a cell gives several (one a batch size): those deviate together,
    so cells are what is counted, and the covariance is at least the cluster-robust one.
    """
    design = np.column_stack([np.ones(len(y)), x])
    dof = len(y) - design.shape[1]
    scatter2 = _paule_mandel(design, y, se, dof) if dof > 0 else SCATTER**2
    vector, covariance, chi2 = _weighted(design, y, se**2 + scatter2)
    inflate = max(1.0, chi2 / dof) if dof > 0 else 1.0
    scatter = math.sqrt(scatter2 * inflate)
    if cluster is not None and len(set(cluster)) < len(cluster):
        dof = len(set(cluster)) - design.shape[1]
        inflate = max(
            inflate,
            _cluster_factor(
                design, (y - design @ vector) / (se**2 + scatter2), covariance, np.array(cluster)
            ),
        )
    return {
        "vector": vector,
        "covariance": covariance * inflate,
        "scatter": scatter,
        "dof": max(dof, 0),
        "chi2": chi2,
    }


def _cluster_factor(
    design: Array, weighted_left: Array, covariance: Array, cluster: NDArray[np.int_]
) -> float:
    """By how much the cluster-robust variances exceed the plain ones, at most, over the parameters."""
    scores = np.array(
        [design[cluster == c].T @ weighted_left[cluster == c] for c in np.unique(cluster)]
    )
    small = len(scores) / max(len(scores) - design.shape[1], 1)
    robust = small * covariance @ scores.T @ scores @ covariance
    return float((np.diag(robust) / np.diag(covariance)).max())


def _weighted(design: Array, y: Array, variance: Array) -> tuple[Array, Array, float]:
    covariance: Array = np.linalg.inv(design.T @ (design / variance[:, None])).astype(float)
    vector = covariance @ (design.T @ (y / variance))
    return vector, covariance, float((((y - design @ vector) ** 2) / variance).sum())


def _paule_mandel(design: Array, y: Array, se: Array, dof: int) -> float:
    """The between-cell variance at which chi2 equals its degrees of freedom; 0 when the cells' own errors suffice."""
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
    """`params`, `solution`, `objective` and status `said` of the law through the cells' optima."""
    from scipy import stats

    kept, said = choose_columns(cells, columns)
    x = np.log([[cell[column] for column in kept] for cell in cells]).reshape(len(cells), len(kept))
    result = regress(
        x - x.mean(0),
        np.array([c["x"] for c in cells]),
        np.array([c["se"] for c in cells]),
        [c["cell"] for c in cells],
    )
    dof = result["dof"]
    if dof < 1:
        said.append(
            f"{len(cells)} usable cells leave nothing to check {len(kept) + 1} parameters with: intervals assume cells scatter by {SCATTER:.0%} about the law"
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
        "half_width": [
            float(np.median([c["half_width"][side] for c in cells])) for side in (0, 1)
        ],  # of the band, in ln lr
    }
    params = _params(solution, columns)
    for column in kept:
        low, high = params[EXPONENTS[column]]["interval"]
        if high - low > VAGUE:
            said.append(
                f"the data hardly identify the exponent of `{column}`: its interval is [{low:.2g}, {high:.2g}]"
            )
    return {"params": params, "solution": solution, "objective": result["chi2"], "said": said}


def _params(solution: dict[str, Any], columns: list[str]) -> dict[str, dict[str, Any]]:
    """c, a, b (and d) with intervals; c is lr at one parameter and one token, an extrapolation with an interval to match."""
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
