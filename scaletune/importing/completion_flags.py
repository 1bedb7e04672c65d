"""Columns of a runs table that say by a flag or a share whether each run finished.

People's own tables have `finished`, `crashed`, `exit_code` or `progress` instead of a state.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from scaletune.importing.names import find_names
from scaletune.importing.run import RunTable
from scaletune.records import FINISHED_SHARE

if TYPE_CHECKING:
    import pandas as pd

FINISHED_FLAGS = (
    *("finished", "is_finished", "completed", "is_completed", "complete", "is_complete"),
    *("done", "is_done", "succeeded", "success", "run_finished", "run_completed"),
)
FAILED_FLAGS = (
    *("crashed", "is_crashed", "failed", "is_failed", "killed", "preempted", "interrupted"),
    *("aborted", "timeout", "timed_out", "oom", "early_stopped", "stopped_early"),
)
DIVERGED_FLAGS = ("diverged", "is_diverged", "has_diverged", "is_nan", "has_nan", "nan_loss")
EXIT_CODES = ("exit_code", "exitcode", "return_code", "returncode", "exit_status")
SHARES = (
    *("progress", "progress_pct", "percent_done", "percent_complete", "pct_complete"),
    *("fraction_done", "fraction_complete", "completion"),
)
TRUE, FALSE = ("true", "yes", "y", "1", "1.0", "t"), ("false", "no", "n", "0", "0.0", "f")


def read_flags(runs: RunTable) -> RunTable:
    """The runs with `status` and `message` from the columns that flag their end.

    Values that were logged are left out: their last one is that of a step, and not of the run.
    """
    table = runs.table
    settings = [name for name in map(str, table.columns) if name not in runs.history]
    if "training_iteration" in settings:  # Ray Tune: its `done` is that of the last report
        settings = [name for name in settings if name != "done"]
    for names, failing, status in (
        (FINISHED_FLAGS, False, "failed"),
        (FAILED_FLAGS, True, "failed"),
        (DIVERGED_FLAGS, True, "diverged"),
    ):
        for name in find_names(settings, names):
            if (flags := _flags(table[name])) is not None:
                reason = f"its `{name}` is {str(failing).lower()}"
                table = _mark(table, flags == failing, status, reason)
    for name in find_names(settings, EXIT_CODES):
        codes = _numbers(table[name])
        table = _mark(table, codes.notna() & (codes != 0), "failed", f"its `{name}` is not 0")
    for name in find_names(settings, SHARES):
        shares = _numbers(table[name])
        whole = next((full for full in (1, 100) if 0.5 * full < shares.max() <= 1.01 * full), None)
        if whole:
            reason = f"unfinished: its `{name}` is below {whole}"
            table = _mark(table, shares < FINISHED_SHARE * whole, "failed", reason)
    return replace(runs, table=table)


def _flags(values: pd.Series) -> pd.Series | None:
    """True and False of a column that holds nothing else; a missing one is missing."""
    words = values.dropna().astype(str).str.strip().str.lower()
    if not len(words) or not words.isin((*TRUE, *FALSE)).all():
        return None
    return words.isin(TRUE).reindex(values.index)


def _numbers(values: pd.Series) -> pd.Series:
    import pandas as pd

    numbers = values.astype(str).str.strip().str.removesuffix("%")
    return pd.to_numeric(numbers, errors="coerce").astype(float)


def _mark(table: pd.DataFrame, rows: pd.Series, status: str, reason: str) -> pd.DataFrame:
    """The table with a status and its reason in some rows that count as finished."""
    if not rows.any():
        return table
    table = table.assign(status=table.get("status", "done"), message=table.get("message", ""))
    rows &= table["status"].fillna("done") == "done"
    table.loc[rows, "status"] = status
    table.loc[rows, "message"] = reason
    return table
