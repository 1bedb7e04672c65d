"""Sweeps: a driver hands trials to worker processes and records the results.

`sweep` trains the points of a recipe: all of them, or those that a search selects (`search/`). The
driver (`driver.py`) is the only process that writes records. Workers run on this machine, on a Ray
cluster or as Slurm jobs (`engines/`). A trial whose worker dies is tried again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune import recipe as recipes
from scaletune.recipe import Recipe
from scaletune.sweeping.driver import train_all
from scaletune.sweeping.status import export, status
from scaletune.sweeping.task import Task, failed_trial, tasks
from scaletune.sweeping.trainers.own_function import resolve_own

if TYPE_CHECKING:
    import pandas as pd

    from scaletune.trial import CurrentTrial

__all__ = ["Task", "export", "failed", "failed_trial", "status", "sweep", "tasks", "train_all"]

failed = failed_trial  # the earlier name


def sweep(
    source: str | Path | Recipe,
    *,
    out: str | Path = ".",
    adopt: bool = False,
    settings: Sequence[str] = (),
    train: Callable[[CurrentTrial], Any] | None = None,
    build: Callable[..., Any] | None = None,
) -> pd.DataFrame:
    """Trains the points of a recipe and returns their trials.

    Trains every combination of `axes`, or with `search` the points that the search selects. Points
    that are recorded in `out/sweeps/NAME.db` are not trained again, so an interrupted sweep
    continues where it stopped. At its end, and when it is interrupted, the sweep writes the record
    `out/sweeps/NAME.jsonl`.

    Args:
        source: A recipe, or the path of a recipe file.
        out: The folder for `sweeps/`.
        adopt: Accept the trials of an existing `.jsonl` record instead of training them again.
        settings: Overrides such as `"model.depth=4"`.
        train: A function that trains a trial, instead of scaletune's loop: `train(trial)` returns
            the held-out loss, or a dict with "loss". It runs in worker processes.
        build: A function that builds the model, an `nn.Module`, as `model.build` of a recipe does.
            scaletune's loop trains it.

    Returns:
        One row per trial with its settings, `status` ("done", "diverged", "stopped" early by a
        pruner, or "failed"), `loss` (nats per token unless the recipe says otherwise; NaN unless
        done), `flops` and `seconds`.

    Raises:
        UserError: The recipe is not valid, or another driver runs this sweep.

    Example:
        >>> import tempfile
        >>> import scaletune as st
        >>> small = ["axes={lr=[0.004, 0.008]}", "tokens=512", "engine.workers=1"]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trials = st.sweep("configs/examples/mlp-power-law.toml", out=folder, settings=small)
        >>> trials["lr"].tolist(), trials["status"].tolist()
        ([0.004, 0.008], ['done', 'done'])
    """
    recipe, forked = resolve_own(source, settings, train, build)
    stem = Path(out) / "sweeps" / recipe.name
    if recipe.search.decides:
        from scaletune.sweeping.search import loop

        return loop.run_search(recipe, stem, adopt=adopt, train=forked)[1]
    points = tasks("main", recipes.points(recipe))
    return train_all(points, stem, recipe.engine.workers, adopt=adopt, train=forked)
