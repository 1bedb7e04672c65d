"""Any relation, fitted: starts drawn over the boxes, robust least squares from the best of them, one-step resamples for the intervals.

Laws that the loss law's own solver covers are not here: this one knows nothing of a formula but how to evaluate it.
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
from scaletune.fitting.relations.relation import Array, Box, Column, Relation
from scaletune.records import Fit

STARTS, KEPT, DRAWS = 64, 3, 200
DRAWN = 1000  # rows that a record keeps, to be drawn
SLOW = 0.5  # seconds from which progress is shown
VAGUE = math.log(10.0)  # width, in ln of a parameter, from which the data hardly identify it


@dataclass(frozen=True)
class Solved:
    """Parameters as solved (ln where the box says so), their covariance, resamples of them, and the spread about the curve."""

    vector: Array
    covariance: Array
    draws: Array
    scatter: float  # robust sd of the residuals
    dof: int


def columns_of(
    table: pd.DataFrame, relation: Relation
) -> tuple[dict[str, Array], Array, pd.DataFrame]:
    """(inputs, output, rows used): numbers checked, rows that are not finished or whose output is missing left out."""
    rows = table[table["status"].fillna("done") == "done"] if "status" in table else table
    rows = relation.reduce(rows) if relation.reduce else rows
    for column in (*relation.inputs, relation.output):
        if column.name not in rows:
            if column.default is None:
                raise UserError(
                    f"{relation.id} needs a column `{column.name}` ({column.means}), but the columns are: {', '.join(map(str, table.columns))}"
                )
            rows = rows.assign(**{column.name: column.default})
    rows = rows[pd.to_numeric(rows[relation.output.name], errors="coerce").notna()].reset_index(
        drop=True
    )
    found = {column.name: _numbers(rows, column) for column in (*relation.inputs, relation.output)}
    y = found.pop(relation.output.name)
    made = (
        {name: np.asarray(values) for name, values in relation.prepare(rows).items()}
        if relation.prepare
        else {}
    )
    return {**found, **made}, y, rows


def _numbers(rows: pd.DataFrame, column: Column) -> Array:
    values = pd.to_numeric(rows[column.name], errors="coerce").to_numpy(float)
    bad = ~np.isfinite(values) | ((values <= 0) & column.positive)
    if bad.any():
        rule = "a number above 0" if column.positive else "a number"
        said = rows[column.name].iloc[bad.argmax()]
        shown = repr(said) if isinstance(said, str) else f"{values[bad.argmax()]:g}"
        raise UserError(
            f"`{column.name}` must be {rule} in every row, but row {int(bad.argmax())} has {shown}"
        )
    return values


def solve(
    relation: Relation,
    x: Mapping[str, Array],
    y: Array,
    clusters: NDArray[Any] | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> Solved:
    """The relation through (x, y), [R] each. UserError when there are no more rows than parameters."""
    from scipy.optimize import least_squares

    free = [relation.parameters[name] for name in relation.free]
    if len(y) <= len(free):
        raise UserError(
            f"{relation.id} has {len(free)} parameters and needs more rows than that, but got {len(y)}: add values of `{relation.along}`"
        )
    low, high = (np.array([_inside(box, end) for box in free]) for end in ("low", "high"))

    def residuals(theta: Array) -> Array:
        return _off(relation, x, y, theta)

    starts = _starts(low, high, seed)
    costs = [float(np.square(np.clip(residuals(theta), -1e3, 1e3)).sum()) for theta in starts]
    best = None
    for i in tqdm(np.argsort(costs)[:KEPT], relation.id, delay=SLOW, disable=None, leave=False):
        found = least_squares(residuals, starts[i], bounds=(low, high), x_scale="jac", max_nfev=400)
        best = found if best is None or found.cost < best.cost else best
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
    again = [
        _stepped(best.x, jacobian[rows], best.fun[rows])
        for rows in _resampled(len(y), clusters, draws, seed)
    ]
    return Solved(
        best.x, covariance, np.clip(np.array(again).reshape(-1, len(free)), low, high), scatter, dof
    )


def _stepped(theta: Array, jacobian: Array, off: Array) -> Array:
    """One Gauss-Newton step towards the optimum of a resample, from the optimum of all rows."""
    return theta - np.linalg.lstsq(jacobian, off, rcond=1e-8)[0]


def _inside(box: Box, end: str) -> float:
    value = getattr(box, end)
    return math.log(value) if box.log else value


def _off(relation: Relation, x: Mapping[str, Array], y: Array, theta: Array) -> Array:
    with np.errstate(all="ignore"):
        said = np.asarray(relation.function(x, values(relation, theta)), float)
        off = np.log(np.maximum(said, 1e-300)) - np.log(y) if relation.log else said - y
    return np.nan_to_num(off, nan=1e3, posinf=1e3, neginf=-1e3)


def values(relation: Relation, theta: Array) -> dict[str, float]:
    """Parameter name -> value, from the solver's vector."""
    pairs = zip(relation.free, theta, strict=True)
    return {
        name: float(math.exp(v) if relation.parameters[name].log else v) for name, v in pairs
    } | dict(relation.known)


