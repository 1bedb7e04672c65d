"""Reads the export of a W&B chart, and joins charts to a table of runs.

A chart has the x axis in the first column (`Step`, or a metric) and for each run the columns
`RUN - METRIC`, often with `__MIN` and `__MAX`; if the x axis is not the step, also `RUN - _step`.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.importing.names import REACHED_NAMES, USUAL_NAMES, find_names, is_loss, is_lr
from scaletune.importing.run import CALLS, LAST, PLANNED_TOKENS, STEPS, ImportedRun, RunTable

if TYPE_CHECKING:
    import pandas as pd

CHART = "wandb_chart"
"""Key in the `attrs` of a table of curves: the name of its file."""
ONE_RUN = "wandb_history"
"""Key in the `attrs` of the history of one run."""
MIN, MAX = "__MIN", "__MAX"
CLOCKS = ("relative time", "wall time", "runtime", "_runtime", "_timestamp")
NAMES = ("Name", "name", "display_name", "run_name", "run", "id")
"""Columns that may hold the display name of a run."""
PEAK = "peak_lr"
SAME = 0.02  # tokens of two sources within this fraction are equal
AVERAGED = 1e-3  # spread of the points that one point of a chart averages, as a fraction


def is_chart(runs: RunTable) -> bool:
    """Whether the rows are curves that are joined to a table of runs by the name of the run."""
    return CHART in runs.table.attrs


def has_curves(header: Sequence[str]) -> bool:
    """Whether every column after the x axis is named `RUN - METRIC`."""
    return len(header) > 1 and " - " not in header[0] and all(" - " in name for name in header[1:])


def read_cells(path: Path, positions: Sequence[int] | None = None) -> pd.DataFrame:
    """Columns of a CSV file as text, by their position: an empty cell is not NaN."""
    import pandas as pd

    cells = pd.read_csv(
        path,
        header=None,
        skiprows=1,
        dtype=str,
        keep_default_na=False,
        usecols=None if positions is None else list(positions),
        encoding="utf-8-sig",
    )
    return cells


def not_a_number(cells: pd.Series) -> pd.Series:
    """Whether each text says that a value is NaN or infinite."""
    words = cells.astype(str).str.strip().str.lower().str.lstrip("+-")
    return words.isin(("nan", "inf", "infinity"))


def curve(x: pd.Series, cells: pd.Series) -> pd.Series:
    """The values of a curve by x, in the order of x, without the places where it was not logged."""
    import pandas as pd

    values = pd.to_numeric(cells, errors="coerce").astype(float)
    logged = values.notna()
    words = ~logged & (cells != "")
    if words.any():
        logged |= words & not_a_number(cells.where(words, ""))
    logged &= x.notna()
    return pd.Series(values[logged].to_numpy(), index=x[logged].to_numpy()).sort_index(
        kind="stable"
    )


def read_chart(path: Path, header: Sequence[str]) -> RunTable:
    """The end of each curve, the peak of a learning rate, and the last x of each run.

    Raises:
        UserError: Several curves have the same name, or a curve is the mean of a group of runs.
    """
    import pandas as pd

    _check_names(path, header)
    axis, cells = header[0], read_cells(path)
    x = pd.to_numeric(cells[0], errors="coerce")
    if x.isna().any():  # a date: the rows are in its order
        x = pd.Series(range(len(cells)), index=cells.index)
    columns = {name: i for i, name in enumerate(header)}
    curves: dict[str, dict[str, pd.Series]] = {}
    spread = 0.0
    for name, position in columns.items():
        if position == 0 or name.endswith((MIN, MAX)):
            continue
        run, _, metric = name.rpartition(" - ")
        points = curve(x, cells[position])
        if not len(points):
            continue
        if is_lr(metric) and name + MAX in columns:
            points = curve(x, cells[columns[name + MAX]])
        elif is_loss(metric) and {name + MIN, name + MAX} <= columns.keys():
            sides = [cells[columns[name + side]] for side in (MIN, MAX)]
            spread = max(spread, _spread(x, points, *sides))
        curves.setdefault(run.strip(), {})[metric] = points
    rows = [_read_run(run, axis, metrics) for run, metrics in curves.items()]
    table = pd.DataFrame(rows)
    table.attrs[CHART] = path.name
    history = frozenset(set(table.columns) - {"id", "status", "message"})
    return RunTable(table, history, True, [], _averaged(path, spread))


def _check_names(path: Path, header: Sequence[str]) -> None:
    """UserError if curves share a name, or are named after groups of runs."""
    curves = [name for name in header[1:] if not re.search(r"__(MIN|MAX)(\.\d+)?$", name)]
    counts = Counter(_original(name, set(curves)) for name in curves)
    runs = [name.rpartition(" - ")[0] for name in counts]
    groups = [match[1] for run in runs if (match := re.match(r"([\w./ -]+): .", run))]
    repeated, count = max(counts.items(), key=lambda item: item[1])
    if count > 1:
        hint = "ungroup the chart, or give" if len(groups) == len(runs) else "give"
        raise UserError(
            f"names repeat in the chart `{path.name}`: {count} curves are named"
            f" {repeated.rpartition(' - ')[0]!r}, so that their runs cannot be told apart: {hint}"
            " the runs different names in W&B and export again, or export the table of runs with"
            " the columns `ID` and"
            f" `{repeated.rpartition(' - ')[2]}`"
        )
    if runs and len(groups) == len(runs):
        raise UserError(
            f"the chart `{path.name}` must have one curve per run, but it is grouped by"
            f" `{groups[0]}`, and each curve is the mean of a group: ungroup the runs in W&B and"
            " export again"
        )


def _original(name: str, names: set[str]) -> str:
    """The name of a column without the number that pandas adds to a repeated one."""
    match = re.fullmatch(r"(.+)\.\d+", name)
    return match[1] if match and match[1] in names else name


def _spread(x: pd.Series, points: pd.Series, lower: pd.Series, upper: pd.Series) -> float:
    """How much the points that the last point of a loss averages differ, as a fraction."""
    import pandas as pd

    row, value = (x == points.index[-1]).to_numpy().nonzero()[0][-1], float(points.iloc[-1])
    low, high = pd.to_numeric(pd.Series([lower.iloc[row], upper.iloc[row]]), errors="coerce")
    finite = all(map(math.isfinite, (low, value, high)))
    return float(abs(high - low) / abs(value)) if finite and value else 0.0


def _averaged(path: Path, spread: float) -> list[str]:
    if spread <= AVERAGED:
        return []
    return [
        f"a point of the chart `{path.name}` is an average: the last losses that it joins differ by"
        f" up to {spread:.1%}. Export the table of runs, which has the last value of each run"
    ]


def _read_run(name: str, axis: str, metrics: dict[str, pd.Series]) -> dict[str, Any]:
    """The row of one run."""
    counts_calls = axis.lower() in ("step", "_step")
    has_steps = counts_calls or bool(find_names([axis], REACHED_NAMES))
    calls = metrics.pop("_step", None)
    run = ImportedRun(name, counts_calls=counts_calls)
    for metric, points in metrics.items():
        steps = points.index if has_steps else range(len(points))
        run.history[metric] = [
            (int(step), float(value)) for step, value in zip(steps, points, strict=True)
        ]
    row = run.row()
    if not has_steps:
        row = {k: v for k, v in row.items() if k not in (STEPS, CALLS) and not k.startswith(LAST)}
    last = max((points.index[-1] for points in metrics.values()), default=0)
    if not counts_calls and not axis.lower().startswith(CLOCKS):
        row[axis] = last
    if counts_calls:
        row["_step"] = last
    elif calls is not None and len(calls):
        row["_step"] = row[CALLS] = calls.max()
    if row["status"] == "done":  # a chart does not know whether a run finished
        del row["status"], row["message"]
    return row


def join_histories(runs: RunTable, charts: RunTable) -> RunTable:
    """The runs with the columns of their curves, matched by the name of the run.

    The end of a curve has priority over a last value in the table of runs, and a setting over a
    learning rate of the same name.

    Raises:
        UserError: A curve has no run, several runs have its name, or the tokens disagree.
    """
    table, curves = runs.table.copy(), charts.table.set_index("id")
    keys = _match(table, curves, str(charts.table.attrs.get(CHART, "chart")))
    curves = curves.reindex(keys).set_axis(table.index)
    notes, warnings = [*runs.notes, *charts.notes], [*runs.warnings, *charts.warnings]
    absent = ~keys.isin(set(charts.table["id"]))
    if absent.any() and ONE_RUN not in charts.table.attrs:
        warnings.append(
            f"{int(absent.sum())} of {len(table)} runs are not in the chart"
            f" `{charts.table.attrs.get(CHART, '')}`: W&B draws the first 10 runs unless told"
            " otherwise"
        )
    table = _join_status(table, curves)
    table = _join_tokens(table, curves, str(charts.table.attrs.get(CHART, "chart")))
    tokens = set(find_names(curves.columns, ("tokens", *USUAL_NAMES["tokens"])))
    history = set(runs.history)
    for name in [name for name in curves if name not in ("status", "message")]:
        if is_lr(name):
            table[PEAK] = table[PEAK].fillna(curves[name]) if PEAK in table else curves[name]
            notes.append(f"`{PEAK}` is the peak of the curve `{name}`")
        elif name not in table:
            table[name] = curves[name]
            history.add(str(name))
        elif name != "_step" and name not in tokens:
            table[name] = curves[name].combine_first(table[name])
            history.add(str(name))
    return replace(runs, table=table, history=frozenset(history), notes=notes, warnings=warnings)


def _match(table: pd.DataFrame, curves: pd.DataFrame, chart: str) -> pd.Series:
    """The name of the curve of each run."""
    columns = [name for name in NAMES if name in table]
    if not columns:
        raise UserError(
            "a W&B chart is joined to its runs by name, but the other records have no column `Name`"
            " or `id`: export the table of runs too"
        )
    keys = {name: table[name].fillna("").astype(str).str.strip() for name in columns}
    matches = {name: len(set(keys[name]) & set(curves.index)) for name in columns}
    best = max(columns, key=lambda name: matches[name])
    names = keys[best]
    unmatched = sorted(set(curves.index) - set(names))
    if unmatched:
        raise UserError(
            f"every run of a W&B chart must be in the table of runs, but {unmatched[0]!r} of"
            f" `{chart}` is not: export both from the same set of runs"
        )
    counts = names[names.isin(set(curves.index))].value_counts()
    if len(counts) and counts.iloc[0] > 1:
        raise UserError(
            f"a W&B chart tells runs apart by name, but names repeat: {counts.iloc[0]} runs are"
            f" named {counts.index[0]!r}. Give the runs different names in W&B and export both"
            " again"
        )
    return names


def _join_status(table: pd.DataFrame, curves: pd.DataFrame) -> pd.DataFrame:
    """A run whose curve ends in NaN has diverged, whatever its state."""
    if "status" not in curves:
        return table
    diverged = curves["status"] == "diverged"
    status = table.get("status", "done")
    message = table.get("message", "")
    table = table.assign(status=status, message=message)
    table["status"] = table["status"].mask(diverged, "diverged")
    table["message"] = table["message"].mask(diverged, curves["message"])
    return table


def _join_tokens(table: pd.DataFrame, curves: pd.DataFrame, chart: str) -> pd.DataFrame:
    """The tokens of the x axis are those that a run reached, and fewer than a setting may plan."""
    import pandas as pd

    names = find_names(curves.columns, ("tokens", *USUAL_NAMES["tokens"]))
    for name in [name for name in names if name in table]:
        given = pd.to_numeric(table[name], errors="coerce")
        reached = pd.to_numeric(curves[name], errors="coerce")
        beyond = reached > (1 + SAME) * given
        if beyond.any():
            row = int(beyond.to_numpy().argmax())
            raise UserError(
                f"`{name}` must be the same in the chart and in the table of runs, but the curve of"
                f" {chart} ends at {reached.iloc[row]:.4g} for a run with {given.iloc[row]:.4g}:"
                " export both from the same set of runs, or leave one of the two columns out"
            )
        table = table.assign(
            **{name: reached.fillna(given), PLANNED_TOKENS: given.where(reached.notna())}
        )
    return table
