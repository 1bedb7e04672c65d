"""Trackers through Accelerate: the loss of every step and every evaluation, into the trial's folder of `engine.runs`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import tracking

from scaletune.errors import UserError
from scaletune.training.checkpoints import folder

if TYPE_CHECKING:
    from scaletune.training.loop import Run

Track = Callable[[dict[str, float], int], None]  # values, the step they belong to


def _flat(table: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"model": {"width": 64}} -> {"model.width": 64}: TensorBoard takes no nested values, and no lists."""
    found: dict[str, Any] = {}
    for key, value in table.items():
        found |= (
            _flat(value, f"{above}{key}.") if isinstance(value, Mapping) else {above + key: value}
        )
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in found.items()
    }


def _tensorboard(where: Path, run: Run) -> tracking.GeneralTracker:
    return tracking.TensorBoardTracker("tensorboard", where)


def _wandb(where: Path, run: Run) -> tracking.GeneralTracker:
    """Offline: `wandb sync` sends it, when the user wants to."""
    import wandb

    settings = wandb.Settings(console="off", silent=True)
    return tracking.WandBTracker(
        run.recipe.name,
        name=run.id,
        dir=str(where),
        mode="offline",
        reinit="finish_previous",
        settings=settings,
    )


MAKERS = {"tensorboard": _tensorboard, "wandb": _wandb}


@contextmanager
def opened(run: Run) -> Iterator[Track]:
    """What to call with values; the trackers are those the recipe asks for, on the main process, and end with the block."""
    names = run.recipe.engine.trackers if run.acc.is_main_process else []
    trackers = [_started(name, run) for name in names]

    def track(values: dict[str, float], step: int) -> None:
        for tracker in trackers:
            tracker.log(values, step=step)

    try:
        yield track
    finally:
        for tracker in trackers:
            tracker.finish()


def _started(name: str, run: Run) -> tracking.GeneralTracker:
    where = folder(run)
    try:
        tracker = MAKERS[name](where, run)
        tracker.start()
    except ImportError as error:
        raise UserError(
            f"tracker {name!r} needs a package that is not installed ({error.name}): pip install 'scaletune[track]'"
        ) from error
    tracker.store_init_configuration(_flat(run.recipe.point()))
    return tracker
