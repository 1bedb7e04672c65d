"""Reads the trials of Ray Tune: experiment folders, and the table of `get_dataframe()`.

A trial's folder holds its settings (`params.json`) and its reports (`result.json`, or
`progress.csv`); its experiment's folder holds the state of each trial. Ray need not be installed;
`.pkl` files are never read. `training_iteration` counts reports, not optimizer steps.
"""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.importing.names import is_lr
from scaletune.importing.run import CALLS, ImportedRun, RunTable, to_number
from scaletune.importing.states import read_state
from scaletune.records import FINISHED_SHARE

if TYPE_CHECKING:
    import pandas as pd

REPORT = "training_iteration"
OWN = (
    *("timestamp", "checkpoint_dir_name", "done", "trial_id", "date", "pid", "hostname"),
    *("node_ip", "time_since_restore", "iterations_since_restore", "should_checkpoint", "config"),
    *("experiment_id", "experiment_tag", "time_this_iter_s", "warmup_time", "timesteps_total"),
    *("episodes_total", "timesteps_since_restore", REPORT),
)
"""Keys that Ray adds to each report."""


@dataclass
class RayTrial:
    """A trial: its run, its last report, and what the experiment knows of it."""

    run: ImportedRun
    last: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)

    def reports(self) -> int:
        """The number of reports; 0 for a trial that failed before its first one."""
        number = to_number(self.last.get(REPORT))
        return int(number) if number and math.isfinite(number) else 0

    def was_stopped(self) -> bool:
        """Whether the last report is marked as the last one, by what ended the trial."""
        return str(self.last.get("done")) == "True"


def read(path: Path) -> list[ImportedRun]:
    """One run per folder of a trial in a folder; or the run of one `result.json`.

    For the state of an experiment (`experiment_state-*.json`) its folder is read.
    """
    path = path.parent if path.name.startswith("experiment_state-") else path
    folders = [path.parent] if path.is_file() else _trial_folders(path)
    if not folders:
        raise UserError(
            f"`{path}` must hold trials of Ray Tune (params.json and result.json), but it has none"
        )
    experiments: dict[Path, list[RayTrial]] = {}
    for folder in folders:
        experiments.setdefault(folder.parent, []).append(_read_trial(folder))
    for folder, trials in experiments.items():
        states = _read_states(folder)
        for trial in trials:
            trial.state = states.get(trial.run.id, {})
        _judge(trials)
    return [trial.run for trials in experiments.values() for trial in trials]


def _trial_folders(path: Path) -> list[Path]:
    names = ("result.json", "progress.csv", "params.json")
    return sorted({file.parent for name in names for file in path.rglob(name)})


def _read_trial(folder: Path) -> RayTrial:
    """The settings of a trial, and its reports as histories over `training_iteration`."""
    rows = _read_reports(folder)
    last = rows[-1] if rows else {}
    run = ImportedRun(
        id=str(last.get("trial_id") or folder.absolute().name),
        name=folder.absolute().name,
        counts_calls=True,
    )
    config = _read_object(folder / "params.json") or last.get("config", {})
    run.add_settings(config)
    for number, row in enumerate(rows, 1):
        step = int(to_number(row.get(REPORT)) or number)
        for key, value in _flatten(row):
            run.add_point(key, step, value)
    if (folder / "error.txt").exists():
        run.status, run.message = "failed", "it ended with an error (error.txt)"
    if changed := _changed_lr(rows):
        run.status = "failed"
        run.message = f"its setting `{changed}` changed during training (population-based training)"
    return RayTrial(run, last)


def _read_reports(folder: Path) -> list[dict[str, Any]]:
    """The reports of a trial. A last line that a crash cut off is left out."""
    file = folder / "result.json"
    if not file.exists() and (folder / "progress.csv").exists():
        return _read_progress(folder / "progress.csv")
    lines = file.read_text("utf-8", errors="replace").splitlines() if file.exists() else []
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(f"line {number} of `{file}` must be JSON, but {error}") from None
        if not isinstance(row, dict) or REPORT not in row:
            raise UserError(
                f"line {number} of `{file}` must be a report of Ray Tune, but it has no `{REPORT}`"
            )
        rows.append(row)
    return rows


def _read_progress(file: Path) -> list[dict[str, Any]]:
    """The reports of a `progress.csv`."""
    with file.open(encoding="utf-8", newline="") as stream:
        rows: list[dict[str, Any]] = list(csv.DictReader(stream))
    if rows and REPORT not in rows[0]:
        raise UserError(
            f"`{file}` must be the reports of Ray Tune, but it has no column `{REPORT}`: give a"
            " table of runs another name"
        )
    return [{key: _parse(value) for key, value in row.items()} for row in rows]


