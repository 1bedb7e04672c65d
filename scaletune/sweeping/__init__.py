"""Sweeps: a driver that owns the records, and workers that train trial after trial.

The driver hands tasks to whatever pool it has and puts on record what comes back; a trial that is lost is tried again.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

import pandas as pd

from scaletune import recipe as recipes
from scaletune.recipe import Recipe
from scaletune.records import Store, Trial, frame
from scaletune.sweeping import lockfile, stacks
from scaletune.sweeping.driver import Driver
from scaletune.sweeping.engines import pool as pool_module
from scaletune.sweeping.status import export, status
from scaletune.sweeping.task import Task, failed, tasks

__all__ = ["Task", "export", "failed", "status", "sweep", "tasks", "train_all"]

Then = Callable[
    [Trial], Sequence[Task]
]  # a search: what to train next, now that this trial is on record


def sweep(
    source: str | Path | Recipe,
    *,
    out: str | Path = ".",
    adopt: bool = False,
    settings: Sequence[str] = (),
) -> pd.DataFrame:
    """Train every point of the recipe that is not on record in `out/sweeps/NAME.db`; all its trials, a row each.

    `adopt` counts the records of an existing `NAME.jsonl` as trained. Writes `sweeps/NAME.jsonl` at every stop.
    """
    recipe = source if isinstance(source, Recipe) else recipes.load(source, settings)
    stem = Path(out) / "sweeps" / recipe.name
    if recipe.search.kind != "grid":
        from scaletune.sweeping.search import loop

        return loop.search(recipe, stem, adopt=adopt)[1]
    return train_all(
        tasks("main", recipes.points(recipe)), stem, recipe.engine.workers, adopt=adopt
    )


def train_all(
    wanted: Sequence[Task],
    stem: Path,
    workers: str | int = "auto",
    *,
    adopt: bool = False,
    then: Then | None = None,
) -> pd.DataFrame:
    """Train what is not on record, longest first, and return the wanted trials; the record is written whatever happens.

    `then` is told of each wanted trial as soon as it is on record (of those that already are, at the start) and may want more.
    `engine.runs`, where relative, is put beside `sweeps/`. UserError when another driver is at this sweep.
    """
    with lockfile.held(stem), closing(Store(stem, adopt=adopt)) as store:
        store.export()  # a record that could not be kept is refused before anything is trained
        try:
            driver = Driver(store, then)
            driver.want(wanted)
            if driver.queue:
                if said := stacks.note(driver.queue):
                    print(f"trials {said}", file=sys.stderr)
                with pool_module.open_pool(
                    driver.queue, workers, growing=then is not None, stem=stem
                ) as pool:
                    driver.drive(pool)
            return frame(trial for trial in store.trials() if trial.id in driver.wanted)
        finally:
            store.export()
