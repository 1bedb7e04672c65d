"""Predicts the output of a fitted relation."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from statistics import NormalDist
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError
from scaletune.fitting.relations.fit import format_group
from scaletune.fitting.relations.relation import Array, Relation
from scaletune.fitting.relations.rows import SCALES, numbers
from scaletune.fitting.table import SAME_SCALE
from scaletune.records import Fit

DRAWS = ("draws", "t_draws", "corrected_draws")
"""Sets of draws in a solution; a fit may lack some of them."""
LOWEST, HIGHEST = 1e-300, 1e300


def select_group(fit: Fit, relation: Relation, given: Mapping[str, Any]) -> Fit:
    """The fit of the group that `given` names, if groups were fitted separately; else `fit`.

    Raises:
        UserError: There is no such group.
    """
    cells = [cell for cell in fit.cells if "solution" in cell]
    if not cells:
        return fit
    keys = [{name: cell[name] for name in relation.groups if name in cell} for cell in cells]
    named = any(name in given for key in keys for name in key)
    if fit.solution and not named:
        return fit
    for cell, key in zip(cells, keys, strict=True):
        if all(_same(name, given.get(name), value) for name, value in key.items()):
            return replace(fit, solution=cell["solution"])
    raise UserError(
        f"this fit of {fit.law!r} has {len(keys)} group{'s' if len(keys) > 1 else ''} that were "
        f"fitted separately: name one of them, such as {format_group(keys[0])}"
    )


def _same(name: str, given: Any, value: Any) -> bool:
    if name not in SCALES or not isinstance(given, int | float):
        return bool(given == value)
    return bool(given > 0 and max(given / value, value / given) <= SAME_SCALE)


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
        "value", "low" and "high" of the output. The interval combines the uncertainty of the
        parameters with the scatter around the curve. That of a positive output is positive.

    Raises:
        UserError: The groups were fitted separately, or a column is missing or is not a number.
    """
    relation = fitted_relation(fit, relation)
    x = _inputs(fit, relation, columns)
    names = list(fit.solution["values"])
    point = _evaluate(relation, x, fit.solution["values"])
    level = [(1 - fit.level) / 2, (1 + fit.level) / 2]
    low, high = point, point
    for kind in DRAWS:
        rows = fit.solution.get(kind) or []
        if rows:
            drawn = [_evaluate(relation, x, dict(zip(names, row, strict=True))) for row in rows]
            ends = np.quantile(np.array(drawn), level, axis=0)
            low, high = np.minimum(low, ends[0]), np.maximum(high, ends[1])
    # a fit of an older version has no quantile of the t distribution
    quantile = fit.solution.get("quantile") or NormalDist().inv_cdf((1 + fit.level) / 2)
    scatter = quantile * fit.solution["scatter"]
    below, above = _combine(relation, point, low, high, scatter)
    return {"value": point.tolist(), "low": below.tolist(), "high": above.tolist()}


def _inputs(fit: Fit, relation: Relation, columns: Mapping[str, Any]) -> dict[str, Any]:
    needed = [column.name for column in relation.inputs if column.default is None]
    missing = [name for name in needed if name not in columns]
    if missing:
        raise UserError(
            f"a prediction from a fit of {fit.law!r} needs "
            f"{', '.join(column.name for column in relation.inputs)}, but "
            f"{' and '.join(f'`{name}`' for name in missing)} "
            f"{'was' if len(missing) == 1 else 'were'} not given"
        )
    rows = pd.DataFrame({name: np.atleast_1d(column) for name, column in columns.items()})
    x: dict[str, Any] = {str(name): rows[name].to_numpy() for name in rows}
    x |= {column.name: numbers(rows, column) for column in relation.inputs if column.name in rows}
    if relation.prepare and "run" not in rows:
        prepared = relation.prepare(rows.assign(**x))
        x |= {name: np.asarray(values) for name, values in prepared.items()}
    return x


def _evaluate(relation: Relation, x: Mapping[str, Any], values: Mapping[str, float]) -> Array:
    """The output, finite, and not negative if it is a positive quantity."""
    with np.errstate(all="ignore"):
        output = np.asarray(relation.function(x, values), float)
    lowest = LOWEST if relation.log else 0.0 if relation.output.positive else -HIGHEST
    return np.clip(np.nan_to_num(output, nan=HIGHEST, posinf=HIGHEST), lowest, HIGHEST)


def _combine(
    relation: Relation, point: Array, low: Array, high: Array, scatter: float
) -> tuple[Array, Array]:
    """The ends of the interval: in logarithms for a positive output."""
    if relation.log:
        most = math.log(HIGHEST)
        ends = np.log(np.stack([point, low, high]))
        below = ends[0] - np.hypot(ends[0] - ends[1], scatter)
        above = ends[0] + np.hypot(ends[2] - ends[0], scatter)
        return np.exp(np.clip(below, -most, most)), np.exp(np.clip(above, -most, most))
    below = point - np.hypot(point - low, scatter)
    above = point + np.hypot(high - point, scatter)
    return (np.maximum(below, 0.0) if relation.output.positive else below), above
