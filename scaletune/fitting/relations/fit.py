"""Fits a relation to a table: group by group, and across the groups."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.relations.intervals import (
    at_bound,
    parameter_intervals,
    parameters,
    uncertain_parameters,
)
from scaletune.fitting.relations.relation import Array, GroupFit, Relation
from scaletune.fitting.relations.rows import (
    RelationRows,
    join_reasons,
    read_rows,
    scale_levels,
    split_groups,
)
from scaletune.fitting.relations.solver import RelationSolution, residuals, solve, values
from scaletune.records import Fit

MAX_POINTS = 1000  # rows that a fit keeps for plots
FEWEST_GROUPS = 3  # groups from which a relation across them is fitted
SHOWN = 4  # groups that a sentence names


def fit_relation(table: pd.DataFrame, relation: Relation, *, level: float = 0.95) -> Fit:
    """Fits a relation to a table.

    If the relation has groups, each is fitted separately (rows of `Fit.cells`), and the relation
    across the groups, if there is one, is fitted to their parameters. Groups that cannot be fitted
    are dropped with the reason.

    Args:
        table: The inputs and the output of the relation, one row per run or checkpoint.
        relation: One of `RELATIONS`.
        level: Coverage of the intervals.

    Raises:
        UserError: A column is missing or has invalid values, or no group can be fitted.
    """
    rows = read_rows(table, relation)
    if relation.design:
        relation.design(rows.table)
    keyed, no_group = split_groups(rows.table, relation)
    parts = [_fit_group(relation, key, group, level) for key, group in keyed]
    usable = [part for part in parts if part.fit]
    if not usable:
        raise UserError(_no_group(relation, parts))
    rows = replace(rows, dropped=rows.dropped | no_group | _dropped_rows(parts))
    weights = [1.0] * len(usable)
    if len(parts) == 1:
        result = _only_group(relation, usable[0])
    else:
        result, weights = _fit_across(relation, usable, level)
    result = _finish(relation, result, parts, rows)
    return relation.review(result, usable, weights) if relation.review else result


def _finish(relation: Relation, result: Fit, parts: Sequence[GroupFit], rows: RelationRows) -> Fit:
    """Adds the runs, the dropped rows and groups, the warnings and what was assumed."""
    status = [*_dropped_groups(parts), *rows.warnings, *result.status]
    dropped_cells = [part.key | {"status": part.reason} for part in parts if not part.fit]
    return replace(
        result,
        law=relation.id,
        used=[run for part in parts if part.fit for run in part.rows["id"]],
        cells=[*result.cells, *dropped_cells],
        dropped=rows.dropped,
        status=[sentence for sentence in dict.fromkeys(status) if sentence != "ok"] or ["ok"],
        assumptions=[*result.assumptions, *rows.assumptions],
    )


def _fit_group(
    relation: Relation, key: dict[str, Any], rows: pd.DataFrame, level: float
) -> GroupFit:
    """The fit of one group, or the reason why it has none."""
    dropped: dict[str, str] = {}
    try:
        fitted = rows
        if relation.reduce:
            fitted, dropped = relation.reduce(rows)
            rows = rows[~rows["id"].isin(list(dropped))]
        if relation.select:
            fitted, dropped = relation.select(rows)
            fitted = fitted.reset_index(drop=True)
        fit, solved = _fit_rows(relation, fitted, level)
    except UserError as error:
        return GroupFit(key=key, rows=rows, reason=str(error))
    reason = relation.reject(rows, _point(fit)) if relation.reject else ""
    if reason:
        return GroupFit(key=key, rows=rows, reason=reason)
    errors = np.sqrt(np.diag(solved.covariance)) / max(solved.scatter, 1e-300)
    return GroupFit(
        key=key,
        rows=rows if relation.reduce else fitted,
        fit=fit,
        dropped=dropped,
        se=dict(zip(relation.free, errors.tolist(), strict=True)),
        bounds=[
            name
            for name, at in zip(relation.free, solved.vector, strict=True)
            if at_bound(relation, name, at)
        ],
    )


def _fit_rows(
    relation: Relation, rows: pd.DataFrame, level: float, se: Array | None = None
) -> tuple[Fit, RelationSolution]:
    from scipy.stats import t

    x: dict[str, Array] = {
        column.name: rows[column.name].to_numpy(float) for column in relation.inputs
    }
    y = rows[relation.output.name].to_numpy(float)
    if relation.prepare:
        x |= {name: np.asarray(column) for name, column in relation.prepare(rows).items()}
    clusters = None
    if relation.curves:
        clusters = (
            rows["run_id"].astype(str).to_numpy() if "run_id" in rows else np.full(len(y), "run")
        )
    solved = solve(relation, x, y, clusters, se)
    intervals = parameter_intervals(relation, solved, level)
    point = values(relation, solved.vector)
    columns = {**x, relation.output.name: y}
    fit = Fit(
        law=relation.id,
        params=parameters(relation, solved, intervals, level),
        level=level,
        objective=float(np.square(residuals(relation, x, y, solved.vector)).sum()),
        solution={
            "values": point,
            "draws": _draws(relation, solved.draws),
            "t_draws": _draws(relation, solved.t_draws),
            "scatter": solved.scatter,
            "dof": solved.dof,
            "quantile": float(t.ppf(0.5 + level / 2, solved.dof)),
            "points": {name: column[:MAX_POINTS].tolist() for name, column in columns.items()},
        },
        ranges={
            column.name: [float(x[column.name].min()), float(x[column.name].max())]
            for column in relation.inputs
        },
        status=uncertain_parameters(relation, solved, intervals) or ["ok"],
        assumptions=_assumptions(relation),
    )
    return fit, solved


def _draws(relation: Relation, drawn: Array) -> list[list[float]]:
    return [list(values(relation, draw).values()) for draw in drawn]


def _point(fit: Fit) -> dict[str, Any]:
    return {name: parameter["value"] for name, parameter in fit.params.items()}


def _assumptions(relation: Relation) -> list[str]:
    return [f"{relation.formula} ({relation.source})"]


def _only_group(relation: Relation, part: GroupFit) -> Fit:
    """The fit of a table with one group, whose parameters have plain names."""
    assert part.fit is not None
    if not part.key or relation.across is None:
        return part.fit
    cells = [part.key | _point(part.fit) | {"status": "ok", "solution": part.fit.solution}]
    only = (
        f"the table has one group, {format_group(part.key)}: the parameters hold there, and no law "
        f"of `{relation.across.along}` is fitted"
    )
    return replace(part.fit, cells=cells, status=[only, *part.fit.status])


def _fit_across(relation: Relation, parts: list[GroupFit], level: float) -> tuple[Fit, list[float]]:
    """The relation across the groups with their weights, or the groups' own fits if too few."""
    across = relation.across
    if across is None:
        return _fit_of_groups(relation, parts, []), [1.0] * len(parts)
    output = across.output.name
    bounded = [part for part in parts if output in part.bounds]
    measured = [part for part in parts if output not in part.bounds]
    status = [
        f"`{output}` at {format_group(part.key)} is at the end of its search range, so it is a "
        "bound and not used in the law across the groups"
        for part in bounded
    ]
    keys = np.array([part.key.get(across.along, math.nan) for part in measured], float)
    n_levels = int(scale_levels(keys).max()) + 1 if len(keys) and np.isfinite(keys).all() else 0
    if n_levels < FEWEST_GROUPS:
        status.append(
            f"{len(parts)} group{'s are' if len(parts) > 1 else ' is'} fitted separately: a "
            f"relation across groups needs 3 groups with different `{across.along}`, but got "
            f"{n_levels}"
        )
        return _fit_of_groups(relation, parts, status), [1.0] * len(parts)
    table = pd.DataFrame([part.key | _point(part.fit) for part in measured if part.fit])
    fit, solved = _fit_rows(across, table, level, _standard_errors(measured, output))
    weight = iter(solved.weights.tolist())
    weights = [0.0 if output in part.bounds else next(weight) for part in parts]
    status += _ignored_keys(across, measured)
    status += _group_warnings(measured, f"`{output}`")
    result = replace(
        fit,
        cells=[part.key | _point(part.fit) | {"status": "ok"} for part in parts if part.fit],
        status=[*status, *fit.status],
        assumptions=[*_assumptions(relation), *fit.assumptions],
    )
    return result, weights


