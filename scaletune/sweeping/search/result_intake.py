"""Records the results of trials that others train."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from scaletune.errors import UserError
from scaletune.records import Store, Trial
from scaletune.records.pending_trial import PendingTrial
from scaletune.sweeping.task import Task, complete_trial
from scaletune.sweeping.trainers.external_result import conclude, read_rows

COMPARED = (
    *("loss", "train_loss", "tokens", "n_params", "n_params_total", "batch_tokens"),
    *("flops", "seconds"),
)
"""Fields of a record that a result may state."""


def record_result(
    store: Store,
    task: Task,
    pending: PendingTrial | None,
    rows: Sequence[dict[str, Any]],
    replace: bool,
) -> tuple[Trial | None, bool]:
    """Records the result of a trial.

    Args:
        store: The database.
        task: The trial.
        pending: The trial as it is handed out, with its earlier reports; None if it is not.
        rows: What is reported of it now.
        replace: Whether to replace another result.

    Returns:
        The record of the trial, and whether it is new. No record: the trial is not at its end.

    Raises:
        UserError: A value is not valid, or another result is recorded.
    """
    earlier = pending.rows if pending else []
    new_rows = [row for row in rows if row not in earlier]
    result = read_rows(task.recipe, task.id, [*earlier, *new_rows])
    reported = conclude(task.recipe, task.id, result)
    recorded = {} if pending else {trial.id: trial for trial in store.trials()}
    old = recorded.get(task.id)
    if reported is None:
        return old, False
    if old and old.metrics.get("flops_from") == "reported":
        reported = {"flops": old.flops, **reported}
    trial = complete_trial(task, reported)
    if store.put(trial):
        return trial, True
    old = next(each for each in store.trials() if each.id == trial.id)
    change = _first_change(old, trial, rows)
    if change and not replace:
        raise UserError(
            f"a trial has one result, but {trial.id} has {change[0]} and now got {change[1]}:"
            " `--replace` (Python: replace=True) replaces it"
        )
    if change:
        store.replace(trial)
    return (trial, True) if change else (old, False)


def _first_change(
    old: Trial, new: Trial, rows: Sequence[Mapping[str, Any]]
) -> tuple[str, str] | None:
    """What is recorded, and what is reported instead, of the values that the rows state."""
    stated = {name for row in rows for name in {**row, **(row.get("result") or {})}}
    pairs = [
        (name, getattr(old, name), getattr(new, name))
        for name in ("status", *COMPARED)
        if name == "status" or name in stated
    ]
    own, own_now = (trial.metrics.get("reported", {}) for trial in (old, new))
    pairs += [(name, own.get(name), value) for name, value in own_now.items()]
    return next(
        ((f"{name} {before}", f"{name} {now}") for name, before, now in pairs if before != now),
        None,
    )
