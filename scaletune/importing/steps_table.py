"""Tables with one row per logged step, reduced to one row per run.

A table has logged steps if a column that names runs repeats and, within each name, a counter of
steps does not: `run` and `step`. A table of runs in which several runs share a name, or which has
the last step of each run, is not changed. Without a column that names runs, rows with equal
settings are one run if their steps are evenly spaced.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from scaletune.errors import UserError
from scaletune.importing.columns import IDS
from scaletune.importing.missed_peak import missed_peaks
from scaletune.importing.names import canonical, find_names, is_loss, is_lr
from scaletune.importing.run import CALLS, LAST, STEPS, RunTable, not_finite

if TYPE_CHECKING:
    import pandas as pd

COUNTERS = (
    *("step", "_step", "steps", "iteration", "iter", "global_step", "train/global_step"),
    *("trainer/global_step", "training_iteration", "train_step", "tokens_seen", "train/step"),
    *("consumed_samples", "num_input_tokens_seen", "tokens", "n_tokens", "epoch", "update"),
)
"""Columns that count the steps of a run, the best first."""
CALL_COUNTERS = ("_step", "training_iteration")
"""Counters of log calls: equal to the iteration only if the program passes it."""
TOKEN_COUNTERS = ("tokens", "n_tokens", "tokens_seen", "num_input_tokens_seen", "consumed_samples")
NOT_STEPS = (*TOKEN_COUNTERS, "epoch")
"""Counters that are not numbers of steps."""
UNIQUE_IDS = ("id", "run_id", "trial_id", "run_uuid", "uuid")
"""Columns that name one run, where others may name a model or a group of runs."""
MANY_LOGS = 8  # rows per name from which they are taken for logged steps however they are spaced
MAX_REPEATS = 0.2  # share of (run, step) pairs that may occur twice, where a resumed run overlaps
MIN_LOGS = 4  # evenly spaced rows with equal settings that are taken for one run
DENSE = 0.9  # share of rows with a loss from which a missing last loss means NaN


def reduce_to_runs(table: pd.DataFrame, name: str) -> RunTable | None:
    """One row per run of a table with one row per logged step; None if it is a table of runs.

    Args:
        table: The rows as the file has them.
        name: Name for the run of a file that holds one run.

    Raises:
        UserError: The rows are logged steps, but nothing tells the runs apart.
    """
    rows = _find_runs(table)
    if rows is None:
        return None
    runs, counter, reason = rows
    table = table.assign(**{RUN: runs.astype(str).where(runs.astype(str) != "", name)})
    reduced = _reduce(table, counter)
    history = frozenset(str(column) for column in reduced.attrs["varying"])
    note = (
        f"the table has one row per logged step (`{counter}`): {len(table)} rows are"
        f" {len(reduced)} runs, {reason}"
    )
    warnings = missed_peaks(_lr_histories(table, counter, history))
    return RunTable(reduced, history, True, [note], warnings)


RUN = "_run"


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


def _find_runs(table: pd.DataFrame) -> tuple[pd.Series, str, str] | None:
    """(run of each row, counter, how runs are told apart), or None."""
    counters = [name for name in find_names(table.columns, COUNTERS) if _counts(table[name])]
    if not counters or len(table) < 2:
        return None
    names = find_names(table.columns, (*IDS, "seed"))
    ids = [name for name in names if canonical(name) != "seed" and not _numbers_rows(table[name])]
    if any(table[name].is_unique for name in ids):
        return None
    for run in ids:
        keys = [table[run].astype(str)]
        keys += [table[name].astype(str) for name in names if canonical(name) == "seed"][:1]
        for counter in counters:
            if _is_history(table, keys, counter):
                return _join(keys), counter, f"told apart by `{run}`"
    return None if ids else _find_unnamed(table, counters)


def _counts(values: pd.Series) -> bool:
    """Whether a column holds more than one number of 0 or more."""
    import pandas as pd

    numbers = pd.to_numeric(values, errors="coerce")
    return bool(numbers.notna().mean() > 0.5 and numbers.min() >= 0 and numbers.nunique() > 1)


def _numbers_rows(values: pd.Series) -> bool:
    """Whether a column only numbers the rows."""
    return values.dtype.kind in "iu" and values.is_unique and len(values) > 1


def _join(keys: list[pd.Series]) -> pd.Series:
    joined = keys[0]
    for key in keys[1:]:
        if key.groupby(keys[0]).nunique().max() > 1:
            joined = joined + "#" + key
    return joined


def _is_history(table: pd.DataFrame, keys: list[pd.Series], counter: str) -> bool:
    """Whether the counter takes different values within each run, and runs have several rows.

    A column such as `name` may name a model that was trained for several budgets, so its steps must
    be evenly spaced or many. An id names one run, which may be there twice if it was resumed.
    """
    import pandas as pd

    groups = pd.to_numeric(table[counter], errors="coerce").groupby(keys)
    sizes, different = groups.size(), groups.nunique()
    several = sizes > 1
    if not several.any():
        return False
    if different[several].sum() < (1 - MAX_REPEATS) * sizes[several].sum():
        return False
    is_step = canonical(counter) not in NOT_STEPS
    if is_step and canonical(keys[0].name) in UNIQUE_IDS:
        return True
    return bool((is_step and sizes.mean() >= MANY_LOGS) or groups.agg(_evenly_spaced).mean() > 0.5)


def _find_unnamed(table: pd.DataFrame, counters: list[str]) -> tuple[pd.Series, str, str] | None:
    """Runs of a table without names: rows with equal settings and evenly spaced steps."""
    import pandas as pd

    counter = next((name for name in counters if canonical(name) not in TOKEN_COUNTERS), None)
    if counter is None:
        return None
    settings = _settings(table)
    keys = [table[name].astype(str) for name in settings] or [
        pd.Series("", index=table.index, dtype=str)
    ]
    groups = pd.to_numeric(table[counter], errors="coerce").groupby(keys)
    spaced = groups.agg(_evenly_spaced)
    if not spaced.mean() > 0.5:
        return None
    if any(values.duplicated().mean() > MAX_REPEATS for _, values in groups):
        raise UserError(
            f"the rows are logged steps (`{counter}`), but several runs have the same settings and"
            " no column tells them apart: add a column `run_id`"
        )
    by = ", ".join(f"`{name}`" for name in settings)
    joined = keys[0]
    for key in keys[1:]:
        joined = joined + ", " + key
    return joined, counter, f"told apart by {by}" if settings else "since the file holds one run"


def _settings(table: pd.DataFrame) -> list[str]:
    """Columns that take few values, other than counters and losses."""
    counters = find_names(table.columns, COUNTERS)
    return [
        str(name)
        for name in table
        if name not in counters
        and not is_loss(name)
        and not str(name).startswith("_")
        and table[name].notna().all()
        and table[name].nunique() <= max(len(table) // MIN_LOGS, 1)
        and (table[name].nunique() > 1)
    ]


def _evenly_spaced(values: pd.Series) -> bool:
    """Whether the different values of a counter are an arithmetic series."""
    steps = np.diff(np.unique(values.dropna()))
    if len(steps) < MIN_LOGS - 1:
        return False
    return bool(np.mean(np.abs(steps - np.median(steps)) <= 0.01 * np.median(steps)) >= 0.75)


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
