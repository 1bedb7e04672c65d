"""Decides how a trial of the user's trainer has ended, and writes that as a message."""

from __future__ import annotations

import math
import os
import platform
import re
import signal
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import Budget, Recipe
from scaletune.recipe.placeholders import fill_template
from scaletune.records import FINISHED_SHARE
from scaletune.sweeping.out_of_memory import OUT_OF_MEMORY
from scaletune.sweeping.plain_text import plain_text
from scaletune.sweeping.trainers.guard import End
from scaletune.sweeping.trainers.reports import Reports, thin
from scaletune.sweeping.trainers.start import working_folder

OVERRUN = 1.02
"""Share of the token budget that a trial may report at most."""
MESSAGE = 600  # characters of a message, at most
REPORT_END = "report the loss at the end of the training too"


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
        return lost_message(id, reason, ended)
    reports = ended.reports
    notes = [reason, *(_notes(recipe, ended) if status != "failed" else ())]
    trial = {
        "id": id,
        "status": status,
        "message": plain_text("; ".join(note for note in notes if note), MESSAGE),
        "loss": reports.loss if status == "done" else None,
        "train_loss": _train_loss(reports) if status == "done" else None,
        "seconds": round(ended.seconds, 3),
        "provenance": _provenance(),
        "metrics": _metrics(recipe, reports),
        **_counts(recipe, reports),
    }
    curve = [x for x in reports.train.values if math.isfinite(x)]
    return {"trial": trial, "curve": curve, "log": ended.output}


def lost_message(id: str, reason: str, ended: Ended | None = None) -> dict[str, Any]:
    """The message about a trial that is to be tried again."""
    return {
        "id": id,
        "lost": plain_text(reason, MESSAGE),
        "status": ended.end.status if ended else 0,
        "memory": ended is not None and ran_out_of_memory(ended),
        "log": ended.output if ended else "",
        # the reason is in the log's last lines too
        "explained": ended is None or bool(ended.reports.error),
        "stack": 1,
    }


def judge(recipe: Recipe, ended: Ended, values: Mapping[str, Any]) -> tuple[str, str]:
    """(status, reason) of an ended trial. "lost": it is to be tried again."""
    reports = ended.reports
    if reports.not_finite:
        good = [loss for loss in reports.held_out.values if math.isfinite(loss)]
        last = f"; last good loss {good[-1]:.4g}" if good else ""
        return "diverged", f"{reports.not_finite}{last}"
    if limit := _diverged_above(recipe, reports):
        return "diverged", limit
    finished = reports.result is not None or _at_end(recipe, reports)
    if ended.stopping == "search" and not _at_end(recipe, reports):
        return "stopped", _stopped_at(reports)
    if not finished and (failure := describe_failure(recipe, ended)):
        return "lost", failure
    if reports.loss is None and recipe.trainer.log:
        _read_log(recipe, reports, values)
    if reports.loss is None:
        return "failed", _no_loss(recipe, reports)
    if problem := _unfinished(recipe, reports):
        return "failed", problem
    return "done", ""


def describe_failure(recipe: Recipe, ended: Ended) -> str:
    """What went wrong with the process of a trial; empty if nothing did."""
    if ended.stopping == "silent":
        patience = recipe.engine.patience
        return f"it reported and printed nothing for {patience:g} s (`engine.patience`)"
    if ended.reports.error:
        return ended.reports.error
    return describe_exit(ended) if ended.end.status and not ended.stopping else ""


def _diverged_above(recipe: Recipe, reports: Reports) -> str:
    """Why the last loss is a divergence: above 2 ln(vocabulary), if the vocabulary is stated."""
    vocab = recipe.data.vocab_size
    if not vocab or reports.loss is None or reports.loss <= 2 * math.log(vocab):
        return ""
    return f"loss {reports.loss:.4g}, above 2 ln(vocabulary) = {2 * math.log(vocab):.4g}"


def _at_end(recipe: Recipe, reports: Reports) -> bool:
    """Whether the reports show a held-out loss at the end of the training."""
    points = reports.held_out.points
    return recipe.has_budget and bool(points) and _is_end(recipe.budget, points[-1][0])


def _is_end(budget: Budget, tokens: float, slack: float = 0.0) -> bool:
    """Whether so many tokens, or up to `slack` fewer, are the end of the training."""
    least = max(FINISHED_SHARE * budget.tokens - slack, budget.tokens / 2)
    return least <= tokens <= OVERRUN * budget.tokens


