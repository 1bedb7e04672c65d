"""Reads the rows that a relation uses from a table, and records why the others are dropped.

Rows are sorted by their values, so that a fit does not depend on the order of the table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd

from scaletune.errors import UserError, nearest
from scaletune.fitting.loss.tuned_runs import DUPLICATE, MAY_DIFFER, MUST_MATCH
from scaletune.fitting.missing_columns import map_options
from scaletune.fitting.relations.relation import Array, Relation, RelationColumn
from scaletune.fitting.table import SAME_SCALE, STATUSES, levels, unfinished_reason

SCALES = ("n_params", "n_params_total", "tokens", "unique_tokens", "flops", "batch_tokens", "steps")
"""Columns of which values that differ by less than 1 % are one value."""
MAX_SPREAD = 1.03
"""Factor that the values of one scale span at most if each is within 1 % of the next."""
PLAUSIBLE_FLOPS = (0.2, 5.0)
"""Range of flops / (6 * n_params * tokens) outside which the unit of a column is doubtful."""
DATA_COLUMNS = ("train_dataset", "dataset")


@dataclass(frozen=True)
class RelationRows:
    """The rows that a relation is fitted to."""

    table: pd.DataFrame
    """Usable rows, sorted; `id` is unique."""

    dropped: dict[str, str] = field(default_factory=dict)
    """Id of a row that is not used -> the reason."""

    assumptions: list[str] = field(default_factory=list)
    """How missing columns were computed."""

    warnings: list[str] = field(default_factory=list)
    """Doubts about the values of the table."""


def read_rows(table: pd.DataFrame, relation: Relation) -> RelationRows:
    """Checks the columns that a relation reads, and sorts the usable rows.

    Runs that did not finish and rows without an output are dropped with the reason.

    Raises:
        UserError: The table is empty, columns are missing, an input has invalid values, no row is
            usable, or the losses are not comparable.
    """
    if not len(table):
        raise UserError(f"{relation.id} needs at least one row, but the table is empty")
    rows = table.reset_index(drop=True)
    names_runs = "id" in rows and bool(rows["id"].duplicated().any())
    if (relation.curves or relation.labels) and "run_id" not in rows and names_runs:
        rows = rows.assign(run_id=rows["id"])
    rows = rows.assign(id=_unique_ids(rows))
    rows, assumptions = _complete(rows, relation)
    _require_columns(rows, table, relation)
    dropped = _without_values(rows, relation) | _unfinished(rows)
    rows = rows[~rows["id"].isin(list(dropped))]
    if rows.empty:
        raise UserError(
            f"{relation.id} needs at least one usable row, but all are dropped: "
            f"{join_reasons(dropped.values())}"
        )
    numeric = {column.name: numbers(rows, column) for column in relation.columns}
    rows = rows.assign(**numeric)
    if relation.output.name == "loss" and not relation.curves:
        repeated = rows.duplicated(_values(rows))
        dropped |= dict.fromkeys(rows.loc[repeated, "id"], DUPLICATE)
        rows = rows[~repeated]
    warnings = [*_mixed_runs(rows, relation), *_doubtful_units(rows), *_repeats(dropped)]
    return RelationRows(_sort(rows, relation), dropped, assumptions, warnings)


def _values(rows: pd.DataFrame) -> list[str]:
    """The columns with plain values, without the id and the message."""
    return [
        str(name)
        for name in rows
        if name not in ("id", "message")
        and not rows[name].map(lambda value: isinstance(value, dict | list)).any()
    ]


def _unique_ids(rows: pd.DataFrame) -> pd.Series:
    """`id`, else `run_id`, else the row number; a repeated id gets its row number appended."""
    numbered = pd.Series([f"row{i}" for i in range(len(rows))], index=rows.index)
    name = next((name for name in ("id", "run_id") if name in rows), None)
    if name is None:
        return numbered
    ids = rows[name].astype(str)
    return ids.where(~ids.duplicated(keep=False), ids + " " + numbered)


def _complete(rows: pd.DataFrame, relation: Relation) -> tuple[pd.DataFrame, list[str]]:
    """Adds `flops` = 6 * n_params * tokens, `run_id` and defaults where they are missing."""
    assumptions = []
    names = {column.name for column in relation.columns}
    if "flops" in names and "flops" not in rows and {"n_params", "tokens"} <= set(rows):
        n, d = (pd.to_numeric(rows[name], errors="coerce") for name in ("n_params", "tokens"))
        rows = rows.assign(flops=6.0 * n.astype(float) * d.astype(float))
        assumptions.append(
            "`flops` is missing and computed as 6 * n_params * tokens; if a column holds the "
            "budget, name it: --map flops=NAME"
        )
    for column in relation.columns:
        if column.name not in rows and column.default is not None:
            rows = rows.assign(**{column.name: column.default})
    return rows, assumptions


def _require_columns(rows: pd.DataFrame, table: pd.DataFrame, relation: Relation) -> None:
    """Reports all missing columns at once."""
    missing = [column for column in relation.columns if column.name not in rows]
    labels = [name for name in relation.labels if name not in rows]
    if not missing and not labels:
        return
    names = [f"`{column.name}` ({column.description})" for column in missing]
    names += [f"`{name}`" for name in labels]
    noun = "a column" if len(names) == 1 else "columns"
    other = ""
    if any(column.name == "flops" for column in missing) and "tokens" not in rows:
        other = "; `flops` can be computed from `n_params` and `tokens`"
    raise UserError(
        f"{relation.id} needs {noun} {' and '.join(names)}, but the columns are: "
        f"{', '.join(map(str, table.columns))}{other}; name columns of your own: "
        f"{map_options(table, [*(column.name for column in missing), *labels])}"
    )


def _unfinished(rows: pd.DataFrame) -> dict[str, str]:
    """{id: reason} of the runs whose status is not "done"."""
    if "status" not in rows:
        return {}
    status = rows["status"].fillna("done").astype(str)
    unknown = sorted(set(status) - set(STATUSES))
    if unknown:
        raise UserError(
            f"the status of a run must be one of {', '.join(STATUSES)}, "
            f"but got {unknown[0]!r}{nearest(unknown[0], STATUSES)}"
        )
    message = rows["message"].fillna("").astype(str) if "message" in rows else [""] * len(rows)
    return {
        run: unfinished_reason(state, why)
        for run, state, why in zip(rows["id"], status, message, strict=True)
        if state != "done"
    }


def _without_values(rows: pd.DataFrame, relation: Relation) -> dict[str, str]:
    """{id: reason} of the rows that lack an input, or whose output is not a finite number."""
    reasons: dict[str, str] = {}
    for column in relation.columns:
        empty = rows[column.name].isna()
        reasons |= dict.fromkeys(rows.loc[empty, "id"], f"`{column.name}` is missing")
    output = relation.output.name
    values = pd.to_numeric(rows[output], errors="coerce").to_numpy(float)
    for run, given, number in zip(rows["id"], rows[output], values, strict=True):
        if run not in reasons and not np.isfinite(number):
            shown = repr(given) if isinstance(given, str) else "infinite"
            reasons[run] = f"`{output}` is {shown}, not a number"
    return reasons


def numbers(rows: pd.DataFrame, column: RelationColumn) -> Array:
    """A column as numbers; UserError if a value is not one, or must be above 0 and is not."""
    values = pd.to_numeric(rows[column.name], errors="coerce").to_numpy(float)
    bad = ~np.isfinite(values) | ((values <= 0) & column.positive)
    if bad.any():
        rule = "a number above 0" if column.positive else "a number"
        i = int(bad.argmax())
        given = rows[column.name].iloc[i]
        shown = repr(given) if isinstance(given, str) else f"{values[i]:g}"
        row, run = rows.index[i], rows["id"].iloc[i] if "id" in rows else f"row{rows.index[i]}"
        name = f"row {row}" if run == f"row{row}" else f"row {row} ({run})"
        raise UserError(f"`{column.name}` must be {rule} in every row, but {name} has {shown}")
    return values


def _mixed_runs(rows: pd.DataFrame, relation: Relation) -> list[str]:
    """Warnings about columns that make losses incomparable; UserError where none can be used."""
    if relation.output.name != "loss":
        return []
    fatal = (*MUST_MATCH, *(DATA_COLUMNS if relation.compares_sizes else ()))
    warnings = []
    for column in (*MUST_MATCH, *MAY_DIFFER):
        if column in relation.groups or column not in rows or rows[column].nunique() < 2:
            continue
        shown = ", ".join(repr(value) for value in sorted(map(str, rows[column].dropna().unique())))
        if column in fatal:
            raise UserError(
                f"{relation.id} needs runs with one `{column}`, but got {shown}: their losses are "
                "not comparable; fit each value separately"
            )
        warnings.append(
            f"`{column}` differs between runs ({shown}), but one law is fitted to all of them; fit "
            "each value separately if their losses are not comparable"
        )
    return warnings


def _doubtful_units(rows: pd.DataFrame) -> list[str]:
    if not {"flops", "n_params", "tokens"} <= set(rows):
        return []
    columns = [
        pd.to_numeric(rows[name], errors="coerce") for name in ("flops", "n_params", "tokens")
    ]
    flops, n_params, tokens = (column.to_numpy(float) for column in columns)
    with np.errstate(all="ignore"):
        ratio = float(np.nanmedian(flops / (6 * n_params * tokens)))
    low, high = PLAUSIBLE_FLOPS
    if not np.isfinite(ratio) or low <= ratio <= high:
        return []
    return [
        f"`flops` is {ratio:.3g} times 6 * n_params * tokens: check that all three are counts, "
        "not millions or billions"
    ]


def _repeats(dropped: dict[str, str]) -> list[str]:
    n = sum(reason == DUPLICATE for reason in dropped.values())
    return [f"{n} row{'s' if n > 1 else ''} with the same values as another one dropped"] * bool(n)


def _sort(rows: pd.DataFrame, relation: Relation) -> pd.DataFrame:
    """Sorts by run and step if the relation reads whole runs, else by all values and the id."""
    if relation.prepare:
        if "run_id" not in rows:
            return rows.reset_index(drop=True)
        by = ["run_id", relation.along]
        return rows.assign(run_id=rows["run_id"].astype(str)).sort_values(
            by, kind="stable", ignore_index=True
        )
    by = [*(column.name for column in relation.columns), "id"]
    return rows.sort_values(by, kind="stable", ignore_index=True)


def scale_levels(values: Array) -> np.ndarray:
    """The number of each value's scale, from the lowest.

    A gap of more than 1 % separates two scales. Where this gives a scale that spans more than
    MAX_SPREAD, so that the values vary freely, a scale starts every 1 %.
    """
    ordered = np.unique(values)
    gaps = np.concatenate([[False], ordered[1:] > SAME_SCALE * ordered[:-1]])
    number = np.cumsum(gaps)
    firsts, lasts = (
        ordered[np.searchsorted(number, np.arange(number[-1] + 1), side=side) - (side == "right")]
        for side in ("left", "right")
    )
    if (lasts > MAX_SPREAD * firsts).any():
        return levels(values)
    return number[np.searchsorted(ordered, values)]


def split_groups(
    rows: pd.DataFrame, relation: Relation
) -> tuple[list[tuple[dict[str, Any], pd.DataFrame]], dict[str, str]]:
    """Groups of rows that are fitted separately, with their keys, and {id: reason} of the rest.

    The key of a scale is its median.
    """
    names = [name for name in relation.groups if name in rows]
    if not names:
        return [({}, rows)], {}
    absent = rows[names].isna().any(axis=1)
    dropped = {
        run: f"`{next(name for name in names if pd.isna(row[name]))}` is missing"
        for run, (_, row) in zip(rows.loc[absent, "id"], rows[absent].iterrows(), strict=True)
    }
    rows = rows[~absent]
    if rows.empty:
        raise UserError(
            f"{relation.id} needs `{names[0]}` in at least one row, but it is missing in all"
        )
    keys = {name: _group_keys(rows, name) for name in names}
    groups = []
    for values, group in rows.groupby([keys[name] for name in names], sort=True):
        plain = [getattr(value, "item", lambda value=value: value)() for value in values]
        groups.append((dict(zip(names, plain, strict=True)), group.reset_index(drop=True)))
    return groups, dropped


def _group_keys(rows: pd.DataFrame, name: str) -> pd.Series:
    if name not in SCALES:
        return rows[name]
    values = numbers(rows, RelationColumn(name, ""))
    number = pd.Series(scale_levels(values), index=rows.index)
    return pd.Series(values, index=rows.index).groupby(number).transform("median")


def join_reasons(reasons: Sequence[str] | Any, most: int = 3) -> str:
    """The distinct reasons with their counts, the most frequent first."""
    counts = pd.Series(list(reasons)).value_counts()
    shown = [
        f"{reason} ({n}x)" if n > 1 else str(reason) for reason, n in counts.head(most).items()
    ]
    more = f"; and {len(counts) - most} other reasons" if len(counts) > most else ""
    return "; ".join(shown) + more
