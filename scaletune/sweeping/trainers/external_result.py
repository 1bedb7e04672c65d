"""The result of a trial that somebody else trained: what `scaletune tell` takes."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.recipe import Recipe
from scaletune.records import FINISHED_SHARE
from scaletune.sweeping.plain_text import plain_text
from scaletune.sweeping.trainers.guard import End
from scaletune.sweeping.trainers.outcome import MESSAGE, Ended, describe_message
from scaletune.sweeping.trainers.reports import MEASURES, Reports

STATUSES = ("done", "diverged", "stopped", "failed", "running")
"""What the status of a result may be. "running": measured on the way, the trial goes on."""
KEYS = ("id", "status", "message", "seconds")
"""Keys of a row besides those of a report."""


@dataclass
class ExternalResult:
    """All rows that were reported of a trial, as one."""

    reports: Reports
    status: str = ""
    """The status that a row states; empty if none does."""
    message: str = ""
    seconds: float | None = None


def read_rows(recipe: Recipe, id: str, rows: Sequence[Mapping[str, Any]]) -> ExternalResult:
    """The rows of a trial as one result; of a value that is given twice, the later one.

    Raises:
        UserError: A value is not valid, or there is neither a measurement nor a status.
    """
    batch = recipe.budget.batch_tokens if recipe.has_budget else None
    result = ExternalResult(Reports(batch))
    for row in rows:
        result.reports.add({name: v for name, v in row.items() if name not in KEYS})
        before = "" if result.status == "running" else result.status
        result.status = _status(id, row) or before
        result.message = str(row.get("message") or "") or result.message
        result.seconds = _seconds(id, row, result.seconds)
    if result.reports.rejected:
        raise UserError(f"trial {id}: {result.reports.rejected}")
    if result.reports.error and not result.status:
        result.status, result.message = "failed", result.reports.error
    if not result.status and not _measured(result.reports):
        keys = [key for row in rows for key in row if key != "id"]
        hint = nearest(keys[0], [*MEASURES, "status"]) if keys else ""
        raise UserError(
            f'a result must have a `loss`, or a `status` such as "failed", but that of trial {id}'
            f" has {', '.join(f'`{key}`' for key in keys) or 'nothing'}{hint}"
        )
    return result


def _measured(reports: Reports) -> bool:
    on_the_way = reports.tokens is not None and reports.train.last is not None
    return reports.loss is not None or on_the_way or bool(reports.not_finite)


def _status(id: str, row: Mapping[str, Any]) -> str:
    status = row.get("status") or ""
    if status and status not in STATUSES:
        raise UserError(
            f"the `status` of trial {id} must be one of {', '.join(STATUSES)}, but got"
            f" {status!r}{nearest(str(status), STATUSES)}"
        )
    return str(status)


def _seconds(id: str, row: Mapping[str, Any], before: float | None) -> float | None:
    seconds = row.get("seconds")
    if seconds is None:
        return before
    number = isinstance(seconds, int | float) and not isinstance(seconds, bool)
    if not number or not math.isfinite(seconds) or seconds < 0:
        raise UserError(
            f"the `seconds` of trial {id} must be a number of at least 0, but got {seconds!r}"
        )
    return float(seconds)


def conclude(recipe: Recipe, id: str, result: ExternalResult) -> dict[str, Any] | None:
    """What a finished trial reported, for its record; None if the trial is not at its end.

    Args:
        recipe: The trial's point.
        id: The trial's id.
        result: All that was reported of it.

    Raises:
        UserError: The loss cannot be that of the end of the training, but must be.
    """
    reports, status = result.reports, result.status
    if status == "running" and not reports.not_finite:
        return None
    trial = _judge(recipe, id, result)
    if status in ("failed", "stopped"):
        default = "stopped before its end" if status == "stopped" else "no reason was given"
        return _without_loss(trial, status, result.message or default)
    if trial["status"] == "diverged" or status == "diverged":
        reason = trial["message"] if trial["status"] == "diverged" else "reported as diverged"
        return _without_loss(trial, "diverged", result.message or reason)
    if trial["status"] == "failed":
        if not status and _on_the_way(recipe, reports):
            return None
        raise UserError(f"trial {id} cannot be done, because {trial['message']}")
    return trial | {"message": "; ".join(filter(None, (result.message, trial["message"])))}


def _on_the_way(recipe: Recipe, reports: Reports) -> bool:
    """Whether the last loss, if there is one, was measured before the end of the training."""
    if reports.loss is None:
        return True
    tokens = reports.held_out.points[-1][0]
    return tokens < FINISHED_SHARE * recipe.budget.tokens


def _judge(recipe: Recipe, id: str, result: ExternalResult) -> dict[str, Any]:
    """What the trial would be if its process had ended now, without an error."""
    reports, error = result.reports, result.reports.error
    reports.error = ""
    without_log = recipe.trainer.model_copy(update={"log": "", "pattern": ""})
    ended = Ended(End(0), reports, "", result.seconds or 0.0, "", kernel_killed=False)
    trial = describe_message(
        recipe.model_copy(update={"trainer": without_log}), id, ended, values={}
    )["trial"]
    reports.error = error
    now = datetime.now(UTC).isoformat(timespec="seconds")
    provenance = {"scaletune": version("scaletune"), "at": now, "trained_by": "others"}
    return dict(trial) | {"seconds": result.seconds, "provenance": provenance}


def _without_loss(trial: dict[str, Any], status: str, message: str) -> dict[str, Any]:
    empty = {"status": status, "loss": None, "train_loss": None}
    return trial | empty | {"message": plain_text(message, MESSAGE)}
