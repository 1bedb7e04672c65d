"""Population-based training as a search: the `lr` axis is a cell's first population, which one worker trains as one model.

What is on record are the lineages that are left, each the ordinary trial that it is (`scaletune.training.pbt`). Deterministic given
the recipe, so a killed driver's rerun trains a population again from its start, and one that is on record not at all.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune import sweeping
from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings
from scaletune.records import Store, Trial, digest, frame
from scaletune.sweeping.search.space import Cell, cells, write_notes
from scaletune.sweeping.task import Task

if TYPE_CHECKING:
    import pandas as pd


def bred(recipe: Recipe, stem: Path, *, adopt: bool = False) -> tuple[list[Task], pd.DataFrame]:
    """Train a population in each cell, but those that are on record: the lineages as tasks, and their trials."""
    found = cells(recipe)
    populations = [_population(cell, recipe) for cell in found]
    with closing(Store(stem, adopt=adopt)) as store:
        wanted = [task for task in populations if not store.lineages(task.id)]
    sweeping.train_all(wanted, stem, recipe.engine.workers, adopt=adopt)
    with closing(Store(stem)) as store:
        by_id = {trial.id: trial for trial in store.trials()}
        left = [[by_id[i] for i in store.lineages(task.id)] for task in populations]
    for cell, trials in zip(found, left, strict=True):
        cell.say(_told(trials, len(recipe.axes["lr"])))
        print(f"search: {cell.notes[-1]}", file=sys.stderr)
    write_notes(found, stem)
    points = [
        with_settings(cell.base, {"lr": trial.lr, "schedule": trial.point["schedule"]})
        for cell, trials in zip(found, left, strict=True)
        for trial in trials
    ]
    return sweeping.tasks("main", points), frame(trial for trials in left for trial in trials)


def _population(cell: Cell, recipe: Recipe) -> Task:
    """One order: the cell's base, and the lr of each member."""
    search, engine, rates = recipe.search, recipe.engine, cell.axes[0]
    if cell.base.schedule.kind != "constant":
        raise UserError(
            f"search.kind 'pbt' finds the schedule itself: `schedule.kind` must be 'constant', but got {cell.base.schedule.kind!r}"
        )
    if len(rates) < 2:
        raise UserError(
            f"a population is two members or more, one for each lr of the axis, but got lr = {rates}"
        )
    if engine.checkpoint_every or engine.trackers:
        raise UserError(
            "a population writes no files of its own: `engine.checkpoint_every` must be 0 and `engine.trackers` empty"
        )
    how = {"lr": rates, "every": search.every, "factor": search.factor, "seed": search.seed}
    first = sweeping.tasks("main", [cell.recipe((lr,)) for lr in rates])[0]
    return Task(
        "main",
        first.recipe,
        digest({"member": first.id, **how}),
        first.cost * len(rates),
        population=how,
    )


def _told(trials: list[Trial], members: int) -> str:
    """The best lineage and how its lr went."""
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        return f"none of {members} members is left: all have diverged, or their worker was lost"
    best = min(done, key=lambda trial: trial.loss or 0.0)
    schedule = best.point["schedule"]
    steps = zip(schedule["shares"] or [0.0], schedule["multipliers"] or [1.0], strict=True)
    path = ", ".join(f"{best.lr * by:.3g} from {100 * share:.3g} %" for share, by in steps)
    return (
        f"{members} members, {len(trials)} lineages left; the best, loss {best.loss:.4f}: lr {path}"
    )
