"""`Task`: one trial that is to be trained."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaletune import counting, data
from scaletune import recipe as recipes
from scaletune.recipe import Recipe
from scaletune.records import Trial, redact


@dataclass
class Task:
    """One trial to train, and the state of its training."""

    sweep: str
    """Which part of the study requested it: "main", "validation" or a comparison's name."""
    recipe: Recipe
    id: str
    cost: float
    """Estimated seconds of training."""
    tries: int = 0
    """How often its worker died or hung."""
    shrunk: int = 0
    """How many of these tries ran out of memory and were followed by a smaller one."""
    most: int | None = None
    """Largest stack that it may train in; None until its worker has died."""
    population: dict[str, Any] | None = None
    """Population-based training: the members' `lr`, and `every`, `factor` and `seed`. Such a task
    is recorded as its surviving lineages, not under `id`."""
    shared: dict[str, Any] | None = None
    """Cached: settings that trials of one stack have in common."""
    trunk: str | None = None
    """Cached: key that token horizons on one trunk have in common; empty if it trains apart."""


def tasks(sweep: str, points: Sequence[Recipe]) -> list[Task]:
    """One task per point.

    Reads the corpus, because its digest is part of a trial's identity. Points of the same shape are
    checked and their cost is estimated once.

    Raises:
        UserError: No worker could train a point.
    """
    checked: dict[tuple[Any, ...], tuple[str, float]] = {}
    new = []
    for point in points:
        shape = point.model, point.parametrization, point.optimizer.rule, point.data, point.budget
        if shape not in checked:
            checked[shape] = _check(point)
        digest, cost = checked[shape]
        new.append(Task(sweep, point, recipes.trial_id(point, digest), cost))
    return new


def _check(point: Recipe) -> tuple[str, float]:
    """(digest of the corpus, estimated seconds); UserError if no worker could train the point."""
    corpus = data.load(point.data)
    data.check_recipe(point, corpus)
    counting.multipliers(point, corpus.vocab_size)  # refuses a form that cannot tie its head
    return corpus.digest, counting.seconds(point, corpus.vocab_size)


def failed_trial(task: Task, message: str) -> Trial:
    """The record of a trial that could not be trained."""
    corpus = data.load(task.recipe.data)
    known = counting.trial_fields(task.recipe, task.sweep, corpus.vocab_size, corpus.digest)
    return Trial(
        **known, status="failed", message=redact(message), loss=None, train_loss=None, seconds=0.0
    )