def _standard_errors(parts: Sequence[GroupFit], output: str) -> Array:
    """Standard errors of a parameter of the groups.

    The scatter is pooled over the groups, since that of few rows can be small by chance; a group
    that scatters more has its own.
    """
    solutions = [part.fit.solution for part in parts if part.fit]
    dof = np.array([solution["dof"] for solution in solutions], float)
    scatter = np.array([solution["scatter"] for solution in solutions])
    pooled = math.sqrt(float((dof * scatter**2).sum() / dof.sum()))
    return np.maximum(scatter, pooled) * np.array([part.se[output] for part in parts])


def _ignored_keys(across: Relation, parts: Sequence[GroupFit]) -> list[str]:
    """A warning for each column of the groups that the relation across them does not read."""
    table = pd.DataFrame([part.key for part in parts])
    return [
        f"`{name}` differs between groups of the same `{across.along}`, and the law across the "
        f"groups does not depend on it; fit each `{name}` separately"
        for name in table.columns
        if name != across.along and (table.groupby(across.along)[name].nunique() > 1).any()
    ]


def _group_warnings(parts: Sequence[GroupFit], start: str = "") -> list[str]:
    return [
        f"{format_group(part.key)}: {sentence}"
        for part in parts
        if part.fit
        for sentence in part.fit.status
        if sentence != "ok" and sentence.startswith(start)
    ]


