"""Reads the `trainer_state.json` of a Hugging Face Trainer, and the SQLite database of MLflow."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from scaletune import counting, huggingface
from scaletune.errors import UserError
from scaletune.importing.run import ImportedRun, to_number
from scaletune.zoo import Model


def read_trainer(path: Path) -> list[ImportedRun]:
    """One run per folder of checkpoints, read from its last checkpoint; or the run of one file."""
    files = [path] if path.is_file() else sorted(path.rglob("trainer_state.json"))
    last: dict[Path, ImportedRun] = {}
    for file in files:
        run = read_trainer_state(file)
        is_checkpoint = file.parent.name.startswith("checkpoint-")
        folder = file.parent.parent if is_checkpoint else file.parent
        if folder not in last or run.row().get("steps", 0) >= last[folder].row().get("steps", 0):
            last[folder] = run
    return list(last.values())


def read_trainer_state(path: Path) -> ImportedRun:
    """The log of one Trainer: `loss`, `eval_loss`, `learning_rate`, ... by step.

    The run has the name of the folder that holds the checkpoints.
    """
    try:
        state = json.loads(path.read_text("utf-8"))
        history = state["log_history"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"`{path}` must be a Trainer's state with a `log_history`, but reading it raised"
            f" {type(error).__name__}: {error}"
        ) from None
    parents = [folder.name for folder in path.absolute().parents]
    run = ImportedRun(name=parents[parents[0].startswith("checkpoint-")] or path.stem)
    run.add_settings(_model_size(path.parent))
    numbers = {key: value for key, value in state.items() if to_number(value) is not None}
    numbers.pop("global_step", None)
    run.add_settings(numbers)
    for line in history:
        for key, value in line.items():
            if key != "step" and (number := to_number(value)) is not None:
                run.history.setdefault(key, []).append((int(line.get("step", 0)), number))
    if {"loss", "eval_loss"} <= run.history.keys():
        # with both, the contract's `loss` is the held-out one
        run.history["train_loss"] = run.history.pop("loss")
    if peaks := [value for _, value in run.history.get("learning_rate", [])]:
        run.config["peak_lr_logged"] = max(peaks)  # the true peak may lie between two log lines
    return run


def _model_size(folder: Path) -> dict[str, Any]:
    """Size and shape of the model from the `config.json` beside the Trainer's state.

    Empty if there is no such file, or if the architecture is not known.
    """
    try:
        model, vocab_size, _ = huggingface.read(folder)
        shape = TypeAdapter(Model).validate_python(model)
    except (UserError, ValueError):
        return {}
    return {
        "n_params": counting.params(shape, vocab_size)["n_params"],
        "width": shape.width,
        "depth": shape.depth,
    }


def read_mlflow(path: Path) -> list[ImportedRun]:
    """Every run in an MLflow database that is not deleted. The database is opened read-only."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            names = db.execute(
                "SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active'"
            ).fetchall()
            params = db.execute("SELECT run_uuid, key, value FROM params").fetchall()
            metrics = db.execute(
                "SELECT run_uuid, key, step, value FROM metrics WHERE NOT is_nan"
                " ORDER BY step, timestamp"
            ).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"`{path}` must be the SQLite database of MLflow, but {error}") from None
    runs = {run: ImportedRun(name=run) for run, _ in names}
    for run, key, value in params:
        if run in runs:
            runs[run].config[key] = _parse(value)
    for run, key, step, value in metrics:
        if run in runs:
            runs[run].history.setdefault(key, []).append((int(step), float(value)))
    return list(runs.values())


def _parse(value: Any) -> float | str:
    """A parameter as a number if it is one. MLflow stores all of them as text."""
    try:
        return float(value)
    except ValueError:
        return str(value)
