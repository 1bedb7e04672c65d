"""`Task`: one trial that is to be trained."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from scaletune import counting, data
from scaletune import recipe as recipes
from scaletune.recipe import Recipe
from scaletune.recipe.placeholder_values import require_stated
from scaletune.records import Trial, redact
from scaletune.sweeping.sizes import Sizes, estimate_flops, point_sizes, size_key
from scaletune.zoo import OwnConfig


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
    sizes: Sizes | None = None
    """What is known of the point before it is trained."""
    alone: str | None = None
    """Cached: why a user's module cannot train in a stack; empty if it can."""
    trunk: str | None = None
    """Cached: key that token horizons on one trunk have in common; empty if it trains apart."""


def tasks(sweep: str, points: Sequence[Recipe]) -> list[Task]:
    """One task per point.

    Reads the corpus, because its digest is part of a trial's identity. Points of the same shape are
    checked and their sizes are computed once.

    Raises:
        UserError: No worker could train a point.
    """
    known: dict[tuple[Any, ...], Sizes] = {}
    new = []
    for point in points:
        key = size_key(point)
        if key not in known:
            require_stated(point)
            known[key] = point_sizes(point)
        sizes = known[key]
        id = recipes.trial_id(point, sizes.digest)
        new.append(Task(sweep, point, id, sizes.seconds, sizes=sizes))
    return new


def failed_trial(task: Task, message: str) -> Trial:
    """The record of a trial that could not be trained."""
    end: dict[str, Any] = {"status": "failed", "message": redact(message), "seconds": 0.0}
    if task.recipe.foreign:
        return complete_trial(task, end)
    corpus = data.load(task.recipe.data)
    known = counting.trial_fields(
        task.recipe, task.sweep, corpus.vocab_size, corpus.digest, _own_counts(task, corpus)
    )
    return Trial(**known, **end, loss=None, train_loss=None)


def _own_counts(task: Task, corpus: data.Corpus) -> counting.ModelCounts | None:
    """The counts of a user's module; None for a model of the zoo."""
    if not isinstance(task.recipe.model, OwnConfig):
        return None
    from scaletune.parametrizing.model_counts import count_model  # imports torch

    return count_model(task.recipe, corpus.vocab_size, corpus.features)


def complete_trial(task: Task, reported: Mapping[str, Any]) -> Trial:
    """The record of a trial of the user's trainer: what was known before, and what it reported.

    A count that the trial reports replaces the one that was stated or described. What nobody
    stated is null.
    """
    recipe, sizes = task.recipe, task.sizes or point_sizes(task.recipe)
    n_params, total, tokens, batch_tokens = (
        reported.get(name, getattr(sizes, name))
        for name in ("n_params", "n_params_total", "tokens", "batch_tokens")
    )
    flops, source = estimate_flops(*map(or_nan, (n_params, total, tokens)))
    if sizes.flops_from in ("described", "model"):
        flops, source = sizes.flops, sizes.flops_from
    if reported.get("flops"):
        flops, source = reported["flops"], "reported"
    optimizer = recipe.optimizer
    known = {
        "id": task.id,
        "sweep": task.sweep,
        "point": recipe.point(),
        "n_params": _count(n_params),
        "n_params_total": _count(total),
        "tokens": _count(tokens),
        "batch_tokens": _count(batch_tokens),
        "seq_len": recipe.data.seq_len if recipe.states("data.seq_len") else None,
        "width": recipe.model.width,
        "depth": recipe.model.depth,
        "lr": optimizer.lr if recipe.states("optimizer.lr") else None,
        "weight_decay": optimizer.weight_decay if recipe.states("optimizer.weight_decay") else None,
        "seed": recipe.seed,
        "flops": None if math.isnan(flops) else flops,
    }
    ended = {name: value for name, value in reported.items() if name not in known}
    origin = {} if math.isnan(flops) else {"flops_from": source}
    ended["metrics"] = {**reported.get("metrics", {}), **origin}
    return Trial(**{"loss": None, "train_loss": None, **known, **ended})


def or_nan(value: float | None) -> float:
    """NaN in the place of None."""
    return math.nan if value is None else value


def _count(value: float | None) -> int | None:
    return None if value is None or math.isnan(value) else int(value)
