"""Intervals of the parameters of a relation, and warnings about parameters that are uncertain.

Intervals are computed in logarithms where the parameter is positive, and end at the search range.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from scaletune.fitting.relations.relation import Relation, Values
from scaletune.fitting.relations.solver import RelationSolution, solver_bound, values

WIDE_INTERVAL = math.log(10.0)  # width in ln of a parameter from which a warning is given
NARROW = 0.05  # share of a search range below which an interval around 0 is not wide
Intervals = Mapping[str, list[float]]


def parameter_intervals(
    relation: Relation, solved: RelationSolution, level: float
) -> dict[str, list[float]]:
    """The wider of the t interval and the quantiles of the resamples, for each parameter."""
    from scipy.stats import t

    half = t.ppf(0.5 + level / 2, solved.dof) * np.sqrt(np.diag(solved.covariance))
    result = {}
    for i, name in enumerate(relation.free):
        box, middle = relation.parameters[name], float(solved.vector[i])
        low, high = quantiles(list(solved.draws[:, i]), middle, level)
        low = max(min(low, middle - half[i]), solver_bound(box, "low"))
        high = min(max(high, middle + half[i]), solver_bound(box, "high"))
        ends = [min(low, middle), max(high, middle)]
        result[name] = [math.exp(end) if box.log else float(end) for end in ends]
    return result


def quantiles(drawn: list[float], middle: float, level: float) -> list[float]:
    """The interval at `level` of draws, which contains the value itself."""
    if not drawn:
        return [middle, middle]
    low, high = np.quantile(drawn, [(1 - level) / 2, (1 + level) / 2])
    return [float(min(low, middle)), float(max(high, middle))]


def parameters(
    relation: Relation, solved: RelationSolution, intervals: Intervals, level: float
) -> dict[str, Any]:
    """Free, fixed and derived parameters, with intervals where they have one."""
    point = values(relation, solved.vector)
    params: dict[str, Any] = {
        name: {"value": point[name], "interval": intervals[name]} for name in relation.free
    }
    params |= {
        name: {"value": value, "interval": None, "fixed": True}
        for name, value in relation.fixed.items()
    }
    if relation.derived:
        for name, interval in _derived(relation, relation.derived, solved, level).items():
            value = relation.derived(point)[name]
            params[name] = {"value": value, "interval": interval, "derived": True}
    return params


def _derived(
    relation: Relation,
    derived: Callable[[Values], Mapping[str, float]],
    solved: RelationSolution,
    level: float,
) -> dict[str, list[float]]:
    """The wider interval of the derived quantities, from the two kinds of draws."""
    point = derived(values(relation, solved.vector))
    result = {name: [value, value] for name, value in point.items()}
    for drawn in (solved.draws, solved.t_draws):
        rows = [derived(values(relation, draw)) for draw in drawn]
        for name, value in point.items():
            low, high = quantiles([row[name] for row in rows], value, level)
            result[name] = [min(low, result[name][0]), max(high, result[name][1])]
    return result


def uncertain_parameters(
    relation: Relation, solved: RelationSolution, intervals: Intervals
) -> list[str]:
    """A sentence for each parameter that is poorly constrained or at the end of its range."""
    warnings = []
    for name, at in zip(relation.free, solved.vector, strict=True):
        box, (low, high) = relation.parameters[name], intervals[name]
        width = math.log(high / low) if box.log else (high - low) / max(abs(at), 1e-12)
        if not box.log and high - low < NARROW * (box.high - box.low):
            width = 0.0
        more = f"add rows over a wider range of `{relation.along}`"
        if at_bound(relation, name, at):
            warnings.append(
                f"`{name}` is at the end of its search range, {box.low:g} to {box.high:g}, so its "
                f"value is a bound; {more}"
            )
        elif low <= box.low * (1 + 1e-9) or high >= box.high * (1 - 1e-9):
            warnings.append(
                f"`{name}` is not bounded by the data: its interval, [{low:.3g}, {high:.3g}], "
                f"reaches the end of its search range; {more}"
            )
        elif not box.at_origin and width > WIDE_INTERVAL:
            warnings.append(
                f"`{name}` is poorly constrained: its interval is [{low:.3g}, {high:.3g}]; {more}"
            )
    return warnings


def at_bound(relation: Relation, name: str, at: float) -> bool:
    """Whether a parameter, as the solver has it, is at the end of its search range."""
    low, high = (solver_bound(relation.parameters[name], end) for end in ("low", "high"))
    return bool(min(at - low, high - at) < 1e-3 * (high - low))
