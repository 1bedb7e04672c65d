"""Reads the tables that W&B exports: the table of runs, a chart, and the history of one run.

A fourth kind is what W&B's guide to its API writes: the columns `name`, `config` and `summary`,
whose cells are Python dictionaries.
"""

from __future__ import annotations

import ast
import csv
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.importing import wandb_chart
from scaletune.importing.names import canonical, is_loss, is_lr
from scaletune.importing.run import CALLS, ImportedRun, RunTable, not_finite, to_table
from scaletune.importing.states import read_state
from scaletune.importing.wandb import add_summary, counts_calls
from scaletune.importing.wandb_chart import is_chart, join_histories

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["is_chart", "join_histories", "read"]

INFO = (
    *("State", "Notes", "User", "Tags", "Created", "Runtime", "Sweep", "Agent", "ID", "Group"),
    *("Job Type", "Host", "Hostname", "Duration", "End Time", "Start Time", "Updated", "Commit"),
    *("Command", "Description", "Project", "Entity", "GPU Type", "GPU Count", "CLI Version"),
    *("_step", "_runtime", "_timestamp", "_wandb.runtime"),
)
"""Columns of W&B itself in its table of runs."""
RUN_COLUMNS = ("run", "run_id", "run_name", "name", "id", "trial_id", "experiment")
"""Columns that tell runs apart in a table of several histories."""
SAMPLE = 500
"""Rows of a history that W&B gives unless more are asked for: gaps are then no sign of a step."""


def read(table: pd.DataFrame, path: Path) -> RunTable | None:
    """The runs of a table that W&B exported; None for any other table.

    Args:
        table: The rows as pandas reads them.
        path: The file, which is read again: pandas renames columns with the same name, and does
            not tell NaN from an empty cell.

    Raises:
        UserError: Runs cannot be told apart, a chart shows groups of runs, or a state is unknown.
    """
    header = _read_header(table, path)
    if wandb_chart.has_curves(header):
        return wandb_chart.read_chart(path, header)
    if _is_table_of_runs(table, header):
        return _read_runs(table, path, header)
    if {"name", "config", "summary"} <= set(header):
        return _read_records(table)
    if "_step" in header and not any(canonical(name) in RUN_COLUMNS for name in header):
        return _read_history(table, path)
    return None


def _read_header(table: pd.DataFrame, path: Path) -> list[str]:
    """The column names as they are in the file."""
    names = [str(column) for column in table.columns]
    if path.suffix != ".csv" or not path.is_file():
        return names
    with path.open("r", encoding="utf-8-sig", newline="") as file:
        header = next(csv.reader(file), [])
    return header if len(header) == len(names) else names


def _is_table_of_runs(table: pd.DataFrame, header: Sequence[str]) -> bool:
    """Whether there is one row per run; rows of several histories may have `Name` and `_step`."""
    if "Name" not in header or not set(INFO) & set(header):
        return False
    fixed = {"State", "ID", "Created", "Runtime"} & set(header)
    return bool(fixed) or "_step" not in header or table["Name"].is_unique


def _read_runs(table: pd.DataFrame, path: Path, header: Sequence[str]) -> RunTable:
    """The table with `id`, `status` and `message`, and which columns are last logged values."""
    table = table.copy()
    history = _find_summary(header, [str(column) for column in table.columns])
    warnings = []
    names = table["Name"].fillna("").astype(str).str.strip()
    if "ID" in table:
        table["id"] = table["ID"].astype(str).str.strip()
    else:
        repeat = names.groupby(names).cumcount()
        table["id"] = names.where(repeat == 0, names + "#" + (repeat + 1).astype(str))
        if repeat.any():
            shared = names[repeat > 0].iloc[0]
            warnings.append(
                f"names repeat in `{path.name}`: {int((names == shared).sum())} runs are named"
                f" {shared!r}. They are taken for different runs; export the column `ID` to be sure"
            )
    table = _read_states(table)
    table = _mark_divergence(table, path)
    if "_step" in table and CALLS not in table:
        table[CALLS] = table["_step"]
    return RunTable(table, history, False, [], warnings)


def _read_states(table: pd.DataFrame) -> pd.DataFrame:
    """`status` and `message` from the words in `State`."""
    if "State" not in table:
        return table
    words = table["State"].fillna("").astype(str)
    states = {word: read_state(word) for word in words.unique() if word.strip()}
    unknown = ("failed", "unfinished: its state is not given")
    ends = [states.get(word, unknown) for word in words]
    return table.assign(status=[end[0] for end in ends], message=[end[1] for end in ends])


