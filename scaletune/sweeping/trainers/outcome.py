"""Decides how a trial of the user's trainer has ended, and writes that as a message."""

from __future__ import annotations

import math
import platform
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.recipe.placeholders import fill_template
from scaletune.sweeping.out_of_memory import OUT_OF_MEMORY
from scaletune.sweeping.trainers.guard import End
from scaletune.sweeping.trainers.reports import Reports, thin

FINISHED_SHARE = 0.98
"""Share of the token budget at which the last loss must have been measured, as in `importing`."""
OVERRUN = 1.02
"""Share of the token budget that a trial may report at most."""


@dataclass
class Ended:
    """What is known of a trial whose process has ended."""

    end: End
    reports: Reports
    stopping: str
    """Why it was stopped; empty if it ended by itself."""
    seconds: float
    output: str
    """The end of its output."""
    kernel_killed: bool
    """Whether the kernel killed a process for lack of memory meanwhile."""


def describe_message(
    recipe: Recipe, id: str, ended: Ended, values: Mapping[str, Any]
) -> dict[str, Any]:
    """The message about an ended trial: {"trial": ...} as far as it is known, or {"lost": ...}."""
    status, reason = judge(recipe, ended, values)
    if status == "lost":
        return {
            "id": id,
            "lost": reason,
            "status": ended.end.status,
            "memory": ran_out_of_memory(ended),
            "log": ended.output,
            "stack": 1,
        }
    reports = ended.reports
    notes = [reason, *(_notes(ended) if status != "failed" else ())]
    trial = {
        "id": id,
        "status": status,
        "message": "; ".join(note for note in notes if note),
        "loss": reports.loss if status == "done" else None,
        "train_loss": _train_loss(reports) if status == "done" else None,
        "seconds": round(ended.seconds, 3),
        "provenance": _provenance(),
        "metrics": _metrics(reports),
        **_counts(recipe, reports),
    }
    curve = [x for x in reports.train_losses if math.isfinite(x)]
    return {"trial": trial, "curve": curve, "log": ended.output}


def judge(recipe: Recipe, ended: Ended, values: Mapping[str, Any]) -> tuple[str, str]:
    """(status, reason) of an ended trial. "lost": it is to be tried again."""
    reports, status = ended.reports, ended.end.status
    if reports.not_finite:
        good = [point for point in reports.held_out if math.isfinite(point[1])]
        last = f"; last good loss {good[-1][1]:.4g}" if good else ""
        return "diverged", f"{reports.not_finite}{last}"
    if limit := _diverged_above(recipe, reports):
        return "diverged", limit
    if ended.stopping == "silent":
        patience = recipe.engine.patience
        return "lost", f"it reported and printed nothing for {patience:g} s (`engine.patience`)"
    if reports.error:
        return "lost", reports.error
    if ended.stopping == "search" and not _at_end(recipe, reports):
        return "stopped", _stopped_at(reports)
    if status and reports.result is None and not _at_end(recipe, reports):
        return "lost", describe_exit(ended)
    if reports.loss is None and recipe.trainer.log:
        _read_log(recipe, reports, values)
    if reports.loss is None:
        return "failed", _no_loss(recipe, reports)
    if problem := _unfinished(recipe, reports):
        return "failed", problem
    return "done", ""


def _diverged_above(recipe: Recipe, reports: Reports) -> str:
    """Why the last loss is a divergence: above 2 ln(vocabulary), if the vocabulary is stated."""
    vocab = recipe.data.vocab_size
    if not vocab or reports.loss is None or reports.loss <= 2 * math.log(vocab):
        return ""
    return f"loss {reports.loss:.4g}, above 2 ln(vocabulary) = {2 * math.log(vocab):.4g}"


def _at_end(recipe: Recipe, reports: Reports) -> bool:
    """Whether the reports show that the last loss is that of the end of the training."""
    measured = bool(reports.held_out) and not math.isnan(reports.held_out[-1][0])
    return recipe.has_budget and measured and not _unfinished(recipe, reports)