def _starts(low: Array, high: Array, seed: int) -> Array:
    from scipy.stats import qmc

    return (
        qmc.scale(qmc.Sobol(len(low), seed=seed).random(STARTS), low, high)
        if len(low)
        else np.zeros((1, 0))
    )


def _resampled(
    n: int, clusters: NDArray[Any] | None, draws: int, seed: int
) -> list[NDArray[np.int_]]:
    """Rows drawn with replacement, or whole clusters of them."""
    rng = np.random.default_rng(seed)
    if clusters is None or len(np.unique(clusters)) < 3:
        return [rng.integers(0, n, n) for _ in range(draws)]
    members = [np.flatnonzero(clusters == name) for name in np.unique(clusters)]
    return [
        np.concatenate([members[i] for i in rng.integers(0, len(members), len(members))])
        for _ in range(draws)
    ]


def fit_relation(table: pd.DataFrame, relation: Relation, *, level: float = 0.95) -> Fit:
    """The relation fitted to a table: one fit, or one a group (in `cells`) and, where there is one, the relation across them."""
    x, y, rows = columns_of(table, relation)
    groups = [name for name in relation.groups if name in rows]
    if not groups or len(rows[groups].drop_duplicates()) == 1:
        return _record(relation, x, y, rows, level)
    parts = [
        (tuple(key), relation.select(part) if relation.select else part)
        for key, part in rows.groupby(groups, sort=True)
    ]
    made = [
        (
            dict(zip(groups, key, strict=True)),
            _record(
                relation, {name: c[part.index] for name, c in x.items()}, y[part.index], part, level
            ),
        )
        for key, part in parts
    ]
    if relation.across is None or len(made) < 3:
        return _one_by_one(relation, made, rows, level)
    cells = [key | {name: p["value"] for name, p in each.params.items()} for key, each in made]
    outer = fit_relation(pd.DataFrame(cells), relation.across, level=level)
    return replace(
        outer,
        law=relation.id,
        cells=cells,
        used=_ids(rows),
        assumptions=[*_said_of(relation), *outer.assumptions],
    )


def _one_by_one(
    relation: Relation, made: list[tuple[dict[str, Any], Fit]], rows: pd.DataFrame, level: float
) -> Fit:
    """Groups that nothing goes across: the parameters of each as `E at method=best`, its solution in `cells`."""
    said = (
        [f"{len(made)} groups are fitted one by one: a relation across them needs 3"]
        if relation.across
        else []
    )
    said += [
        f"{_named(key)}: {sentence}"
        for key, each in made
        for sentence in each.status
        if sentence != "ok"
    ]
    return Fit(
        law=relation.id, solution={}, objective=sum(each.objective for _, each in made), level=level, status=said or ["ok"],
        params={f"{name} at {_named(key)}": p for key, each in made for name, p in each.params.items()},
        cells=[key | {name: p["value"] for name, p in each.params.items()} | {"solution": each.solution} for key, each in made],
        ranges={c.name: [float(f(rows[c.name])) for f in (min, max)] for c in relation.inputs if c.name in rows},
        used=_ids(rows), assumptions=_said_of(relation),
    )  # fmt: skip


def _named(key: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name}={value:g}" if isinstance(value, float) else f"{name}={value}"
        for name, value in key.items()
    )


def of_group(fit: Fit, relation: Relation, given: Mapping[str, Any]) -> Fit:
    """The fit of the one group that `given` names, of a fit of several one by one; any other as it is. UserError where there is none."""
    if fit.solution or not any("solution" in cell for cell in fit.cells):
        return fit
    keys = [{name: cell[name] for name in relation.groups if name in cell} for cell in fit.cells]
    found = next(
        (
            i
            for i, key in enumerate(keys)
            if all(given.get(name) == value for name, value in key.items())
        ),
        None,
    )
    if found is None:
        raise UserError(
            f"this fit of {fit.law!r} is of {len(keys)} groups one by one: name one of them, such as {_named(keys[0])}"
        )
    return replace(fit, solution=fit.cells[found]["solution"])


def _ids(rows: pd.DataFrame) -> list[str]:
    return list(rows["id"].astype(str)) if "id" in rows else [f"row{i}" for i in range(len(rows))]


def _said_of(relation: Relation) -> list[str]:
    return [f"{relation.formula} ({relation.source})"]