def _fit_of_groups(relation: Relation, parts: list[GroupFit], status: list[str]) -> Fit:
    """A fit of separate groups: parameters as "E at method=best", solutions in `cells`."""
    fits = [(part.key, part.fit) for part in parts if part.fit]
    rows = pd.concat([part.rows for part in parts])
    return Fit(
        law=relation.id,
        solution={},
        objective=sum(fit.objective for _, fit in fits),
        level=fits[0][1].level,
        status=[*status, *_group_warnings(parts)],
        params={
            f"{name} at {format_group(key)}": parameter
            for key, fit in fits
            for name, parameter in fit.params.items()
        },
        cells=[key | _point(fit) | {"status": "ok", "solution": fit.solution} for key, fit in fits],
        ranges={
            column.name: [float(f(rows[column.name])) for f in (min, max)]
            for column in relation.inputs
            if column.name in rows
        },
        assumptions=_assumptions(relation),
    )


def format_group(key: Mapping[str, Any]) -> str:
    """`n_params=1e+07, method=best`."""
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in key.items()
    )


def _dropped_rows(parts: Sequence[GroupFit]) -> dict[str, str]:
    """{id: reason} of the rows of dropped groups, and of the unused rows of the others."""
    dropped: dict[str, str] = {}
    for part in parts:
        if part.fit:
            dropped |= part.dropped
        else:
            label = f"{format_group(part.key)}: " if part.key else ""
            dropped |= dict.fromkeys(part.rows["id"], f"{label}{part.reason}")
    return dropped


def _dropped_groups(parts: Sequence[GroupFit]) -> list[str]:
    """One sentence per reason: which groups are dropped, and why."""
    keys: dict[str, list[str]] = {}
    for part in parts:
        if not part.fit:
            keys.setdefault(part.reason, []).append(format_group(part.key))
    sentences = []
    for reason, names in keys.items():
        more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
        sentences.append(
            f"{len(names)} of {len(parts)} groups dropped ({'; '.join(names[:SHOWN])}{more}): "
            f"{reason}"
        )
    return sentences


def _no_group(relation: Relation, parts: Sequence[GroupFit]) -> str:
    """The sentence of an error: why no group can be fitted."""
    if len(parts) == 1 and not parts[0].key:
        return parts[0].reason
    return (
        f"{relation.id} needs at least one usable group of "
        f"{', '.join(f'`{name}`' for name in parts[0].key)}, but all {len(parts)} are dropped: "
        f"{join_reasons([part.reason for part in parts])}"
        f"{f'; otherwise {relation.otherwise}' if relation.otherwise else ''}"
    )
