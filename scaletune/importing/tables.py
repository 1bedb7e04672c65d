"""Tables that other tools write: W&B's three kinds of CSV, and lines of JSON that are no trials of ours."""

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
SPREAD = ("__MIN", "__MAX")  # beside each column of a chart's export
OURS = {"point", "sweep"}  # keys of a trial that no one else's line has


def json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; UserError on a line that is none."""
    try:
        rows = [json.loads(line) for line in path.read_text("utf-8").splitlines() if line.strip()]
    except ValueError as error:
        raise UserError(f"every line of `{path}` must be JSON, but {error}") from None
    if bad := next((row for row in rows if not isinstance(row, dict)), None):
        raise UserError(f"every line of `{path}` must be an object, but got {str(bad)[:60]!r}")
    return rows


def foreign_lines(path: Path) -> bool:
    """Whether a `.jsonl` holds someone else's runs: its first line is an object without the keys of a trial."""
    try:
        first = json.loads(
            next((line for line in path.read_text("utf-8").splitlines() if line.strip()), "null")
        )
    except (OSError, ValueError):
        return False  # the reader of trials says what is wrong
    return isinstance(first, dict) and not OURS & first.keys()


def of_lines(path: Path) -> pd.DataFrame:
    """Runs of a foreign `.jsonl`; a nested object's settings under `table.key`."""
    import pandas as pd

    return pd.json_normalize(json_lines(path))


def tidied(table: pd.DataFrame, name: str) -> tuple[pd.DataFrame, bool]:
    """(one row a run, whether it is histories alone) of a CSV; as it stands unless W&B wrote it.

    A chart: `Step`, and `RUN - METRIC` with its `__MIN` and `__MAX` a run. A run's history: `_step` and a column a metric. The table of
    runs: `Name`, `State`, ..., then the config, then the last value of each metric.
    """
    columns = [str(column) for column in table.columns]
    if any(column + SPREAD[0] in columns for column in columns):
        return _chart(table, columns), True
    if "_step" in columns:
        return _history(table, name), True
    return (_runs(table), False) if {"Name", "State"} <= set(columns) else (table, False)


def _runs(table: pd.DataFrame) -> pd.DataFrame:
    """`id` from the display name, numbered where it is not its own; `status` from the state."""
    import pandas as pd

    unknown = sorted(set(table["State"].dropna().astype(str)) - set(STATES))
    if unknown:
        raise UserError(
            f"a W&B run's `State` must be one of {', '.join(STATES)}, but got {unknown[0]!r}"
        )
    names, again = table["Name"].astype(str), table.groupby("Name", dropna=False).cumcount()
    ids = names.where(again == 0, names + "#" + (again + 1).astype(str))
    own = {
        name: value
        for name, value in {
            "id": ids,
            "status": table["State"].map(STATES).fillna("failed"),
        }.items()
        if name not in table
    }
    return pd.concat([pd.DataFrame(own), table], axis=1)


def _chart(table: pd.DataFrame, columns: list[str]) -> pd.DataFrame:
    """The last value of every run's metric, and the step it is of where the chart is over steps."""
    import pandas as pd

    rows: dict[str, dict[str, Any]] = {}
    for column in columns[1:]:
        run, dash, metric = column.rpartition(" - ")
        seen = table[[columns[0], column]].dropna()
        if not dash or column.endswith(SPREAD) or seen.empty:
            continue
        row = rows.setdefault(run, {"id": run})
        row[metric] = seen[column].iloc[-1]
        key = "steps" if columns[0] == "Step" else columns[0]
        row[key] = max(row.get(key, 0), seen[columns[0]].iloc[-1])
    return pd.DataFrame(list(rows.values()))


def _history(table: pd.DataFrame, name: str) -> pd.DataFrame:
    """One run: the last value of each metric."""
    import pandas as pd

    last = {
        str(column): values.iloc[-1] for column in table if len(values := table[column].dropna())
    }
    return pd.DataFrame(
        [
            {
                "id": name,
                "steps": last.pop("_step"),
                **{k: v for k, v in last.items() if not k.startswith("_")},
            }
        ]
    )


def joined(runs: pd.DataFrame, histories: pd.DataFrame) -> pd.DataFrame:
    """Each run with what its history adds, by `id`; a history's value goes before a summary's. UserError where a history has no run."""
    if "id" not in runs:
        raise UserError(
            "a W&B chart is joined to its runs by name, but the other records have no `id`"
        )
    lost = sorted(set(histories["id"]) - set(runs["id"].astype(str)))
    if lost:
        raise UserError(
            f"every run of a W&B chart must be in the table of runs, but {lost[0]!r} is not"
        )
    kept = [column for column in runs if column == "id" or column not in histories]
    return (
        runs[kept]
        .assign(id=runs["id"].astype(str))
        .merge(histories.groupby("id", as_index=False).last(), on="id", how="left")
    )