def _unfinished(recipe: Recipe, reports: Reports) -> str:
    """Why the last loss cannot be that of the end of the training; empty if it may be."""
    if not recipe.has_budget or not reports.tokens:
        return ""
    budget, curve = recipe.budget, reports.held_out
    last = reports.tokens if curve.ends_bare or not curve.points else curve.points[-1][0]
    at = f"its last loss is at {last:.6g} of `budget.tokens` = {budget.tokens:.6g} tokens"
    if last > OVERRUN * budget.tokens:
        return f"{at}: the trainer must train, and report, as many tokens as the recipe states"
    if _is_end(budget, last, slack=budget.batch_tokens):  # steps may be counted from 0
        return ""
    if budget.batch_tokens > 1 and 0.9 <= last / budget.steps <= 1.1:
        return f"{at}: `tokens` must count tokens, not steps"
    return "" if curve.ends_bare else f"{at}: {REPORT_END}"


def _stopped_at(reports: Reports) -> str:
    at = f" at {reports.tokens:.6g} tokens" if reports.tokens is not None else ""
    return f"stopped{at} by the search"


def _no_loss(recipe: Recipe, reports: Reports) -> str:
    if reports.rejected:
        return f"it reported no loss: {reports.rejected}"
    if reports.result is not None:
        result = str(reports.result)[:80] if reports.result else "None"
        return (
            "its function must return a loss or a dict with 'loss', or report a loss, but got"
            f" {result}"
        )
    if reports.train.last is not None:
        return (
            "it reported train_loss but no loss: report the held-out loss as `loss`, at least at"
            " the end"
        )
    if reports.invalid:
        return f"it reported no loss: {_invalid_lines(reports)}"
    if recipe.trainer.pattern:
        return (
            "exit status 0, but no line of its output matches `trainer.pattern` ="
            f" {recipe.trainer.pattern!r}"
        )
    if recipe.trainer.log:
        return f"exit status 0, but {reports.log_error}"
    return (
        "exit status 0, but it reported no loss: call scaletune.trial.report(loss=...), or set"
        " `trainer.pattern` or `trainer.log`"
    )


def _invalid_lines(reports: Reports) -> str:
    n = reports.invalid
    lines = "1 line of its results is" if n == 1 else f"{n} lines of its results are"
    first = "" if n == 1 else "the first: "
    return f"{lines} no JSON ({first}{reports.first_invalid})"


def _read_log(recipe: Recipe, reports: Reports, values: Mapping[str, Any]) -> None:
    """Adds the result in the trainer's own log.

    UserError is not raised: what is wrong with the log becomes the reason in the record.
    """
    from scaletune.sweeping.trainers.own_log import read_own_log

    log = fill_template("trainer.log", recipe.trainer.log, values)
    batch = recipe.budget.batch_tokens if recipe.has_budget else None
    try:
        report, doubt = read_own_log(os.path.join(working_folder(recipe, values), log), batch)
        reports.add(report)
        reports.strange = reports.strange or doubt
    except UserError as error:
        reports.log_error = f"`trainer.log`: {error}"


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


def _notes(recipe: Recipe, ended: Ended) -> list[str]:
    """What the user should know of a trial that has a result."""
    notes, reports, n = [], ended.reports, ended.end.remaining
    if ended.stopping != "search" and (failure := describe_failure(recipe, ended)):
        notes.append(f"after its result: {failure}")
    if n:
        processes = "1 process" if n == 1 else f"{n} processes"
        notes.append(f"{processes} that it left running: killed")
    if reports.invalid:
        notes.append(_invalid_lines(reports))
    if reports.rejected and (not recipe.trainer.pattern or _lacks_tokens(recipe, reports)):
        notes.append(reports.rejected)
    return [*notes, reports.strange]


def _lacks_tokens(recipe: Recipe, reports: Reports) -> bool:
    """Whether the pattern names tokens or steps, but what it finds is never a number."""
    return reports.tokens is None and bool(re.search(r"<(tokens|step)>", recipe.trainer.pattern))


def _train_loss(reports: Reports) -> float | None:
    """The mean training loss of the last tenth of the reports."""
    losses = reports.train.values
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


def _curve(recipe: Recipe, reports: Reports) -> list[list[Any]]:
    """[tokens, held-out loss], tokens None where they are not known.

    A last loss without tokens, such as what a function returns, is that of the end.
    """
    points: list[list[Any]] = [*reports.held_out.points]
    bare, end = [*reports.held_out.bare], reports.tokens
    if reports.held_out.ends_bare and (recipe.has_budget or end is not None):
        tokens = recipe.budget.tokens if recipe.has_budget else end
        last = [tokens, bare.pop()]
        points = [*(point for point in points if point[0] < tokens), last]
    return [*([None, loss] for loss in bare), *points]


def _metrics(recipe: Recipe, reports: Reports) -> dict[str, Any]:
    curve = thin([point for point in _curve(recipe, reports) if math.isfinite(point[1])])
    metrics: dict[str, Any] = {"held_out": curve}
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