def _mark_divergence(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """Status "diverged" where the last loss is NaN or infinite; an empty cell is not."""
    losses = [position for position, name in enumerate(table.columns) if is_loss(name)]
    if not losses or path.suffix != ".csv" or not path.is_file():
        return table
    cells = wandb_chart.read_cells(path, losses)
    for position in losses:
        infinite = (wandb_chart.not_a_number(cells[position])).to_numpy()
        if len(infinite) != len(table) or not infinite.any():
            continue
        status = table.get("status", "done")
        message = table.get("message", "")
        table = table.assign(status=status, message=message)
        table.loc[infinite, "message"] = not_finite(str(table.columns[position]))
        table.loc[infinite, "status"] = "diverged"
    return table


def _find_summary(header: Sequence[str], columns: Sequence[str]) -> frozenset[str]:
    """Columns with last logged values.

    W&B writes the settings in alphabetical order, and after them the last values in alphabetical
    order. Where the order breaks once, the last values begin. Of two columns with the same name,
    the second is a last value.
    """
    own = [i for i, name in enumerate(header) if name not in (*INFO, "Name") and name[:1] != "_"]
    metrics = {columns[i] for i in own if is_loss(header[i]) or header[i] in header[:i]}
    for key in (str, str.lower):
        order = [key(header[i]) for i in own]
        breaks = [k for k in range(1, len(order)) if order[k] < order[k - 1]]
        if len(breaks) == 1 and _is_boundary(header, own, breaks[0]):
            return frozenset(metrics | {columns[i] for i in own[breaks[0] :]})
    return frozenset(metrics)


def _is_boundary(header: Sequence[str], own: list[int], at: int) -> bool:
    """Whether the columns from a break on are last values, and not settings in another order.

    People write tables such as n_params, tokens, lr, loss by hand, with `Name` and `State`.
    """
    after = [header[i] for i in own[at:]]
    if not any(map(is_loss, after)):
        return False
    of_wandb = len({"Name", *INFO} & set(header)) >= 4
    return of_wandb or (at >= 2 and len(after) >= 3 and not is_lr(after[0]))


def _read_records(table: pd.DataFrame) -> RunTable:
    """The runs of a table whose cells are the settings and the summary of a run."""
    runs, names = [], table["name"].fillna("").astype(str).str.strip()
    repeat = names.groupby(names).cumcount()
    ids = table["id"].astype(str) if "id" in table else names
    if "id" not in table:
        ids = names.where(repeat == 0, names + "#" + (repeat + 1).astype(str))
    for row, (run_id, name) in enumerate(zip(ids, names, strict=True)):
        run = ImportedRun(run_id, name)
        config = _parse_cell(table["config"].iloc[row], "config", name)
        run.add_settings({key: value for key, value in config.items() if key[:1] != "_"})
        summary = _parse_cell(table["summary"].iloc[row], "summary", name)
        run.counts_calls = True
        add_summary(run, summary, int(summary.get("_step") or 0))
        if "state" in table:
            run.status, run.message = read_state(table["state"].iloc[row])
        runs.append(run)
    result = to_table(runs)
    # a summary has last values, of which that of a learning rate is not the peak
    result.origin_known = False
    if "id" not in table and repeat.any():
        shared = names[repeat > 0].iloc[0]
        result.warnings.append(
            f"names repeat: {int((names == shared).sum())} runs are named {shared!r}. They are"
            " taken for different runs; add a column `id` to be sure"
        )
    return result


def _parse_cell(cell: object, column: str, name: str) -> dict[str, Any]:
    """A cell that holds a dictionary, as Python prints it."""
    if isinstance(cell, dict):
        return cell
    text = re.sub(r"(?<=[\s:\[,({])(-?(?:nan|inf))(?=[\s,}\])])", r"'\1'", str(cell))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if not isinstance(value, dict):
        raise UserError(
            f"`{column}` of the run {name!r} must be a dictionary, but got {str(cell)[:40]!r}:"
            " export the table of runs as CSV, or read wandb://entity/project"
        )
    return value


def _read_history(table: pd.DataFrame, path: Path) -> RunTable:
    """The history of one run, which has the name of the file."""
    import pandas as pd

    steps = pd.to_numeric(table["_step"], errors="coerce")
    if steps.duplicated().any():
        raise UserError(
            f"`{path.name}` must hold the history of one run, but `_step` repeats: add a column"
            " `run_id` that tells the runs apart"
        )
    names = [str(column) for column in table.columns]
    kept = [i for i, name in enumerate(names) if name[:1] != "_" and "Unnamed" not in name]
    from_file = path.suffix == ".csv" and path.is_file()
    cells = wandb_chart.read_cells(path, kept) if from_file else None
    run = ImportedRun(path.stem)
    for position in kept:
        texts = table.iloc[:, position] if cells is None else cells[position]
        points = wandb_chart.curve(steps, texts)
        if len(points):
            pairs = zip(points.index, points, strict=True)
            run.history[names[position]] = [(int(x), float(y)) for x, y in pairs]
    counter = [int(step) for step in steps.dropna()]
    run.counts_calls = counts_calls(counter) or len(counter) >= SAMPLE
    result = to_table([run])
    result.table.attrs |= {wandb_chart.CHART: path.name, wandb_chart.ONE_RUN: True}
    return result
