"""Optuna's studies and trials, as its SQLite storage holds them (schema of Optuna 2.4 to 5)."""

from __future__ import annotations

import json
import math
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.names import is_loss

SPECIAL = {"INF_POS": math.inf, "INF_NEG": -math.inf, "NAN": math.nan}
"""The values that the database stores as a word (since Optuna 3.0)."""


@dataclass
class OptunaTrial:
    """One trial of a study, as Optuna stores it."""

    number: int
    state: str = "RUNNING"
    params: dict[str, Any] = field(default_factory=dict)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    values: list[float] = field(default_factory=list)
    intermediate: dict[int, float] = field(default_factory=dict)


@dataclass
class OptunaStudy:
    """One study: its name, the directions of its objectives, and its trials."""

    name: str
    directions: list[str] = field(default_factory=list)
    metric_names: list[str] = field(default_factory=list)
    user_attrs: dict[str, Any] = field(default_factory=dict)
    trials: list[OptunaTrial] = field(default_factory=list)

    def objectives(self) -> list[str]:
        """The name of each objective: `value`, or `values_0`, `values_1`, ... for several."""
        if len(self.directions) == 1:
            return [*self.metric_names, "value"][:1]
        names = self.metric_names or [str(number) for number in range(len(self.directions))]
        return [f"values_{name}" for name in names]

    def loss_objective(self) -> int | None:
        """The objective that is a loss: the only one, or the only one with such a name."""
        minimized = [i for i, word in enumerate(self.directions) if word == "MINIMIZE"]
        if len(self.directions) > 1:
            minimized = [i for i in minimized if is_loss(self.objectives()[i])]
        return minimized[0] if len(minimized) == 1 else None


def is_database(path: Path) -> bool:
    """Whether a file is a database with the tables of Optuna."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            names = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    except sqlite3.Error:
        return False
    return {"studies", "trials", "trial_params"} <= {str(name) for (name,) in names}


def read_database(path: Path) -> list[OptunaStudy]:
    """The studies of a database of Optuna 2.4 or later."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            db.row_factory = sqlite3.Row
            studies = {
                row["study_id"]: OptunaStudy(row["study_name"]) for row in _rows(db, "studies")
            }
            for row in _rows(db, "study_directions ORDER BY objective"):
                studies[row["study_id"]].directions.append(row["direction"])
            for row in _rows(db, "study_user_attributes"):
                studies[row["study_id"]].user_attrs[row["key"]] = json.loads(row["value_json"])
            for row in _rows(db, "study_system_attributes"):
                if row["key"] == "study:metric_names":
                    studies[row["study_id"]].metric_names = json.loads(row["value_json"])
            _add_trials(db, studies)
    except (sqlite3.Error, IndexError, KeyError, ValueError, TypeError) as error:
        raise UserError(
            f"`{path}` must be a storage of Optuna 2.4 or later, but reading it raised"
            f" {type(error).__name__}: {error} (a newer Optuna upgrades it: `optuna storage"
            " upgrade`)"
        ) from None
    return list(studies.values())


def _rows(db: sqlite3.Connection, table: str) -> Iterable[sqlite3.Row]:
    return db.execute(f"SELECT * FROM {table}")


def _add_trials(db: sqlite3.Connection, studies: dict[int, OptunaStudy]) -> None:
    trials = {}
    for row in _rows(db, "trials ORDER BY trial_id"):
        trial = OptunaTrial(int(row["number"]), str(row["state"]))
        trials[row["trial_id"]] = trial
        studies[row["study_id"]].trials.append(trial)
    for row in _rows(db, "trial_params"):
        value = read_parameter(row["param_value"], row["distribution_json"])
        trials[row["trial_id"]].params[row["param_name"]] = value
    for row in _rows(db, "trial_user_attributes"):
        trials[row["trial_id"]].user_attrs[row["key"]] = json.loads(row["value_json"])
    for row in _rows(db, "trial_values ORDER BY objective"):
        trials[row["trial_id"]].values.append(_value(row, "value"))
    for row in _rows(db, "trial_intermediate_values ORDER BY step"):
        value = _value(row, "intermediate_value")
        trials[row["trial_id"]].intermediate[int(row["step"])] = value


def _value(row: sqlite3.Row, column: str) -> float:
    """A stored value; infinities and NaN have a type of their own, and NaN was NULL before 3.0."""
    kinds = [row[key] for key in row.keys() if key == f"{column}_type"]  # noqa: SIM118
    value = row[column]
    return SPECIAL.get(kinds[0] if kinds else "", math.nan if value is None else float(value))


def read_parameter(value: float, distribution_json: str) -> Any:
    """The value of a parameter from its stored number: of a categorical one, the choice."""
    distribution = json.loads(distribution_json)
    if distribution["name"] == "CategoricalDistribution":
        return distribution["attributes"]["choices"][int(value)]
    return int(value) if distribution["name"].startswith("Int") else float(value)
