"""Reads the runs of MLflow: its SQLite database, its folder form `mlruns/`, and tables of runs.

MLflow need not be installed. Both forms give the same runs: parameters as settings, metrics as
histories, and the state of each run. Deleted runs are left out, and so are parents of nested runs
that log nothing themselves.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.importing.run import ImportedRun, RunTable, to_number
from scaletune.importing.states import read_state

if TYPE_CHECKING:
    import pandas as pd

STATES = {"1": "RUNNING", "2": "SCHEDULED", "3": "FINISHED", "4": "FAILED", "5": "KILLED"}
"""The state of a run by its number in the folder form (`RunStatus` of MLflow)."""
LARGEST = 1.7e308  # the database stores an infinity as the largest double
PARENT = "mlflow.parentRunId"
WEB_COLUMNS = ("Start Time", "Duration", "Run ID", "Name", "Source Type", "Status")
"""First columns of the table that MLflow's web page downloads; names there have no prefix."""


def read_database(path: Path) -> list[ImportedRun]:
    """Every run in an MLflow database that is not deleted. The database is opened read-only."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            db.row_factory = sqlite3.Row
            runs = {run.id: run for run in _read_runs(db)}
            for row in _rows(db, "params"):
                if row["run_uuid"] in runs:
                    runs[row["run_uuid"]].config[row["key"]] = _parse(row["value"])
            _add_tags(db, runs)
            _add_metrics(db, runs)
    except (sqlite3.Error, IndexError, UnicodeDecodeError) as error:  # IndexError: no such column
        raise UserError(f"`{path}` must be the SQLite database of MLflow, but {error}") from None
    if not runs:
        raise UserError(f"`{path}` must hold runs of MLflow, but all of them are deleted")
    return _without_empty_parents(list(runs.values()))


def is_database(path: Path) -> bool:
    """Whether a file is a database with the tables of MLflow."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            return {"runs", "metrics", "params"} <= _tables(db)
    except sqlite3.Error:
        return False


def _tables(db: sqlite3.Connection) -> set[str]:
    rows = db.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall()
    return {str(row[0]) for row in rows}


def _rows(db: sqlite3.Connection, table: str, order: str = "") -> Iterator[sqlite3.Row]:
    yield from db.execute(f"SELECT * FROM {table} {order}")


def _read_runs(db: sqlite3.Connection) -> Iterator[ImportedRun]:
    """The runs that are not deleted, with the names of their experiments."""
    experiments = {}
    if "experiments" in _tables(db):
        experiments = {row["experiment_id"]: row for row in _rows(db, "experiments")}
    for row in _rows(db, "runs"):
        experiment = experiments.get(row["experiment_id"]) if experiments else None
        if "deleted" in (row["lifecycle_stage"], experiment and experiment["lifecycle_stage"]):
            continue
        run = ImportedRun(id=str(row["run_uuid"]), name=str(row["name"] or ""))
        _set_state(run, row["status"])
        if experiment:
            run.config["experiment"] = str(experiment["name"])
        yield run


def _set_state(run: ImportedRun, state: Any) -> None:
    run.status, run.message = read_state(STATES.get(str(state), state))


def _add_tags(db: sqlite3.Connection, runs: dict[str, ImportedRun]) -> None:
    """Adds tags as settings `tags.NAME`; of MLflow's own tags, the name and the parent of a run."""
    if "tags" not in _tables(db):
        return
    for row in _rows(db, "tags"):
        if row["run_uuid"] in runs:
            _add_tag(runs[row["run_uuid"]], row["key"], row["value"])


def _add_tag(run: ImportedRun, key: str, value: Any) -> None:
    if key == "mlflow.runName":
        run.name = str(value)
    elif key == PARENT or not key.startswith("mlflow."):
        run.config[f"tags.{key}"] = _parse(value)


def _add_metrics(db: sqlite3.Connection, runs: dict[str, ImportedRun]) -> None:
    for row in _rows(db, "metrics", "ORDER BY step, timestamp"):
        if row["run_uuid"] in runs:
            is_nan = "is_nan" in row.keys() and row["is_nan"]  # noqa: SIM118 - values are iterated
            value = math.nan if is_nan else _restore_infinity(float(row["value"]))
            runs[row["run_uuid"]].add_point(row["key"], int(row["step"]), value)


def _restore_infinity(value: float) -> float:
    return math.copysign(math.inf, value) if abs(value) > LARGEST else value


def _restore_number(value: Any) -> float:
    number = to_number(value)
    return math.nan if number is None else _restore_infinity(number)


def _parse(value: Any) -> float | str:
    """A parameter as a number if it is one. MLflow stores all of them as text."""
    text = str(value)
    try:
        return float(text) if "_" not in text else text  # "2024_01" is no number
    except ValueError:
        return text


