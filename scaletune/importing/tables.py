"""Tables that other tools write: the three kinds of CSV that W&B exports, and JSON lines."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

STATES = {
    "finished": "done",
    "failed": "failed",
    "crashed": "failed",
    "killed": "failed",
    "preempted": "failed",
    "running": "failed",
}
"""The trial status for each state of a W&B run."""
SPREAD = ("__MIN", "__MAX")
"""Ends of the extra columns in the export of a W&B chart."""
TRIAL_KEYS = {"point", "sweep"}
"""Keys that only the records of scaletune have."""


def read_json_lines(path: Path) -> pd.DataFrame:
    """One run per line. Settings of a nested object become columns `table.key`."""
    import pandas as pd

    return pd.json_normalize(_parse_lines(path))


def _parse_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file with one JSON object per line."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"every line of `{path}` must be JSON, but {error}") from None
    if bad := next((row for row in rows if not isinstance(row, dict)), None):
        raise UserError(f"every line of `{path}` must be an object, but got {str(bad)[:60]!r}")
    return rows


def is_foreign(path: Path) -> bool:
    """Whether a `.jsonl` file holds runs of another tool: no keys of a trial in its first line."""
    try:
        lines = path.read_text("utf-8").splitlines()
        first = json.loads(next((line for line in lines if line.strip()), "null"))
    except (OSError, ValueError):
        return False  # the reader of trials reports the error
    return isinstance(first, dict) and not TRIAL_KEYS & first.keys()


def read_wandb_export(table: pd.DataFrame, name: str) -> tuple[pd.DataFrame, bool]:
    """A CSV table with one row per run, and whether it holds only histories.

    W&B exports three kinds: a chart (`Step`, and for each run the columns `RUN - METRIC` with
    `__MIN` and `__MAX`), the history of one run (`_step` and a column per metric), and the table of
    runs (`Name`, `State`, ..., the config, the last value of each metric). Any other table is
    returned unchanged. `name` is the id for the history of one run.
    """
    columns = [str(column) for column in table.columns]
    if any(column + SPREAD[0] in columns for column in columns):
        return _read_chart(table, columns), True
    if "_step" in columns:
        return _read_history(table, name), True
    return (_read_runs(table), False) if {"Name", "State"} <= set(columns) else (table, False)


def _read_runs(table: pd.DataFrame) -> pd.DataFrame:
    """Adds `id` (the run's name, numbered if it occurs twice) and `status` (from the state)."""
    import pandas as pd

    unknown = sorted(set(table["State"].dropna().astype(str)) - set(STATES))
    if unknown:
        raise UserError(
            f"a W&B run's `State` must be one of {', '.join(STATES)}, but got {unknown[0]!r}"
        )
    names, repeat = table["Name"].astype(str), table.groupby("Name", dropna=False).cumcount()
    ids = names.where(repeat == 0, names + "#" + (repeat + 1).astype(str))
    status = table["State"].map(STATES).fillna("failed")
    columns = {"id": ids, "status": status}
    new = {name: value for name, value in columns.items() if name not in table}
    return pd.concat([pd.DataFrame(new), table], axis=1)


def _read_chart(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The last value of each run's metric, and its step if the chart is over steps."""
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    for column in columns[1:]:
        run, dash, metric = column.rpartition(" - ")
        values = table[[columns[0], column]].dropna()
        if not dash or column.endswith(SPREAD) or values.empty:
            continue
        row = rows.setdefault(run, {"id": run})
        row[metric] = values[column].iloc[-1]
        key = "steps" if columns[0] == "Step" else columns[0]
        row[key] = max(row.get(key, 0), values[columns[0]].iloc[-1])
    return pd.DataFrame(list(rows.values()))


def _read_history(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """One run with the last value of each metric."""
    import pandas as pd

    last = {
        str(column): values.iloc[-1] for column in table if len(values := table[column].dropna())
    }
    row = {"id": name, "steps": last.pop("_step")}
    return pd.DataFrame([row | {k: v for k, v in last.items() if not k.startswith("_")}])


def join_histories(runs: pd.DataFrame, histories: pd.DataFrame) -> pd.DataFrame:
    """The runs with the columns of their histories, matched by `id`.

    A value in a history has priority over one in the table of runs.
    """
    if "id" not in runs:
        raise UserError(
            "a W&B chart is joined to its runs by name, but the other records have no `id`: export"
            " the table of runs too"
        )
    unmatched = sorted(set(histories["id"]) - set(runs["id"].astype(str)))
    if unmatched:
        raise UserError(
            "every run of a W&B chart must be in the table of runs, but"
            f" {unmatched[0]!r} is not: export both from the same set of runs"
        )
    own = [column for column in runs if column == "id" or column not in histories]
    last = histories.groupby("id", as_index=False).last()
    return runs[own].assign(id=runs["id"].astype(str)).merge(last, on="id", how="left")
