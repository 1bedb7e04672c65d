"""Fits any relation: robust least squares from several starts, with resampled intervals.

Starts are a Sobol sequence over the search ranges of the parameters; the best of them are solved.
Each resample is one Gauss-Newton step from the solution. The solver only evaluates the formula; the
loss law has its own solver (loss/).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from scaletune.errors import UserError
from scaletune.fitting.relations.relation import Array, Box, Relation, RelationColumn
from scaletune.records import Fit

STARTS, KEPT, DRAWS = 64, 3, 200
MAX_POINTS = 1000  # rows that a fit keeps for plots
SLOW = 0.5  # seconds after which progress is shown
WIDE_INTERVAL = math.log(10.0)  # width in ln of a parameter from which a warning is given


@dataclass(frozen=True)
class RelationSolution:
    """The solution of a fit."""

    vector: Array
    """(P): free parameters, as logarithms where their box says so."""

    covariance: Array
    """(P, P)"""

    draws: Array
    """(n, P): resampled parameters."""

    scatter: float
    """Robust sd of the residuals."""

    dof: int
    """Degrees of freedom."""


def read_columns(
    table: pd.DataFrame, relation: Relation
) -> tuple[dict[str, Array], Array, pd.DataFrame]:
    """Checked inputs and output as arrays, and the rows used.

    Rows that did not finish or have no output are not used.
    """
    rows = table[table["status"].fillna("done") == "done"] if "status" in table else table
    rows = relation.reduce(rows) if relation.reduce else rows
    for column in (*relation.inputs, relation.output):
        if column.name not in rows:
            if column.default is None:
                raise UserError(
                    f"{relation.id} needs a column `{column.name}` ({column.description}), "
                    f"but the columns are: {', '.join(map(str, table.columns))}"
                )
            rows = rows.assign(**{column.name: column.default})
    output = pd.to_numeric(rows[relation.output.name], errors="coerce")
    rows = rows[output.notna()].reset_index(drop=True)
    x: dict[str, Array] = {column.name: _numbers(rows, column) for column in relation.inputs}
    y = _numbers(rows, relation.output)
    if relation.prepare:
        x |= {name: np.asarray(values) for name, values in relation.prepare(rows).items()}
    return x, y, rows


def _numbers(rows: pd.DataFrame, column: RelationColumn) -> Array:
    values = pd.to_numeric(rows[column.name], errors="coerce").to_numpy(float)
    bad = ~np.isfinite(values) | ((values <= 0) & column.positive)
    if bad.any():
        rule = "a number above 0" if column.positive else "a number"
        row = int(bad.argmax())
        given = rows[column.name].iloc[row]
        shown = repr(given) if isinstance(given, str) else f"{values[row]:g}"
        raise UserError(f"`{column.name}` must be {rule} in every row, but row {row} has {shown}")
    return values


def solve(
    relation: Relation,
    x: Mapping[str, Array],
    y: Array,
    clusters: NDArray[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> RelationSolution:
    """Fits a relation.

    Args:
        relation: The relation.
        x: Inputs, (R) each.
        y: (R) output.
        clusters: (R) run of each row, if rows of one run are resampled together.
        draws: Number of resamples.
        seed: Seed of the starts and of the resamples.

    Raises:
        UserError: There are not more rows than parameters.
    """
    from scipy.optimize import least_squares

    free = [relation.parameters[name] for name in relation.free]
    if len(y) <= len(free):
        raise UserError(
            f"{relation.id} has {len(free)} parameters and needs more rows than that, "
            f"but got {len(y)}: add values of `{relation.along}`"
        )
    low, high = (np.array([_solver_bound(box, end) for box in free]) for end in ("low", "high"))

    def residuals(theta: Array) -> Array:
        return _residuals(relation, x, y, theta)

    starts = _starts(low, high, seed)
    costs = [float(np.square(np.clip(residuals(theta), -1e3, 1e3)).sum()) for theta in starts]
    best = None
    for i in tqdm(np.argsort(costs)[:KEPT], relation.id, delay=SLOW, disable=None, leave=False):
        end = least_squares(residuals, starts[i], bounds=(low, high), x_scale="jac", max_nfev=400)
        best = end if best is None or end.cost < best.cost else best
    assert best is not None
    scale = max(1.4826 * float(np.median(np.abs(best.fun))), 1e-9)
    if relation.robust:
        best = least_squares(
            residuals,
            best.x,
            bounds=(low, high),
            x_scale="jac",
            max_nfev=200,
            loss="soft_l1",
            f_scale=2 * scale,
        )
    dof = len(y) - len(free)
    scatter = math.sqrt(float(np.square(np.clip(best.fun, -4 * scale, 4 * scale)).sum()) / dof)
    jacobian = np.asarray(best.jac, float)
    covariance = scatter**2 * np.linalg.pinv(jacobian.T @ jacobian)
    resamples = [
        _newton_step(best.x, jacobian[rows], best.fun[rows])
        for rows in _resample(len(y), clusters, draws, seed)
    ]
    drawn = np.clip(np.array(resamples).reshape(-1, len(free)), low, high)
    return RelationSolution(best.x, covariance, drawn, scatter, dof)


def _newton_step(theta: Array, jacobian: Array, residuals: Array) -> Array:
    """One Gauss-Newton step from the solution for all rows towards that of a resample."""
    return theta - np.linalg.lstsq(jacobian, residuals, rcond=1e-8)[0]


def _solver_bound(box: Box, end: str) -> float:
    value = getattr(box, end)
    return math.log(value) if box.log else value


def _residuals(relation: Relation, x: Mapping[str, Array], y: Array, theta: Array) -> Array:
    with np.errstate(all="ignore"):
        model = np.asarray(relation.function(x, values(relation, theta)), float)
        residuals = np.log(np.maximum(model, 1e-300)) - np.log(y) if relation.log else model - y
    return np.nan_to_num(residuals, nan=1e3, posinf=1e3, neginf=-1e3)


def values(relation: Relation, theta: Array) -> dict[str, float]:
    """Parameter name -> value, from the vector of the solver."""
    free = {
        name: float(math.exp(v) if relation.parameters[name].log else v)
        for name, v in zip(relation.free, theta, strict=True)
    }
    return free | dict(relation.fixed)


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
    if clusters is None or len(np.unique(clusters)) < 3:
        return [rng.integers(0, n, n) for _ in range(draws)]
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    return [
        np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        for _ in range(draws)
    ]


def fit_relation(table: pd.DataFrame, relation: Relation, *, level: float = 0.95) -> Fit:
    """Fits a relation to a table.

    If the relation has groups, each is fitted separately (rows of `Fit.cells`), and the relation
    across the groups, if there is one, is fitted to their parameters.

    Args:
        table: The inputs and the output of the relation, one row per run or checkpoint.
        relation: One of `RELATIONS`.
        level: Coverage of the intervals.

    Raises:
        UserError: A column is missing or has invalid values, or there are too few rows.
    """
    x, y, rows = read_columns(table, relation)
    groups = [name for name in relation.groups if name in rows]
    if not groups or len(rows[groups].drop_duplicates()) == 1:
        return _fit_rows(relation, x, y, rows, level)
    parts = []
    for key, group in rows.groupby(groups, sort=True):
        part = relation.select(group) if relation.select else group
        columns = {name: column[part.index] for name, column in x.items()}
        fitted = _fit_rows(relation, columns, y[part.index], part, level)
        parts.append((dict(zip(groups, tuple(key), strict=True)), fitted))
    if relation.across is None or len(parts) < 3:
        return _fit_of_groups(relation, parts, rows, level)
    cells = [key | _point(part) for key, part in parts]
    across = fit_relation(pd.DataFrame(cells), relation.across, level=level)
    return replace(
        across,
        law=relation.id,
        cells=cells,
        used=_ids(rows),
        assumptions=[*_assumptions(relation), *across.assumptions],
    )


def _point(fit: Fit) -> dict[str, Any]:
    return {name: parameter["value"] for name, parameter in fit.params.items()}


def _fit_of_groups(
    relation: Relation, parts: list[tuple[dict[str, Any], Fit]], rows: pd.DataFrame, level: float
) -> Fit:
    """A fit of separate groups: parameters as "E at method=best", solutions in `cells`."""
    status = []
    if relation.across:
        status.append(
            f"{len(parts)} groups are fitted separately: a relation across groups needs 3 groups"
        )
    status += [
        f"{_format_group(key)}: {sentence}"
        for key, part in parts
        for sentence in part.status
        if sentence != "ok"
    ]
    return Fit(
        law=relation.id,
        solution={},
        objective=sum(part.objective for _, part in parts),
        level=level,
        status=status or ["ok"],
        params={
            f"{name} at {_format_group(key)}": parameter
            for key, part in parts
            for name, parameter in part.params.items()
        },
        cells=[key | _point(part) | {"solution": part.solution} for key, part in parts],
        ranges={
            column.name: [float(f(rows[column.name])) for f in (min, max)]
            for column in relation.inputs
            if column.name in rows
        },
        used=_ids(rows),
        assumptions=_assumptions(relation),
    )


def _format_group(key: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in key.items()
    )


def select_group(fit: Fit, relation: Relation, given: Mapping[str, Any]) -> Fit:
    """The fit of the group that `given` names, if groups were fitted separately; else `fit`.

    Raises:
        UserError: There is no such group.
    """
    if fit.solution or not any("solution" in cell for cell in fit.cells):
        return fit
    keys = [{name: cell[name] for name in relation.groups if name in cell} for cell in fit.cells]
    for cell, key in zip(fit.cells, keys, strict=True):
        if all(given.get(name) == value for name, value in key.items()):
            return replace(fit, solution=cell["solution"])
    raise UserError(
        f"this fit of {fit.law!r} has {len(keys)} groups that were fitted separately: "
        f"name one of them, such as {_format_group(keys[0])}"
    )


def _ids(rows: pd.DataFrame) -> list[str]:
    return list(rows["id"].astype(str)) if "id" in rows else [f"row{i}" for i in range(len(rows))]


def _assumptions(relation: Relation) -> list[str]:
    return [f"{relation.formula} ({relation.source})"]


def _fit_rows(
    relation: Relation, x: Mapping[str, Array], y: Array, rows: pd.DataFrame, level: float
) -> Fit:
    clusters = (
        rows["run_id"].astype(str).to_numpy() if relation.curves and "run_id" in rows else None
    )
    solved = solve(relation, x, y, clusters)
    intervals = _intervals(relation, solved, level)
    point = values(relation, solved.vector)
    drawn = [values(relation, draw) for draw in solved.draws]
    residuals = _residuals(relation, x, y, solved.vector)
    columns = {**x, relation.output.name: y}
    return Fit(
        law=relation.id,
        params=_params(relation, point, drawn, intervals, level),
        level=level,
        objective=float(np.square(residuals).sum()),
        solution={
            "values": point,
            "draws": [list(draw.values()) for draw in drawn],
            "scatter": solved.scatter,
            "points": {name: column[:MAX_POINTS].tolist() for name, column in columns.items()},
        },
        ranges={
            column.name: [float(x[column.name].min()), float(x[column.name].max())]
            for column in relation.inputs
        },
        used=_ids(rows),
        status=_warnings(relation, solved, intervals) or ["ok"],
        assumptions=_assumptions(relation),
    )


def _params(
    relation: Relation,
    point: Mapping[str, float],
    drawn: list[dict[str, float]],
    intervals: Mapping[str, list[float]],
    level: float,
) -> dict[str, Any]:
    """Free, fixed and derived parameters, with intervals where they have one."""
    params: dict[str, Any] = {
        name: {"value": point[name], "interval": intervals[name]} for name in relation.free
    }
    params |= {
        name: {"value": value, "interval": None, "fixed": True}
        for name, value in relation.fixed.items()
    }
    if relation.derived:
        resampled = [relation.derived(draw) for draw in drawn]
        for name, value in relation.derived(point).items():
            interval = _quantiles([draw[name] for draw in resampled], value, level)
            params[name] = {"value": value, "interval": interval, "derived": True}
    return params


def _intervals(
    relation: Relation, solved: RelationSolution, level: float
) -> dict[str, list[float]]:
    """The wider of the t interval and the quantiles of the resamples, for each parameter."""
    from scipy.stats import t

    half = t.ppf(0.5 + level / 2, solved.dof) * np.sqrt(np.diag(solved.covariance))
    result = {}
    for i, name in enumerate(relation.free):
        box, middle = relation.parameters[name], float(solved.vector[i])
        low, high = _quantiles(list(solved.draws[:, i]), middle, level)
        ends = [min(low, middle - half[i]), max(high, middle + half[i])]
        result[name] = [
            math.exp(min(max(end, -700.0), 700.0)) if box.log else float(end) for end in ends
        ]
    return result


def _quantiles(drawn: list[float], middle: float, level: float) -> list[float]:
    if not drawn:
        return [middle, middle]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return [float(min(low, middle)), float(max(high, middle))]


def _warnings(
    relation: Relation, solved: RelationSolution, intervals: Mapping[str, list[float]]
) -> list[str]:
    """A sentence for each parameter that is poorly constrained or at the end of its range."""
    warnings = []
    for name, at in zip(relation.free, solved.vector, strict=True):
        box, (low, high) = relation.parameters[name], intervals[name]
        ends = [_solver_bound(box, "low"), _solver_bound(box, "high")]
        width = math.log(high / low) if box.log else (high - low) / max(abs(at), 1e-12)
        if min(at - ends[0], ends[1] - at) < 1e-3 * (ends[1] - ends[0]):
            warnings.append(
                f"`{name}` is at the end of its search range, {box.low:g} to {box.high:g}, so its "
                f"value is a bound; add rows over a wider range of `{relation.along}`"
            )
        elif not box.at_origin and width > WIDE_INTERVAL:
            warnings.append(
                f"`{name}` is poorly constrained: its interval is [{low:.3g}, {high:.3g}]; add "
                f"rows over a wider range of `{relation.along}`"
            )
    return warnings


def fitted_relation(fit: Fit, relation: Relation) -> Relation:
    """The relation whose parameters a fit holds: the given one, or the one across its groups.

    Raises:
        UserError: The groups were fitted separately, so the fit has no single solution.
    """
    if not fit.solution:
        raise UserError(
            f"this fit of {fit.law!r} has {len(fit.cells)} groups that were fitted separately: "
            "fit the rows of one group, and use that fit"
        )
    across = relation.across
    if across and set(fit.solution["values"]) == set(across.parameters):
        return across
    return relation


def predict_relation(
    fit: Fit, relation: Relation, columns: Mapping[str, Any]
) -> dict[str, list[float]]:
    """Predicts the output of a fitted relation.

    Args:
        fit: A fit of the relation.
        relation: The relation.
        columns: Values of its inputs, of equal length.

    Returns:
        "value", "low" and "high" of the output. The interval combines quantiles of the resampled
        parameters with the scatter around the curve.

    Raises:
        UserError: The groups were fitted separately, or a column is missing or is not a number.
    """
    relation = fitted_relation(fit, relation)
    for column in relation.inputs:
        if column.name not in columns and column.default is None:
            needed = ", ".join(column.name for column in relation.inputs)
            raise UserError(
                f"a prediction from a fit of {fit.law!r} needs {needed}, "
                f"but `{column.name}` was not given"
            )
    rows = pd.DataFrame({name: np.atleast_1d(column) for name, column in columns.items()})
    x: dict[str, Any] = {str(name): rows[name].to_numpy() for name in rows}
    x |= {column.name: _numbers(rows, column) for column in relation.inputs if column.name in rows}
    if relation.prepare and "run" not in rows:
        prepared = relation.prepare(rows.assign(**x))
        x |= {name: np.asarray(values) for name, values in prepared.items()}
    names = list(fit.solution["values"])
    point = np.asarray(relation.function(x, fit.solution["values"]), float)
    drawn = np.array(
        [
            relation.function(x, dict(zip(names, draw, strict=True)))
            for draw in fit.solution["draws"]
        ]
        or [point]
    )
    low, high = np.quantile(drawn, [(1 - fit.level) / 2, (1 + fit.level) / 2], axis=0)
    quantile = NormalDist().inv_cdf((1 + fit.level) / 2)
    scatter = quantile * fit.solution["scatter"] * (point if relation.log else 1.0)
    below = np.hypot(np.maximum(point - low, 0), scatter)
    above = np.hypot(np.maximum(high - point, 0), scatter)
    return {
        "value": point.tolist(),
        "low": (point - below).tolist(),
        "high": (point + above).tolist(),
    }
