"""`Task`: one trial to train."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaletune import counting, data
from scaletune import recipe as recipes
from scaletune.recipe import Recipe
from scaletune.records import Trial, scrubbed


@dataclass
class Task:
    """One trial to train: which sweep asked, the point, its id, and how often its worker died of it."""

    sweep: str
    recipe: Recipe
    id: str
    cost: float  # seconds, guessed
    tries: int = 0
    shrunk: int = 0  # of these, ended for want of memory and was made smaller
    most: int | None = None  # trials of the stack it may be in, since a worker died of it
    population: dict[str, Any] | None = (
        None  # lr of each member, every, factor, seed: recorded as the lineages that are left, not as `id`
    )
    shared: dict[str, Any] | None = None  # what trials must have in common with it to stack
    trunk: str | None = None  # what horizons must have in common with it to share a trunk


def tasks(sweep: str, points: Sequence[Recipe]) -> list[Task]:
    """One task a point. Reads the corpus: its digest is part of a trial's identity. What points share is looked at once."""
    judged: dict[tuple[Any, ...], tuple[str, float]] = {}
    made = []
    for point in points:
        shape = point.model, point.parametrization, point.optimizer.rule, point.data, point.budget
        if shape not in judged:
            judged[shape] = _judged(point)
        digest, cost = judged[shape]
        made.append(Task(sweep, point, recipes.identity(point, digest), cost))
    return made


def _judged(point: Recipe) -> tuple[str, float]:
    """(digest of the corpus, seconds guessed); UserError on a point that no worker could train."""
    corpus = data.load(point.data)
    data.fits(point, corpus)
    counting.multipliers(
        point, corpus.vocab_size
    )  # refuses a form that cannot tie its head, before a worker dies on it
    return corpus.digest, counting.seconds(point, corpus.vocab_size)


def failed(task: Task, message: str) -> Trial:
    """The record of a trial that could not be trained."""
    corpus = data.load(task.recipe.data)
    known = counting.trial_fields(task.recipe, task.sweep, corpus.vocab_size, corpus.digest)
    return Trial(
        **known, status="failed", message=scrubbed(message), loss=None, train_loss=None, seconds=0.0
    )
