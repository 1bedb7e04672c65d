"""Tells logged steps from runs: which rows of a table belong to one run.

A table has logged steps if a column that names runs repeats and, within each name, a counter of
steps does not. A table of runs in which several runs share a name, or which has the last step of
each run, is a table of runs. Without a column that names runs, rows with equal settings are one run
if their steps are evenly spaced.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from scaletune.errors import UserError
from scaletune.importing.columns import IDS
from scaletune.importing.names import canonical, find_names, is_loss, is_lr

if TYPE_CHECKING:
    import pandas as pd

COUNTERS = (
    *("step", "_step", "steps", "iteration", "iter", "global_step", "train/global_step"),
    *("trainer/global_step", "training_iteration", "train_step", "tokens_seen", "train/step"),
    *("checkpoint", "checkpoint_step", "ckpt", "ckpt_step", "it", "iters", "training_step"),
    *("consumed_samples", "num_input_tokens_seen", "tokens", "n_tokens", "epoch", "update"),
)
"""Columns that count the steps of a run, the best first."""
TOKEN_COUNTERS = ("tokens", "n_tokens", "tokens_seen", "num_input_tokens_seen", "consumed_samples")
NOT_STEPS = (*TOKEN_COUNTERS, "epoch")
"""Counters that are not numbers of steps."""
UNIQUE_IDS = ("id", "run_id", "trial_id", "run_uuid", "uuid")
"""Columns that name one run, where others may name a model or a group of runs."""
CHECKPOINTS = ("checkpoint", "checkpoint_step", "ckpt", "ckpt_step")
"""Counters that no table of runs has."""
MODELS = ("model", "model_name", "exp", "config", "config_name")
"""Columns that may name runs in a table without any other name."""
MANY_LOGS = 8  # rows per name from which they are taken for logged steps however they are spaced
MAX_REPEATS = 0.2  # share of (run, step) pairs that may occur twice, where a resumed run overlaps
MIN_LOGS = 4  # evenly spaced rows with equal settings that are taken for one run


def find_runs(table: pd.DataFrame) -> tuple[pd.Series, str, str] | None:
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
    if ids:
        return None
    models = [name for name in find_names(table.columns, MODELS) if not table[name].is_unique]
    for run in models:
        for counter in counters:
            if _is_history(table, [table[run].astype(str)], counter):
                return table[run].astype(str), counter, f"told apart by `{run}`"
    return _find_unnamed(table, counters)


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
    if canonical(counter) in CHECKPOINTS:
        return True
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
        _require_names(table, counter, settings)
        return None
    if any(values.duplicated().mean() > MAX_REPEATS for _, values in groups):
        raise UserError(NO_NAMES.format(counter))
    by = ", ".join(f"`{name}`" for name in settings)
    joined = keys[0]
    for key in keys[1:]:
        joined = joined + ", " + key
    return joined, counter, f"told apart by {by}" if settings else "since the file holds one run"


def _require_names(table: pd.DataFrame, counter: str, settings: list[str]) -> None:
    """UserError if the rows, in their order, are evenly spaced steps that start again and again.

    Several runs have the same settings then, and nothing tells them apart.
    """
    import pandas as pd

    steps = pd.to_numeric(table[counter], errors="coerce")
    restarts = steps.diff() <= 0
    for name in settings:
        restarts |= table[name].ne(table[name].shift())
    series = steps.groupby(restarts.cumsum())
    spaced, gaps = series.agg(_evenly_spaced), series.agg(lambda part: part.diff().median())
    logged = spaced & (series.first() <= 1.5 * gaps)
    if logged.mean() > 0.5:
        raise UserError(NO_NAMES.format(counter))


NO_NAMES = (
    "the rows are logged steps (`{}`), but several runs have the same settings and"
    " no column tells them apart: add a column `run_id`"
)


def doubt_rows(table: pd.DataFrame) -> list[str]:
    """A warning if rows of one name differ in nothing but a counter, the tokens and the loss."""
    import pandas as pd

    counters = [name for name in find_names(table.columns, COUNTERS) if _counts(table[name])]
    names = [
        name
        for name in find_names(table.columns, (*IDS, *MODELS))
        if table[name].nunique() > 1 and len(table) >= MIN_LOGS * table[name].nunique()
    ]
    for name in names:
        groups = table.groupby(name, sort=False)
        columns = [str(column) for column in table if column != name]
        varying = [column for column in columns if (groups[column].nunique() > 1).mean() > 0.5]
        if not set(varying) & set(counters):
            continue
        counter = next(column for column in counters if column in varying)
        ordered = table.sort_values(counter, kind="stable").groupby(name, sort=False)
        others = [column for column in varying if column != counter and not is_loss(column)]
        if any(is_lr(column) for column in others):
            continue
        numbers = all(pd.api.types.is_numeric_dtype(table[column]) for column in others)
        monotone = numbers and all(
            (
                ordered[column].agg(
                    lambda part: part.is_monotonic_increasing or (part.is_monotonic_decreasing)
                )
            ).mean()
            > 0.8
            for column in others
        )
        one_per_step = groups[counter].nunique().sum() == groups.size().sum()
        if monotone and one_per_step:
            return [
                f"the rows of one `{name}` differ in `{counter}` and the loss only: they are taken"
                " for different runs; if they are logged steps of one run, name the column `run_id`"
            ]
    return []


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
