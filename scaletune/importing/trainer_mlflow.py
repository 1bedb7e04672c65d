"""Hugging Face's `trainer_state.json` and MLflow's SQLite file."""

from __future__ import annotations

import json
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from scaletune import counting, huggingface
from scaletune.errors import UserError
from scaletune.importing.run import Run, number
from scaletune.zoo import Model


def trainer_state(path: Path) -> list[Run]:
    """The log of one transformers Trainer: `loss`, `eval_loss`, `learning_rate`, ... by step; called by the folder of its checkpoints."""
    try:
        state = json.loads(path.read_text("utf-8"))
        history = state["log_history"]
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise UserError(
            f"`{path}` must be a Trainer's state with a `log_history`, but {type(error).__name__}: {error}"
        ) from None
    parents = [folder.name for folder in path.absolute().parents]
    run = Run(name=parents[parents[0].startswith("checkpoint-")] or path.stem)
    run.put(_model(path.parent))
    run.put(
        {
            key: value
            for key, value in state.items()
            if number(value) is not None and key != "global_step"
        }
    )
    for line in history:
        for key, value in line.items():
            if key != "step" and (found := number(value)) is not None:
                run.history.setdefault(key, []).append((int(line.get("step", 0)), found))
    if {"loss", "eval_loss"} <= run.history.keys():
        run.history["train_loss"] = run.history.pop(
            "loss"
        )  # `loss` is what was held out, wherever both are there
    if peaks := [value for _, value in run.history.get("learning_rate", [])]:
        run.config["peak_lr_logged"] = max(peaks)  # warmup's end may fall between two lines
    return [run]


def _model(folder: Path) -> dict[str, Any]:
    """Size and shape from the config.json that a Trainer leaves beside its state; nothing where it has none, or one of another model."""
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


def mlflow(path: Path) -> list[Run]:
    """Every run that is not deleted, of MLflow's own SQLite store; opened read-only."""
    try:
        with closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as db:
            names = db.execute(
                "SELECT run_uuid, name FROM runs WHERE lifecycle_stage = 'active'"
            ).fetchall()
            params = db.execute("SELECT run_uuid, key, value FROM params").fetchall()
            metrics = db.execute(
                "SELECT run_uuid, key, step, value FROM metrics WHERE NOT is_nan ORDER BY step, timestamp"
            ).fetchall()
    except sqlite3.Error as error:
        raise UserError(f"`{path}` must be MLflow's SQLite store, but {error}") from None
    runs = {run: Run(name=run) for run, _ in names}
    for run, key, value in params:
        if run in runs:
            runs[run].config[key] = _told(value)
    for run, key, step, value in metrics:
        if run in runs:
            runs[run].history.setdefault(key, []).append((int(step), float(value)))
    return list(runs.values())


def _told(value: Any) -> float | str:
    """MLflow keeps every parameter as text."""
    try:
        return float(value)
    except ValueError:
        return str(value)