def _record(
    relation: Relation, x: Mapping[str, Array], y: Array, rows: pd.DataFrame, level: float
) -> Fit:
    clusters = (
        rows["run_id"].astype(str).to_numpy() if relation.curves and "run_id" in rows else None
    )
    found = solve(relation, x, y, clusters)
    intervals = _intervals(relation, found, level)
    point = values(relation, found.vector)
    params: dict[str, Any] = {
        name: {"value": point[name], "interval": intervals[name]} for name in relation.free
    }
    params |= {
        name: {"value": value, "interval": None, "fixed": True}
        for name, value in relation.known.items()
    }
    if relation.derived:
        follow = [relation.derived(values(relation, draw)) for draw in found.draws]
        for name, value in relation.derived(point).items():
            params[name] = {
                "value": value,
                "interval": _quantiles([f[name] for f in follow], value, level),
                "derived": True,
            }
    return Fit(
        law=relation.id, params=params, level=level, objective=float(np.square(_off(relation, x, y, found.vector)).sum()),
        solution={
            "values": point, "draws": [list(values(relation, draw).values()) for draw in found.draws], "scatter": found.scatter,
            "points": {name: column[:DRAWN].tolist() for name, column in (*x.items(), (relation.output.name, y))},
        },
        ranges={column.name: [float(x[column.name].min()), float(x[column.name].max())] for column in relation.inputs},
        used=_ids(rows),
        status=_doubts(relation, found, intervals) or ["ok"], assumptions=_said_of(relation),
    )  # fmt: skip


def _intervals(relation: Relation, found: Solved, level: float) -> dict[str, list[float]]:
    """The wider of the t interval from the covariance and the resamples' quantiles, of each parameter."""
    from scipy.stats import t

    half = t.ppf(0.5 + level / 2, found.dof) * np.sqrt(np.diag(found.covariance))
    result = {}
    for i, name in enumerate(relation.free):
        box, middle = relation.parameters[name], float(found.vector[i])
        low, high = _quantiles(list(found.draws[:, i]), middle, level)
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


def _doubts(relation: Relation, found: Solved, intervals: Mapping[str, list[float]]) -> list[str]:
    """A sentence for each parameter that the data hardly identify, or that lies on the edge of where it was looked for."""
    said = []
    for name, at in zip(relation.free, found.vector, strict=True):
        box, (low, high) = relation.parameters[name], intervals[name]
        ends = [_inside(box, "low"), _inside(box, "high")]
        if min(at - ends[0], ends[1] - at) < 1e-3 * (ends[1] - ends[0]):
            said.append(
                f"`{name}` lies at the end of the range it was looked for in, {box.low:g} to {box.high:g}: it is a bound"
            )
        elif (
            not box.far
            and (math.log(high / low) if box.log else (high - low) / max(abs(at), 1e-12)) > VAGUE
        ):
            said.append(
                f"the data hardly identify `{name}`, [{low:.3g}, {high:.3g}]: add rows over a wider range of `{relation.along}`"
            )
    return said


def solved_relation(fit: Fit, relation: Relation) -> Relation:
    """The relation whose parameters the fit holds: that of one group, or the one across several. UserError when it holds neither."""
    if not fit.solution:
        raise UserError(
            f"this fit of {fit.law!r} is of {len(fit.cells)} groups one by one: fit one group's rows to go on from them"
        )
    return (
        relation.across
        if relation.across and set(fit.solution["values"]) == set(relation.across.parameters)
        else relation
    )


def predict_relation(
    fit: Fit, relation: Relation, columns: Mapping[str, Any]
) -> dict[str, list[float]]:
    """{"value", "low", "high"} of the output at columns of equal length: quantiles of the resampled parameters, and the scatter about them.

    UserError for a fit of several groups that no relation goes across, and for a column that is missing or no number.
    """
    relation = solved_relation(fit, relation)
    if missing := next(
        (c.name for c in relation.inputs if c.name not in columns and c.default is None), None
    ):
        raise UserError(
            f"a fit of {fit.law!r} is asked by {', '.join(c.name for c in relation.inputs)}, but `{missing}` was not given"
        )
    rows = pd.DataFrame({name: np.atleast_1d(column) for name, column in columns.items()})
    x: dict[str, Any] = {str(name): rows[name].to_numpy() for name in rows}
    x |= {column.name: _numbers(rows, column) for column in relation.inputs if column.name in rows}
    if relation.prepare and "run" not in rows:
        x |= {
            name: np.asarray(values) for name, values in relation.prepare(rows.assign(**x)).items()
        }
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
    scatter = (
        NormalDist().inv_cdf((1 + fit.level) / 2)
        * fit.solution["scatter"]
        * (point if relation.log else 1.0)
    )
    below, above = (
        np.hypot(np.maximum(point - low, 0), scatter),
        np.hypot(np.maximum(high - point, 0), scatter),
    )
    return {
        "value": point.tolist(),
        "low": (point - below).tolist(),
        "high": (point + above).tolist(),
    }
