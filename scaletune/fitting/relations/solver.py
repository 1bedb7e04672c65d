"""Solves a relation: robust least squares from several starts, with covariance and resamples.

Starts are a Sobol sequence over the search ranges of the parameters; the best of them are solved.
Each resample is one Gauss-Newton step from the solution. The solver only evaluates the formula; the
loss law has its own solver (loss/).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from scaletune.errors import UserError
from scaletune.fitting.relations.relation import Array, Box, Relation, Values
from scaletune.fitting.relations.rows import SCALES, scale_levels

STARTS, KEPT, DRAWS = 64, 3, 200
MANY_ROWS = 4000  # with more, the starts are solved on a part of the rows
SLOW = 0.5  # seconds after which progress is shown
ROBUST_DOF = 3  # with fewer degrees of freedom an outlier cannot be told from noise
FEWEST_CLUSTERS = 3  # runs from which whole runs are resampled
ROUNDS = 30  # iterations for the scatter between groups


@dataclass(frozen=True)
class RelationSolution:
    """The solution of a fit."""

    vector: Array
    """(P): free parameters, as logarithms where their box says so."""

    covariance: Array
    """(P, P)"""

    draws: Array
    """(n, P): parameters from resampled rows."""

    t_draws: Array
    """(n, P): parameters from a t distribution with the covariance."""

    scatter: float
    """Robust sd of the residuals."""

    dof: int
    """Degrees of freedom."""

    weights: Array
    """(R): weights of the rows, by their standard errors."""


def solve(
    relation: Relation,
    x: Mapping[str, Array],
    y: Array,
    clusters: NDArray[Any] | None = None,
    se: Array | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> RelationSolution:
    """Fits a relation.

    Args:
        relation: The relation.
        x: Inputs, (R) each.
        y: (R) output.
        clusters: (R) run of each row, if rows of one run are resampled together.
        se: (R) standard errors of the output, of its logarithm if the relation says so. Rows
            scatter around the law by more than these; the excess is estimated.
        draws: Number of resamples.
        seed: Seed of the starts and of the resamples.

    Raises:
        UserError: There are not more rows, or fewer different rows, than parameters.
    """
    free = [relation.parameters[name] for name in relation.free]
    _require_rows(relation, x, len(y))
    bounds = _bounds(free)
    starts = _starts(*bounds, seed)
    if relation.guess:
        starts = np.array([_vector(relation, relation.guess(x, y))])
    few = slice(None, None, max(len(y) // MANY_ROWS, 1))  # the starts are solved on these rows
    theta = _minimize(relation, _rows(x, few), y[few], np.ones(len(y[few])), starts)
    if len(y[few]) < len(y):
        theta = _minimize(relation, x, y, np.ones(len(y)), theta[None])
    dof, weights, between = len(y) - len(free), np.ones(len(y)), 0.0
    if se is not None:
        for _ in range(ROUNDS):
            before = between
            between = _between_variance(residuals(relation, x, y, theta), se, dof)
            weights = _relative(1 / np.maximum(between + se**2, 1e-24))
            theta = _minimize(relation, x, y, weights, theta[None])
            if abs(between - before) <= 1e-3 * (between + 1e-24):
                break
    errors = residuals(relation, x, y, theta)
    scale = max(1.4826 * float(np.median(np.abs(errors))) * math.sqrt(len(y) / dof), 1e-9)
    robust = relation.robust and se is None and dof >= ROBUST_DOF
    pull = weights
    if robust:
        theta = _minimize(relation, x, y, weights, theta[None], 2 * scale)
        errors = residuals(relation, x, y, theta)
        pull = 1 / np.sqrt(1 + (errors / (2 * scale)) ** 2)
    limited = np.clip(errors, -4 * scale, 4 * scale) if robust else errors
    scatter = math.sqrt(float((weights * limited**2).sum()) / dof)
    if se is not None:
        scatter = max(scatter, math.sqrt(float((weights * (between + se**2)).mean())))
    jacobian = np.sqrt(pull)[:, None] * _jacobian(relation, x, y, theta, bounds)
    pulled = np.sqrt(pull) * errors
    covariance, t_dof = _covariance(jacobian, pulled, scatter, dof, clusters)
    resamples = [
        theta - _newton_step(jacobian, pulled, rows)
        for rows in _resample(len(y), clusters, draws, seed)
    ]
    drawn = np.array(resamples).reshape(-1, len(free))
    t_draws = _t_draws(theta, covariance, t_dof, draws, seed)
    return RelationSolution(
        theta,
        covariance,
        _shorten(theta, drawn, *bounds),
        _shorten(theta, t_draws, *bounds),
        scatter,
        t_dof,
        weights,
    )


def _rows(x: Mapping[str, Array], rows: slice) -> dict[str, Array]:
    return {name: column[rows] for name, column in x.items()}


def _newton_step(jacobian: Array, errors: Array, rows: NDArray[np.int_]) -> Array:
    """The Gauss-Newton step of resampled rows; by normal equations if there are many."""
    if len(errors) <= MANY_ROWS:
        return np.asarray(np.linalg.lstsq(jacobian[rows], errors[rows], rcond=1e-8)[0])
    counted = jacobian * np.bincount(rows, minlength=len(errors))[:, None]
    return np.asarray(np.linalg.pinv(counted.T @ jacobian, rcond=1e-14) @ (counted.T @ errors))


def _require_rows(relation: Relation, x: Mapping[str, Array], n_rows: int) -> None:
    n_free = len(relation.free)
    if n_rows <= n_free:
        raise UserError(
            f"{relation.id} has {n_free} parameters and needs more rows than that, "
            f"but got {n_rows}: add values of `{relation.along}`"
        )
    names = [column.name for column in relation.inputs]
    columns = [scale_levels(x[name]) if name in SCALES else x[name] for name in names]
    different = len(np.unique(np.stack(columns, 1), axis=0))
    if different < n_free:
        raise UserError(
            f"{relation.id} has {n_free} parameters and needs as many different values of "
            f"{', '.join(f'`{name}`' for name in names)}, but got {different}: add values of "
            f"`{relation.along}`"
        )


def _bounds(free: list[Box]) -> tuple[Array, Array]:
    low, high = (np.array([solver_bound(box, end) for box in free]) for end in ("low", "high"))
    return low, high


def _minimize(
    relation: Relation, x: Mapping[str, Array], y: Array, weights: Array, starts: Array, soft=None
) -> Array:
    """The best solution from the most promising starts; with `soft`, soft L1 of that scale."""
    from scipy.optimize import least_squares

    root = np.sqrt(weights)
    low, high = _bounds([relation.parameters[name] for name in relation.free])

    def weighted(theta: Array) -> Array:
        return root * residuals(relation, x, y, theta)

    costs = [float(np.square(np.clip(weighted(theta), -1e3, 1e3)).sum()) for theta in starts]
    how = {"loss": "soft_l1", "f_scale": soft} if soft else {}
    ends = [
        least_squares(
            weighted,
            np.clip(starts[i], low, high),
            bounds=(low, high),
            x_scale="jac",
            max_nfev=400,
            **how,
        )
        for i in tqdm(np.argsort(costs)[:KEPT], relation.id, delay=SLOW, disable=None, leave=False)
    ]
    return np.asarray(min(ends, key=lambda end: end.cost).x, float)


def solver_bound(box: Box, end: str) -> float:
    """An end of a search range, as a logarithm if the box says so."""
    value = getattr(box, end)
    return math.log(value) if box.log else value


def residuals(relation: Relation, x: Mapping[str, Array], y: Array, theta: Array) -> Array:
    """(R): model minus data, of the logarithms if the relation says so."""
    with np.errstate(all="ignore"):
        model = np.asarray(relation.function(x, values(relation, theta)), float)
        errors = np.log(np.maximum(model, 1e-300)) - np.log(y) if relation.log else model - y
    return np.nan_to_num(errors, nan=1e3, posinf=1e3, neginf=-1e3)


def values(relation: Relation, theta: Array) -> dict[str, float]:
    """Parameter name -> value, from the vector of the solver."""
    free = {
        name: float(math.exp(v) if relation.parameters[name].log else v)
        for name, v in zip(relation.free, theta, strict=True)
    }
    return free | dict(relation.fixed)


def _vector(relation: Relation, point: Values) -> list[float]:
    """The vector of the solver, from the values of the free parameters."""
    return [
        math.log(point[name]) if relation.parameters[name].log else point[name]
        for name in relation.free
    ]


def _jacobian(
    relation: Relation, x: Mapping[str, Array], y: Array, theta: Array, bounds: tuple[Array, Array]
) -> Array:
    """(R, P): derivatives of the residuals, by central differences inside the search range."""
    columns = []
    for i in range(len(theta)):
        step = 1e-5 * max(1.0, abs(theta[i]))
        ends = np.repeat(theta[None], 2, axis=0)
        ends[:, i] = np.clip(theta[i] + np.array([-step, step]), bounds[0][i], bounds[1][i])
        low, high = (residuals(relation, x, y, end) for end in ends)
        columns.append((high - low) / (ends[1, i] - ends[0, i]))
    return np.stack(columns, 1) if columns else np.zeros((len(y), 0))


def _relative(weights: Array) -> Array:
    return np.asarray(weights / weights.mean(), float)


def _between_variance(errors: Array, se: Array, dof: int) -> float:
    """Variance between groups that makes the weighted residuals as large as expected.

    The estimator of Paule & Mandel (1982), by bisection.
    """

    def excess(between: float) -> float:
        return float((errors**2 / np.maximum(between + se**2, 1e-24)).sum()) - dof

    low, high = 0.0, float(np.square(errors).sum()) + 1e-24
    if excess(low) <= 0:
        return 0.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if excess(middle) > 0 else (low, middle)
    return high


def _covariance(
    jacobian: Array, errors: Array, scatter: float, dof: int, clusters: NDArray[Any] | None
) -> tuple[Array, int]:
    """(P, P) and its degrees of freedom; a sandwich over whole runs if there are several."""
    inverse: Array = np.asarray(np.linalg.pinv(jacobian.T @ jacobian), float)
    independent = scatter**2 * inverse
    names: list[Any] = [] if clusters is None else list(np.unique(clusters))
    if len(names) < FEWEST_CLUSTERS:
        factor = _correlation(errors, jacobian.shape[1]) if clusters is not None else 1.0
        return independent * factor, max(round(dof / factor), 1)
    scores = np.array([jacobian[clusters == name].T @ errors[clusters == name] for name in names])
    sandwich: Array = len(names) / (len(names) - 1) * inverse @ scores.T @ scores @ inverse
    t_dof = max(min(dof, len(names) - 1), 1)
    larger = np.trace(sandwich) > np.trace(independent)
    return (sandwich if larger else independent), t_dof


def _correlation(errors: Array, n_free: int) -> float:
    """Factor of the variance for residuals that are correlated along a run.

    The correlation of neighbours is raised by what the fit of n_free parameters takes off.
    """
    power = float(errors @ errors)
    if len(errors) < 8 or power <= 0:
        return 1.0
    lag = float(errors[1:] @ errors[:-1]) / power + (n_free + 1) / len(errors)
    lag = min(max(lag, 0.0), 0.95)
    return (1 + lag) / (1 - lag)


def _t_draws(theta: Array, covariance: Array, dof: int, n: int, seed: int) -> Array:
    """(n, P): draws from a multivariate t distribution, in pairs around the solution."""
    rng = np.random.default_rng([seed, 1])
    size, vectors = np.linalg.eigh(covariance)
    normal = rng.standard_normal((n // 2, len(theta))) * np.sqrt(np.maximum(size, 0))
    spread = normal @ vectors.T / np.sqrt(rng.chisquare(dof, (n // 2, 1)) / dof)
    return np.asarray(np.concatenate([theta + spread, theta - spread]), float)


def _shorten(theta: Array, drawn: Array, low: Array, high: Array) -> Array:
    """Moves draws outside the search range towards the solution, until they are inside.

    All parameters of a draw move together, so that their correlation is kept.
    """
    step = drawn - theta
    outward = ((theta <= low + 1e-9) & (step < 0)) | ((theta >= high - 1e-9) & (step > 0))
    step = np.where(outward, 0.0, step)
    with np.errstate(all="ignore"):
        room = np.where(
            step > 0, (high - theta) / step, np.where(step < 0, (low - theta) / step, 1)
        )
    shares = np.minimum(np.nan_to_num(room, nan=1.0, posinf=1.0).min(axis=1, initial=1.0), 1.0)
    return np.asarray(np.clip(theta + shares[:, None] * step, low, high), float)


def _starts(low: Array, high: Array, seed: int) -> Array:
    from scipy.stats import qmc

    if not len(low):
        return np.zeros((1, 0))
    return qmc.scale(qmc.Sobol(len(low), seed=seed).random(STARTS), low, high)


def _resample(
    n: int, clusters: NDArray[Any] | None, draws: int, seed: int
) -> list[NDArray[np.int_]]:
    """Indices of rows, or of whole clusters of rows, that are drawn with replacement."""
    rng = np.random.default_rng(seed)
    if clusters is None or len(np.unique(clusters)) < FEWEST_CLUSTERS:
        return [rng.integers(0, n, n) for _ in range(draws)]
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    return [
        np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        for _ in range(draws)
    ]
