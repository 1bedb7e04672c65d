"""Tasks that others train, as plain values in the database of a sweep."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import asdict
from datetime import UTC, datetime

from scaletune.errors import UserError
from scaletune.recipe import validate_recipe
from scaletune.records import Store, Trial
from scaletune.records.pending_trial import PendingTrial, pending_trials, request
from scaletune.sweeping.sizes import Sizes
from scaletune.sweeping.task import Task, or_nan


def to_pending(task: Task) -> PendingTrial:
    """A task as a pending trial that is not handed out yet."""
    sizes = asdict(task.sizes or Sizes())
    known = {name: value for name, value in sizes.items() if value == value}
    plain = {"sweep": task.sweep, "recipe": task.recipe.dump(), "sizes": known}
    return PendingTrial(id=task.id, task=plain)


def to_task(trial: PendingTrial) -> Task:
    """The task of a pending trial."""
    recipe = validate_recipe(trial.task["recipe"], "recipe")
    sizes = Sizes(**trial.task["sizes"])
    return Task(trial.task["sweep"], recipe, trial.id, sizes.seconds, sizes=sizes)


def recorded_task(trial: Trial) -> Task:
    """The task of a recorded trial of a user's trainer."""
    sizes = Sizes(
        n_params=or_nan(trial.n_params),
        n_params_total=or_nan(trial.n_params_total),
        tokens=or_nan(trial.tokens),
        batch_tokens=or_nan(trial.batch_tokens),
        flops=or_nan(trial.flops),
        flops_from=trial.metrics.get("flops_from", ""),
    )
    return Task(trial.sweep, validate_recipe(trial.point, "recipe"), trial.id, 0.0, sizes=sizes)


def require_own_trainer(store: Store, queue: Collection[Task]) -> None:
    """UserError if others are to train the queue; then `scaletune ask` hands it out."""
    if not any(task.recipe.trainer.external for task in queue):
        return
    request(store, map(to_pending, queue))
    trials = "1 trial has" if len(queue) == 1 else f"{len(queue)} trials have"
    raise UserError(
        f"all trials of `{store.database.stem}` must have a result, because others train them"
        f" (`trainer.external`), but {trials} none: `scaletune ask` hands out trials,"
        " `scaletune tell` takes results"
    )


def note_handed_out(store: Store, queue: Iterable[Task]) -> str:
    """A sentence on the trials of the queue that others may be training; empty if there is none."""
    ids = {task.id for task in queue}
    since = [t.since for t in pending_trials(store) if t.id in ids and t.since is not None]
    if not since:
        return ""
    day = datetime.fromtimestamp(min(since), UTC).isoformat(timespec="seconds")
    trials = "1 trial was" if len(since) == 1 else f"{len(since)} trials were"
    return (
        f"{trials} handed out by `scaletune ask` and have no result (the first on {day}):"
        " they are trained here"
    )


def note_recorded(ids: Collection[str], name: str) -> str:
    """A sentence on a function of a notebook or script whose trials are all recorded."""
    trials, verb = ("the trial", "is") if len(ids) == 1 else (f"all {len(ids)} trials", "are")
    return (
        f"nothing is trained: {trials} of `{name}` {verb} recorded, whatever its code is now; if it"
        " has changed, raise `trainer.version`"
    )
