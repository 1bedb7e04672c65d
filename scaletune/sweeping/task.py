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
    """One trial to train: which sweep asked, the point, its id, and how often it was started."""

    sweep: str
    recipe: Recipe
    id: str
    cost: float  # seconds, guessed
    tries: int = 0
    population: dict[str, Any] | None = None  # lr of each member, every, factor, seed: recorded as the lineages that are left, not as `id`
    shared: dict[str, Any] | None = None  # what trials must have in common with it to stack


def tasks(sweep: str, points: Sequence[Recipe]) -> list[Task]:
    """One task a point. Reads the corpus: its digest is part of a trial's identity."""
    made = []
    for point in points:
        corpus = data.load(point.data)
        data.fits(point, corpus)
        counting.multipliers(point, corpus.vocab_size)  # refuses a form that cannot tie its head, before a worker dies on it
        cost = counting.seconds(point, corpus.vocab_size)
        made.append(Task(sweep, point, recipes.identity(point, corpus.digest), cost))
    return made


def failed(task: Task, message: str) -> Trial:
    """The record of a trial that could not be trained."""
    corpus = data.load(task.recipe.data)
    known = counting.trial_fields(task.recipe, task.sweep, corpus.vocab_size, corpus.digest)
    return Trial(**known, status="failed", message=scrubbed(message), loss=None, train_loss=None, seconds=0.0)
