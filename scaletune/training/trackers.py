"""Experiment trackers (TensorBoard, Weights & Biases) through Accelerate.

They log the loss of every step and every evaluation into the trial's folder in `engine.runs`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from accelerate import tracking

from scaletune.errors import UserError
from scaletune.training.checkpoints import run_folder
from scaletune.training.run import TrainingRun

Track = Callable[[dict[str, float], int], None]
"""Logs values, and the step that they belong to."""


def _flatten(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"model": {"width": 64}} -> {"model.width": 64}.

    TensorBoard accepts neither nested values nor lists.
    """
    flat: dict[str, Any] = {}
    for key, value in table.items():
        flat |= (
            _flatten(value, f"{prefix}{key}.")
            if isinstance(value, Mapping)
            else {prefix + key: value}
        )
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in flat.items()
    }


def _tensorboard(folder: Path, run: TrainingRun) -> tracking.GeneralTracker:
    return tracking.TensorBoardTracker("tensorboard", folder)


def _wandb(folder: Path, run: TrainingRun) -> tracking.GeneralTracker:
    """Offline. The user uploads with `wandb sync`."""
    import wandb

    settings = wandb.Settings(console="off", silent=True)
    return tracking.WandBTracker(
        run.recipe.name,
        name=run.id,
        dir=str(folder),
        mode="offline",
        reinit="finish_previous",
        settings=settings,
    )


MAKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


@contextmanager
def open_trackers(run: TrainingRun) -> Iterator[Track]:
    """Starts the trackers of the recipe on the main process and finishes them at the end.

    Yields the function that logs to all of them.
    """
    names = run.recipe.engine.trackers if run.acc.is_main_process else []
    trackers = [_start_tracker(name, run) for name in names]

    def track(values: dict[str, float], step: int) -> None:
        for tracker in trackers:
            tracker.log(values, step=step)

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def _start_tracker(name: str, run: TrainingRun) -> tracking.GeneralTracker:
    folder = run_folder(run)
    try:
        tracker = MAKERS[name](folder, run)
        tracker.start()
    except ImportError as error:
        raise UserError(
            f"tracker {name!r} needs the package `{error.name}`, but it is not installed:"
            " pip install 'scaletune[track]'"
        ) from error
    tracker.store_init_configuration(_flatten(run.recipe.point()))
    return tracker
