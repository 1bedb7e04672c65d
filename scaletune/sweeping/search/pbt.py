"""Population-based training as a search (arXiv:1711.09846).

The values of the `lr` axis are the members' initial learning rates; one worker trains a cell's
population as one stacked model. What is recorded are the surviving lineages, each as the ordinary
trial that it equals (`scaletune.training.pbt`). The result depends on the recipe only: an
interrupted population restarts from its first step, and a recorded one is not trained again.
"""

from __future__ import annotations

import sys
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings
from scaletune.records import Store, Trial, digest, frame
from scaletune.sweeping.driver import train_all
from scaletune.sweeping.search.space import Cell, build_cells, write_notes
from scaletune.sweeping.task import Task, tasks

if TYPE_CHECKING:
    import pandas as pd


def run_populations(
    recipe: Recipe, stem: Path, *, adopt: bool = False
) -> tuple[list[Task], pd.DataFrame]:
    """Trains one population per cell and records its surviving lineages as ordinary trials.

    Args:
        recipe: A recipe with `search.kind = "pbt"`.
        stem: Path of the sweep's files without suffix.
        adopt: Accept the trials of an existing `.jsonl` record.

    Returns:
        The lineages as tasks, and their trials as a table with one row per lineage.
    """
    cells = build_cells(recipe)
    populations = [_population_task(cell, recipe) for cell in cells]
    with closing(Store(stem, adopt=adopt)) as store:
        missing = [task for task in populations if not store.read_lineages(task.id)]
    train_all(missing, stem, recipe.engine.workers, adopt=adopt)
    with closing(Store(stem)) as store:
        by_id = {trial.id: trial for trial in store.trials()}
        lineages = [[by_id[i] for i in store.read_lineages(task.id)] for task in populations]
    for cell, trials in zip(cells, lineages, strict=True):
        cell.add_note(_describe_lineages(trials, len(recipe.axes["lr"])))
        print(f"search: {cell.notes[-1]}", file=sys.stderr)
    write_notes(cells, stem)
    points = [
        with_settings(cell.base, {"lr": trial.lr, "schedule": trial.point["schedule"]})
        for cell, trials in zip(cells, lineages, strict=True)
        for trial in trials
    ]
    return tasks("main", points), frame(trial for trials in lineages for trial in trials)


def _population_task(cell: Cell, recipe: Recipe) -> Task:
    """The cell's base recipe and the initial lr of each member, as one task."""
    search, engine, rates = recipe.search, recipe.engine, cell.axes[0]
    if recipe.foreign:
        raise UserError(
            "search.kind 'pbt' copies weights from trial to trial, which only scaletune's own loop"
            " can do (also for `model.build`), but the recipe has its own `trainer`: use 'basin',"
            " 'joint', 'pareto' or 'optuna'"
        )
    if cell.base.schedule.kind != "constant":
        raise UserError(
            "`schedule.kind` must be 'constant' with search.kind 'pbt', which finds the schedule"
            f" itself, but got {cell.base.schedule.kind!r}"
        )
    if len(rates) < 2:
        raise UserError(
            "a population must have two or more members, one per value of `axes.lr`, but got"
            f" lr = {rates}"
        )
    if engine.checkpoint_every or engine.trackers:
        raise UserError(
            "`engine.checkpoint_every` must be 0 and `engine.trackers` empty with search.kind"
            f" 'pbt', but got {engine.checkpoint_every} and {engine.trackers}"
        )
    settings = {"lr": rates, "every": search.every, "factor": search.factor, "seed": search.seed}
    first = tasks("main", [cell.recipe((lr,)) for lr in rates])[0]
    id = digest({"member": first.id, **settings})
    return Task("main", first.recipe, id, first.cost * len(rates), population=settings)


def _describe_lineages(trials: list[Trial], members: int) -> str:
    """The number of surviving lineages, and the learning rates of the best one."""
    done = [trial for trial in trials if trial.loss is not None]
    if not done:
        return f"none of {members} members survived: all diverged, or their worker was lost"
    best = min(done, key=lambda trial: trial.loss or 0.0)
    schedule = best.point["schedule"]
    steps = zip(schedule["shares"] or [0.0], schedule["multipliers"] or [1.0], strict=True)
    path = ", ".join(f"{best.lr * by:.3g} from {100 * share:.3g} %" for share, by in steps)
    return (
        f"{members} members, {len(trials)} surviving lineages; the best has loss {best.loss:.4f}"
        f" and lr {path} of the tokens"
    )