def _unfinished(recipe: Recipe, reports: Reports) -> str:
    """Why the last loss cannot be that of the end of the training; empty if it may be."""
    if not recipe.has_budget or not reports.held_out:
        return ""
    tokens, budget = reports.held_out[-1][0], recipe.budget.tokens
    if math.isnan(tokens) or FINISHED_SHARE * budget <= tokens <= OVERRUN * budget:
        return ""
    share = tokens / budget
    at = f"its last loss is at {tokens:.6g} of `budget.tokens` = {budget:.6g} tokens"
    if share > OVERRUN:
        return f"{at}: the trainer must train, and report, as many tokens as the recipe states"
    return (
        f"{at}: report the loss at the end of the training too (`tokens` counts tokens, not steps)"
    )


def _stopped_at(reports: Reports) -> str:
    at = f" at {reports.tokens:.6g} tokens" if reports.tokens is not None else ""
    return f"stopped{at} by the search"


def _no_loss(recipe: Recipe, reports: Reports) -> str:
    if reports.result is not None:
        return (
            "its function must return a loss or a dict with 'loss', or report a loss, but got"
            f" {str(reports.result)[:80]}"
        )
    if reports.train_losses:
        return (
            "it reported train_loss but no loss: report the held-out loss as `loss`, at least at"
            " the end"
        )
    if reports.invalid:
        return (
            f"it reported no loss: {reports.invalid} lines of its results are no JSON objects, the"
            f" first is {reports.first_invalid}"
        )
    if recipe.trainer.pattern:
        return (
            "exit status 0, but no line of its output matches `trainer.pattern` ="
            f" {recipe.trainer.pattern!r}"
        )
    return (
        "exit status 0, but it reported no loss: call scaletune.trial.report(loss=...), or set"
        " `trainer.pattern` or `trainer.log`"
    )


def _read_log(recipe: Recipe, reports: Reports, values: Mapping[str, Any]) -> None:
    """Adds the result in the trainer's own log.

    UserError is not raised: what is wrong with the log becomes the reason in the record.
    """
    from scaletune.sweeping.trainers.own_log import read_own_log

    path = fill_template("trainer.log", recipe.trainer.log, values)
    try:
        reports.add(read_own_log(path))
    except UserError as error:
        reports.invalid, reports.first_invalid = 1, f"`trainer.log`: {error}"


def describe_exit(ended: Ended) -> str:
    """`exit status 1`, `killed by SIGSEGV`, `out of memory`."""
    status = ended.end.status
    if ran_out_of_memory(ended):
        return "out of memory"
    if status >= 0:
        return f"exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def ran_out_of_memory(ended: Ended) -> bool:
    """Whether the output says so, or the kernel killed it while it counted a kill."""
    killed = ended.end.status in (-signal.SIGKILL, 128 + signal.SIGKILL) and ended.kernel_killed
    return killed or (bool(ended.end.status) and bool(OUT_OF_MEMORY.search(ended.output)))


def _notes(ended: Ended) -> list[str]:
    """What the user should know of a trial that has a result."""
    notes, reports = [], ended.reports
    if ended.end.status and not ended.stopping:
        notes.append(f"after its result it ended with {describe_exit(ended)}")
    if ended.end.remaining:
        notes.append(f"{ended.end.remaining} processes that it left running were killed")
    if reports.invalid:
        notes.append(f"{reports.invalid} lines of its results were no JSON objects")
    return notes


def _train_loss(reports: Reports) -> float | None:
    """The mean training loss of the last tenth of the reports."""
    losses = reports.train_losses
    last = losses[-max(1, len(losses) // 10) :]
    return sum(last) / len(last) if last else None


def _provenance() -> dict[str, Any]:
    return {
        "scaletune": version("scaletune"),
        "python": platform.python_version(),
        "device": platform.machine(),
        "host": platform.node(),
        "at": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _metrics(reports: Reports) -> dict[str, Any]:
    points = thin([point for point in reports.held_out if math.isfinite(point[1])])
    metrics: dict[str, Any] = {"held_out": [[None if t != t else t, loss] for t, loss in points]}
    if reports.own:
        metrics["reported"] = reports.own
    if reports.tokens is not None:
        metrics["tokens_seen"] = reports.tokens
    return metrics


def _counts(recipe: Recipe, reports: Reports) -> dict[str, Any]:
    """The counts that the trial reported. They replace what was described before training."""
    counts: dict[str, Any] = {
        name: int(value) for name, value in reports.counts.items() if name != "flops"
    }
    if "flops" in reports.counts:
        counts["flops"] = reports.counts["flops"]
    if reports.tokens is not None and not recipe.has_budget:
        counts["tokens"] = int(reports.tokens)
    return counts
