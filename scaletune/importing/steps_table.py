"""Tables with one row per logged step, reduced to one row per run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletune.importing.columns import IDS
from scaletune.importing.logged_rows import COUNTERS, MODELS, NOT_STEPS, doubt_rows, find_runs
from scaletune.importing.missed_peak import missed_peaks
from scaletune.importing.names import canonical, find_names, is_loss, is_lr
from scaletune.importing.run import CALLS, LAST, STEPS, RunTable, not_finite
from scaletune.records import COLUMNS
from scaletune.records.expressions import map_column

if TYPE_CHECKING:
    import pandas as pd

CALL_COUNTERS = ("_step", "training_iteration")
"""Counters of log calls: equal to the iteration only if the program passes it."""
METRICS, VALUES = ("metric", "metric_name", "key", "tag", "variable"), ("value", "metric_value")
"""Columns of a table with one row per logged value."""
DENSE = 0.9  # share of rows with a loss from which a missing last loss means NaN
RUN = "_run"
SPREAD = "the table has one row per logged value: each metric is read as a column"
CLOCKS = ("timestamp", "time", "wall_time", "date", "relative_time")


def reduce_to_runs(
    table: pd.DataFrame, name: str, columns: Mapping[str, str] | None = None
) -> RunTable | None:
    """One row per run of a table with one row per logged step; None if it is a table of runs.

    Args:
        table: The rows as the file has them.
        name: Name for the run of a file that holds one run.
        columns: Columns that the user names, as in `scaletune.importing.trials`. They tell what a
            row is, and that the peak of a column such as `eta` is wanted.

    Raises:
        UserError: The rows are logged steps, but nothing tells the runs apart.
    """
    if (wide := _spread_metrics(table)) is not None:
        table = wide
    named = {key: map_column(table, text, key) for key, text in (columns or {}).items()}
    given, table = table, table.assign(**named)
    rows = find_runs(table)
    if rows is None:
        doubts = doubt_rows(table)
        notes = [SPREAD] if wide is not None else []
        return RunTable(given, notes=notes, warnings=doubts) if notes or doubts else None
    runs, counter, reason = rows
    table = table.assign(**{RUN: runs.astype(str).where(runs.astype(str) != "", name)})
    reduced = _reduce(table, counter)
    history = frozenset(str(column) for column in reduced.attrs["varying"])
    note = (
        f"the table has one row per logged step (`{counter}`): {len(table)} rows are"
        f" {len(reduced)} runs, {reason}"
    )
    warnings = missed_peaks(_lr_histories(table, counter, history))
    return RunTable(reduced, history, True, [note], warnings, mapped=frozenset(named))


def _spread_metrics(table: pd.DataFrame) -> pd.DataFrame | None:
    """One column per metric of a table with the columns metric and value; None for others."""
    metrics, values = find_names(table.columns, METRICS), find_names(table.columns, VALUES)
    if not metrics or not values or table[metrics[0]].dtype.kind in "iuf":
        return None
    if set(table[metrics[0]].dropna()) & set(map(str, table.columns)):
        return None
    names = [str(name) for name in table if name not in (metrics[0], values[0])]
    kept = find_names(names, (*IDS, *MODELS, *COUNTERS, "seed", *COLUMNS))
    kept += [name for name in names if name not in kept and name[:1] != "_"]
    kept = [name for name in kept if "Unnamed" not in name and canonical(name) not in CLOCKS]
    wide = (
        table.pivot_table(
            values[0], kept, metrics[0], aggfunc="last", dropna=False, sort=False, observed=True
        )
        if not table[kept].isna().any(axis=None)
        else None
    )
    return None if wide is None else wide.dropna(how="all").rename_axis(columns=None).reset_index()


def _lr_histories(
    table: pd.DataFrame, counter: str, history: frozenset[str]
) -> Iterator[dict[str, list[tuple[int, float]]]]:
    """The logged learning rates of each run; nothing if a setting gives the peak."""
    import pandas as pd

    names = [str(name) for name in table if is_lr(name)]
    if any(name not in history for name in names) or canonical(counter) in NOT_STEPS:
        return
    steps = pd.to_numeric(table[counter], errors="coerce")
    for name in names:
        rows = pd.DataFrame({"step": steps, "lr": pd.to_numeric(table[name], errors="coerce")})
        for _, group in rows.dropna().groupby(table[RUN]):
            yield {name: [(int(step), lr) for step, lr in group.itertuples(index=False)]}


def _reduce(table: pd.DataFrame, counter: str) -> pd.DataFrame:
    """The end of each column for each run, the peak of a learning rate, and the status."""
    import pandas as pd

    number = pd.to_numeric(table[counter], errors="coerce")
    order = [*find_names(table.columns, ("_timestamp", "timestamp", "time", "date"))[:1]]
    rows = table.assign(**{counter: number}).sort_values([counter, *order], kind="stable")
    groups = rows.groupby(RUN, sort=False)
    varying = (groups.nunique() > 1).any()
    ends: pd.DataFrame = groups.last()
    for name in [column for column in ends if varying.get(column, False) and is_lr(column)]:
        ends[name] = pd.to_numeric(rows[name], errors="coerce").groupby(rows[RUN]).max()
    ends = _mark_divergence(ends, rows)
    ends = pd.concat([ends, _progress(rows, counter)], axis=1)
    ends = ends.rename_axis(RUN).reset_index()
    if not ends.get("id", pd.Series(dtype=str)).is_unique or "id" not in ends:
        ends["id"] = ends[RUN]
    ends = ends.drop(columns=RUN)
    ends.attrs["varying"] = [column for column in varying.index if varying[column]]
    return ends


def _progress(rows: pd.DataFrame, counter: str) -> pd.DataFrame:
    """The last step of each run, and the last step of each loss."""
    import pandas as pd

    columns: dict[str, Any] = {}
    last = rows.groupby(RUN, sort=False)[counter].max()
    if canonical(counter) not in NOT_STEPS:
        columns[CALLS if _counts_calls(rows, counter) else STEPS] = last
        for name in [column for column in rows if is_loss(column)]:
            known = rows[rows[name].notna()]
            columns[f"{LAST}{name}"] = known.groupby(RUN, sort=False)[counter].max()
    return pd.DataFrame(columns, index=last.index)


def _counts_calls(rows: pd.DataFrame, counter: str) -> bool:
    """Whether a counter of log calls has no gaps, so that it may not be the iteration."""
    if canonical(counter) not in CALL_COUNTERS:
        return False
    spans = rows.groupby(RUN)[counter].agg(["min", "max", "nunique"])
    return bool((spans["max"] - spans["min"] + 1 == spans["nunique"]).all())


def _mark_divergence(ends: pd.DataFrame, rows: pd.DataFrame) -> pd.DataFrame:
    """Status "diverged" where the last loss of a run is not finite.

    A missing value at the end is NaN if nearly every row before has the loss, and the last row has
    nothing that other rows lack, as a row of a final evaluation has.
    """
    import pandas as pd

    status = ends["status"].copy() if "status" in ends else pd.Series("done", index=ends.index)
    message = pd.Series("", index=ends.index)
    if "message" in ends:
        message = ends["message"].fillna("").astype(str)
    sparse = [name for name in rows if rows[name].notna().mean() < 0.5]
    final = rows.groupby(RUN, sort=False)[sparse].tail(1) if sparse else rows[[]]
    of_run = rows.groupby(RUN, sort=False)[RUN].tail(1)
    evaluated = pd.Series(final.notna().any(axis=1).to_numpy(), index=of_run) if sparse else None
    for name in [column for column in rows if is_loss(column)]:
        losses = pd.to_numeric(rows[name], errors="coerce")
        groups = losses.groupby(rows[RUN], sort=False)
        infinite = ~np.isfinite(groups.last()) & groups.last().notna()
        is_nan = _ends_missing(losses, rows[RUN])
        if evaluated is not None:
            is_nan &= ~evaluated.reindex(is_nan.index)
        diverged = (is_nan | infinite).reindex(ends.index, fill_value=False)
        message = message.mask(diverged, not_finite(str(name)))
        status = status.mask(diverged, "diverged")
    return ends.assign(status=status, message=message)


def _ends_missing(losses: pd.Series, run: pd.Series) -> pd.Series:
    """Whether the last loss of a run is missing, and nearly all before the missing ones are not."""
    known = losses.notna().groupby(run, sort=False)
    missing_after = losses[::-1].notna().groupby(run[::-1], sort=False).cumsum() == 0
    trailing = missing_after.groupby(run[::-1], sort=False).sum().reindex(known.sum().index)
    logged = known.sum()
    return (trailing > 0) & (logged > 0) & (logged >= DENSE * (known.size() - trailing))