def _without_empty_parents(runs: list[ImportedRun]) -> list[ImportedRun]:
    """The runs without those that only group the runs of a search."""
    parents = {run.config.get(f"tags.{PARENT}") for run in runs}
    return [run for run in runs if run.history or run.id not in parents]


def read_folder(path: Path) -> list[ImportedRun]:
    """Every run in the folder form of MLflow that is not deleted: `mlruns/`, or a part of it.

    A run is a folder with `meta.yaml`, `params/`, `metrics/` and `tags/`; it lies in the folder of
    its experiment, which has a `meta.yaml` with the name.
    """
    metas = {file.parent: _read_meta(file) for file in sorted(path.rglob("meta.yaml"))}
    runs = []
    for folder, meta in metas.items():
        run_id = meta.get("run_id") or meta.get("run_uuid")
        experiment = metas.get(folder.parent) or _read_meta(folder.parent / "meta.yaml")
        stages = (meta.get("lifecycle_stage"), experiment.get("lifecycle_stage"))
        if run_id is None or "deleted" in stages or ".trash" in folder.parts:
            continue
        run = ImportedRun(id=str(run_id), name=str(meta.get("run_name") or meta.get("name") or ""))
        _set_state(run, meta.get("status", "unknown"))
        if "name" in experiment:
            run.config["experiment"] = str(experiment["name"])
        _add_files(run, folder)
        runs.append(run)
    if not runs:
        raise UserError(
            f"`{path}` must be a folder `mlruns` of MLflow, but no `meta.yaml` in it is that of a"
            " run that is not deleted"
        )
    return _without_empty_parents(runs)


def is_folder(path: Path) -> bool:
    """Whether a folder is `mlruns/`, that of an experiment, or that of a run."""
    metas = [path / "meta.yaml", *path.glob("*/meta.yaml")] if path.is_dir() else []
    files = (file for file in metas if file.is_file())
    return any({"experiment_id", "lifecycle_stage"} <= _read_meta(file).keys() for file in files)


def _read_meta(path: Path) -> dict[str, Any]:
    """What a `meta.yaml` holds; empty if it is missing, or not one of MLflow."""
    import yaml

    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        content = yaml.load(path.read_text("utf-8"), loader)
    except OSError:
        return {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        if not (path.parent / "metrics").is_dir():
            return {}
        line = " ".join(str(error).split())
        raise UserError(f"`{path}` must be a YAML file of MLflow, but {line}") from None
    return content if isinstance(content, dict) else {}


def _add_files(run: ImportedRun, folder: Path) -> None:
    """Adds the parameters, metrics and tags of a run; a name with `/` is a nested folder."""
    for name, text in _contents(folder / "params"):
        run.config[name] = _parse(text.strip())
    for name, text in _contents(folder / "tags"):
        _add_tag(run, name, text)
    for name, text in _contents(folder / "metrics"):
        points = sorted(filter(None, map(_read_point, text.splitlines())))
        for step, _, value in points:
            run.add_point(name, step, value)


def _contents(folder: Path) -> Iterator[tuple[str, str]]:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            yield file.relative_to(folder).as_posix(), file.read_text("utf-8", errors="replace")


def _read_point(line: str) -> tuple[int, int, float] | None:
    """(step, timestamp, value) of a line `timestamp value step ...`; None for a line cut off.

    Old versions wrote no step.
    """
    parts = line.split()
    try:
        return int(parts[2]) if len(parts) > 2 else 0, int(parts[0]), float(parts[1])
    except (ValueError, IndexError):
        return None


def read_export(table: pd.DataFrame, path: Path) -> RunTable | None:
    """The runs of `mlflow.search_runs()` or of the web page's download; None for another table.

    A metric there is its last value, so that a learning rate among them is no peak. The download
    does not tell parameters from metrics.
    """
    columns = [str(column) for column in table.columns]
    if set(WEB_COLUMNS) <= set(columns):
        return _read_rows(table, "Run ID", "Name", "Status", frozenset(), False)
    metrics = frozenset(name for name in columns if name.startswith("metrics."))
    has_names = metrics or any(name.startswith("params.") for name in columns)
    if not has_names or not {"run_id", "status", "experiment_id"} <= set(columns):
        return None
    return _read_rows(table, "run_id", "tags.mlflow.runName", "status", metrics, True)


def _read_rows(
    table: pd.DataFrame,
    run_id: str,
    name: str,
    state: str,
    metrics: frozenset[str],
    origin_known: bool,
) -> RunTable:
    states = [read_state("unknown" if word != word else word) for word in table[state]]
    columns: dict[str, Any] = {
        "id": table[run_id].astype(str),
        "name": table[name] if name in table else table[run_id],
        "status": [status for status, _ in states],
        "message": [reason for _, reason in states],
    }
    numbers = {metric: table[metric].map(_restore_number) for metric in metrics}
    given = table.drop(columns=["Status"], errors="ignore")
    return RunTable(
        given.assign(**columns, **numbers), metrics, origin_known, last_values=origin_known
    )