def _parse(text: Any) -> Any:
    try:
        return float(text)
    except (ValueError, TypeError):
        return {"True": True, "False": False}.get(str(text), text)


def _read_object(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text("utf-8"))
    except OSError:
        return {}
    except ValueError as error:
        raise UserError(f"`{file}` must be JSON, but {error}") from None
    return content if isinstance(content, dict) else {}


def _flatten(row: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """(key, value) of the metrics of a report; nested keys are joined by `/`, as Ray does."""
    for key, value in row.items():
        if not prefix and (key in OWN or key.startswith("config/")):
            continue
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", value


def _changed_lr(rows: list[dict[str, Any]]) -> str:
    """A learning rate of the settings that changed between reports; "" if none did."""
    seen: dict[str, float] = {}
    for row in rows:
        settings = ImportedRun("")
        settings.add_settings(row.get("config") or {})
        for key, value in settings.config.items():
            number = to_number(value) if is_lr(key) else None
            if number is not None and seen.setdefault(key, number) != number:
                return key
    return ""


def _read_states(folder: Path) -> dict[str, dict[str, Any]]:
    """What the latest `experiment_state-*.json` knows of each trial, by its id."""
    files = sorted(folder.glob("experiment_state-*.json"))
    try:
        content = json.loads(files[-1].read_text("utf-8")) if files else {}
        entries = content.get("trial_data") or content.get("checkpoints") or []
        states = [_decode(entry) for entry in entries]
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return {str(state.get("trial_id")): state for state in states}


def _decode(entry: Any) -> dict[str, Any]:
    """The state of a trial: JSON text, alone or beside its metadata."""
    entry = entry[0] if isinstance(entry, list) else entry
    state = json.loads(entry) if isinstance(entry, str) else entry
    return state if isinstance(state, dict) else {}


def _judge(trials: list[RayTrial]) -> None:
    """Sets the status of trials that failed, or that were stopped before the others.

    A function that returns leaves `done` false in its last report. Where it is true, a scheduler
    or a stopping criterion ended the trial: a criterion that the report meets is a planned end, and
    so is the largest number of reports (the scheduler's `max_t`).
    """
    most = max((trial.reports() for trial in trials), default=0)
    for trial in trials:
        run, word = trial.run, trial.state.get("status")
        if run.message.startswith("its setting"):
            continue
        if word is not None:
            run.status, run.message = read_state(word)
        if run.status != "done" or not trial.was_stopped() or _meets_criterion(trial):
            continue
        if trial.reports() < FINISHED_SHARE * most:
            run.status = "failed"
            run.message = (
                "unfinished: stopped by a scheduler or a stopping criterion after"
                f" {trial.reports()} of {most} reports"
            )


def _meets_criterion(trial: RayTrial) -> bool:
    """Whether a trial ended by one of its own stopping criteria, such as a number of steps."""
    criteria = trial.state.get("stopping_criterion") or {}
    flat = dict(_flatten(trial.last)) | {REPORT: trial.reports()}
    values = {key: to_number(flat.get(key)) for key in criteria}
    return any(
        value is not None and limit is not None and value >= limit
        for key, value in values.items()
        if (limit := to_number(criteria[key])) or limit == 0
    )


def read_export(table: pd.DataFrame, path: Path) -> RunTable | None:
    """The trials of `ResultGrid.get_dataframe()` as runs; None for another table.

    It has one row per trial, settings as `config/NAME`, and the last value of each metric.
    """
    columns = [str(column) for column in table.columns]
    config = [name for name in columns if name.startswith("config/")]
    if not config or not {"trial_id", REPORT} <= set(columns) or not table["trial_id"].is_unique:
        return None
    runs = []
    for _, row in table.iterrows():
        run = ImportedRun(id=str(row["trial_id"]))
        runs.append(RayTrial(run, {str(key): value for key, value in row.items()}))
    _judge(runs)
    metrics = frozenset(name for name in columns if name not in (*config, *OWN, "logdir"))
    new: dict[str, Any] = {
        "id": table["trial_id"].astype(str),
        "status": [trial.run.status for trial in runs],
        "message": [trial.run.message for trial in runs],
        CALLS: table[REPORT],
    }
    return RunTable(table.assign(**new), metrics, True, last_values=True)
