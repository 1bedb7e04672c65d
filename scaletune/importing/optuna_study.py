"""Reads the trials of Optuna studies: SQLite storage, journal files, and `trials_dataframe()`.

Optuna need not be installed. A trial's parameters, the user attributes of its study and its own
user attributes are its settings. The objective value of a study that minimizes is taken as the
loss, unless a user attribute holds a loss.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.importing.names import canonical, is_loss
from scaletune.importing.optuna_journal import is_journal, read_journal
from scaletune.importing.optuna_storage import (
    OptunaStudy,
    OptunaTrial,
    is_database,
    read_database,
)
from scaletune.importing.run import ImportedRun, RunTable, not_finite
from scaletune.importing.states import read_state

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["is_database", "is_journal", "read", "read_export"]


def read(path: Path) -> list[ImportedRun]:
    """Every trial of every study in a database or journal file; waiting trials are left out.

    Raises:
        UserError: The file is not a storage of Optuna, or holds no study.
    """
    studies = read_journal(path) if is_journal(path) else read_database(path)
    if not studies:
        raise UserError(f"`{path}` must hold a study of Optuna, but it has none")
    runs = [run for study in studies for run in _to_runs(study)]
    if not runs:
        raise UserError(f"`{path}` must hold trials of Optuna, but its studies have none")
    if any(not run.absent for run in runs):  # other studies have a loss: say it run by run
        for run in runs:
            if why := run.absent.pop("loss", ""):
                run.status, run.message = "failed", why
    return runs


def _to_runs(study: OptunaStudy) -> Iterable[ImportedRun]:
    """The trials of a study as runs."""
    why = _why_no_loss(study)
    for trial in study.trials:
        if trial.state == "WAITING":  # queued, without parameters
            continue
        run = ImportedRun(id=f"{study.name}/{trial.number}", counts_calls=True)
        run.status, run.message = read_state(trial.state)
        run.config["study"] = study.name
        run.add_settings(study.user_attrs)
        for key, value in trial.user_attrs.items():
            run.add_settings({f"user_attrs.{key}" if key in trial.params else key: value})
        run.add_settings(trial.params)
        _add_values(run, study, trial)
        if why and not any(is_loss(key) for key in run.config):
            run.absent["loss"] = why
        yield run


def _add_values(run: ImportedRun, study: OptunaStudy, trial: OptunaTrial) -> None:
    """Adds the objective values, and the reported values as the history of the one they end at."""
    last = max(trial.intermediate, default=0)
    loss = study.loss_objective()
    for number, (name, value) in enumerate(zip(study.objectives(), trial.values, strict=False)):
        run.add_point("loss" if number == loss else name, last, value)
    reported, key = list(trial.intermediate.items()), "intermediate"
    if reported and loss is not None and len(study.directions) == 1:
        end = trial.intermediate[last]
        if not trial.values or _agree(end, trial.values[0]):
            key = "loss"
    if reported:
        run.history[key] = reported


def _agree(a: float, b: float) -> bool:
    return (math.isnan(a) and math.isnan(b)) or math.isclose(a, b, rel_tol=1e-6)


def _why_no_loss(study: OptunaStudy) -> str:
    """Why the objective of a study is no loss; "" if it is one."""
    if study.loss_objective() is not None:
        return ""
    if len(study.directions) == 1:
        word = "maximizes its objective" if study.directions == ["MAXIMIZE"] else "has no direction"
        return (
            f"the study {study.name!r} {word}, so that its value is no loss: store the loss with"
            " trial.set_user_attr('loss', ...), or give --map loss=NAME"
        )
    names = " and ".join(f"`{name}`" for name in study.objectives())
    return (
        f"the study {study.name!r} has {len(study.directions)} objectives, {names}: give the one"
        f" that is the loss as --map loss={study.objectives()[0]}"
    )


def read_export(table: pd.DataFrame, path: Path) -> RunTable | None:
    """The trials of `study.trials_dataframe()` as runs; None for another table.

    The table does not tell whether the study minimizes: a `value` is taken as a loss, said so, and
    refused if it is negative. Of several objectives none is taken.
    """
    table = _join_header(table)
    columns = [str(column) for column in table.columns]
    values = [name for name in columns if name == "value" or name.startswith("values_")]
    if not values or not {"number", "state", "datetime_start"} <= set(columns):
        return None
    table = table[table["state"] != "WAITING"].reset_index(drop=True)
    states = [read_state(word) for word in table["state"]]
    runs = RunTable(
        table.assign(
            id=f"{path.stem}/" + table["number"].astype(int).astype(str),
            status=[status for status, _ in states],
            message=[reason for _, reason in states],
        ),
        origin_known=True,
    )
    if any(name.startswith("user_attrs_") and is_loss(canonical(name)) for name in columns):
        return runs
    return _take_value(runs, values)


def _join_header(table: pd.DataFrame) -> pd.DataFrame:
    """The table of `multi_index=True`, whose second line holds names, with `params_NAME`, ..."""
    groups = ("params", "user_attrs", "system_attrs", "values")
    named = [str(column).partition(".")[0] for column in table.columns]
    if "number" not in table or not len(table) or not set(groups) & set(named):
        return table
    if table["number"].notna().iloc[0]:
        return table
    second = table.iloc[0]
    names = {
        column: f"{group}_{second[column]}"
        for column, group in zip(table.columns, named, strict=True)
        if group in groups
    }
    return table.iloc[1:].reset_index(drop=True).rename(columns=names).apply(_to_numbers)


def _to_numbers(values: pd.Series) -> pd.Series:
    import pandas as pd

    try:
        return pd.to_numeric(values)
    except (ValueError, TypeError):
        return values


def _take_value(runs: RunTable, values: list[str]) -> RunTable:
    """Takes the objective value as the loss, or says why it is none."""
    table = runs.table
    losses = [name for name in values if is_loss(name)] if len(values) > 1 else values
    if len(losses) != 1:
        names = " and ".join(f"`{name}`" for name in values)
        why = f"the study has {len(values)} objectives, {names}: give the loss as --map loss=NAME"
        return replace(runs, absent={"loss": why})
    value = losses[0]
    done = table[value][runs.table["status"] == "done"].astype(float)
    if (done < 0).any():
        why = (
            f"`{value}` is negative in {int((done < 0).sum())} trials, so that it is no loss: if"
            f" the study maximizes -loss, give --map loss=-{value}"
        )
        return replace(runs, absent={"loss": why})
    note = f"`loss` is the objective `{value}`, which the study is assumed to minimize"
    warnings = []
    if len(done) and done.max() <= 1:
        warnings = [
            f"the objective `{value}` is at most 1 in every trial: if it is an accuracy, it is no"
            " loss (--map loss=NAME reads another column)"
        ]
    infinite = (table["status"] == "done") & table[value].astype(float).abs().eq(math.inf)
    table = table.assign(
        loss=table[value].astype(float),
        status=table["status"].mask(infinite, "diverged"),
        message=table["message"].mask(infinite, not_finite(value)),
    )
    return replace(runs, table=table, notes=[note], warnings=warnings, history=frozenset({"loss"}))
