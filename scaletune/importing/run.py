"""`ImportedRun`: one run as a tracker stores it, and `RunTable`: runs as a table.

Every reader returns `ImportedRun`s. What is true of all trackers is decided here and in the
modules that work on a `RunTable`, so that no reader has rules of its own: which loss is the last
one, which learning rate is the peak, whether a run finished.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from scaletune.importing.missed_peak import missed_peaks
from scaletune.importing.names import USUAL_NAMES, find_names, is_loss, is_lr

if TYPE_CHECKING:
    import pandas as pd

Setting = float | str | None
Point = tuple[int, float]


@dataclass
class ImportedRun:
    """One training run read from the files of a tracker."""

    id: str
    """Unique id of the run in its tracker."""

    name: str = ""
    """Display name, which several runs may share."""

    config: dict[str, Setting] = field(default_factory=dict)
    """Settings by name, as they were given; nested ones have dotted names."""

    history: dict[str, list[Point]] = field(default_factory=dict)
    """(step, value) pairs of each metric; a value may be NaN or infinite."""

    status: str = "done"
    """ "done", "failed" (did not finish) or "diverged", as the tracker knows it."""

    message: str = ""
    """Why the status is not "done"; `states.read_state` gives both."""

    counts_calls: bool = False
    """Whether a step may be the tracker's own counter of log calls, as in W&B: the counter of all
    logged rows has no gaps. Readers decide it, since they see rows without numbers too."""

    notes: list[str] = field(default_factory=list)
    """What the reader assumed; `to_table` gives each sentence once."""

    absent: dict[str, str] = field(default_factory=dict)
    """Column of scaletune -> why the run does not have it, and what to do."""

    def add_settings(self, settings: Mapping[str, Any], prefix: str = "") -> None:
        """Adds settings; those of a nested table as `table.key`.

        Text that is a number becomes one: YAML reads `lr: 3e-4` as text.
        """
        for key, value in settings.items():
            if isinstance(value, Mapping):
                self.add_settings(value, f"{prefix}{key}.")
            elif isinstance(value, (int, float, str)):
                self.config[f"{prefix}{key}"] = _parse(value)

    def add_point(self, key: str, step: int, value: Any) -> None:
        """Adds one logged value. "NaN" and "Infinity" are numbers; other text is left out."""
        number = to_number(value)
        if number is not None:
            self.history.setdefault(key, []).append((step, number))

    def merge(self, later: ImportedRun) -> None:
        """Continues this run with the run that resumed it.

        Of steps that both logged, the values of the later one count.
        """
        for key, points in later.history.items():
            first = min((step for step, _ in points), default=0)
            kept = [point for point in self.history.get(key, []) if point[0] < first]
            self.history[key] = kept + points
        self.config |= later.config
        self.status, self.message = later.status, later.message
        self.counts_calls |= later.counts_calls

    def shorten(self) -> None:
        """Keeps of each metric its first, highest and last value, to save memory.

        The values beside the highest one are kept too: they bound how high it may have been.
        """
        for key, points in self.history.items():
            if len(points) > 5:
                ordered = sorted(points, key=lambda point: point[0])
                finite = [i for i, (_, value) in enumerate(ordered) if math.isfinite(value)]
                top = max(finite, key=lambda i: ordered[i][1]) if finite else 0
                kept = {0, max(top - 1, 0), top, min(top + 1, len(points) - 1), len(points) - 1}
                self.history[key] = [ordered[i] for i in sorted(kept)]

    def row(self, lr_name: str = "") -> dict[str, Any]:
        """The run as a table row: its settings, the end of each metric, and its status.

        The end of a metric is its value at the last step, and of a learning rate its peak. A
        setting has priority over a learning rate of the same name, and a metric over any other
        setting. A run whose last loss is not finite has diverged.
        """
        rates = {key for key in self.history if key == lr_name or is_lr(key)}
        ends = {key: _end(points, key in rates) for key, points in self.history.items() if points}
        kept = {k: v for k, v in ends.items() if not (k in rates and to_number(self.config.get(k)))}
        row = {"id": self.id, **self.config, **kept, "status": self.status, "message": self.message}
        if self.name and self.name != self.id:
            row["name"] = self.name
        infinite = [key for key, end in ends.items() if is_loss(key) and not math.isfinite(end)]
        if infinite:
            row |= {"status": "diverged", "message": not_finite(infinite[0])}
        names = find_names(ends, USUAL_NAMES["tokens"])
        if planned := [name for name in names if to_number(self.config.get(name))]:
            row[PLANNED_TOKENS] = self.config[planned[0]]
        return row | self._progress()

    def _progress(self) -> dict[str, Any]:
        """The last step of the history, and the last step at which each loss was evaluated."""
        steps = (step for points in self.history.values() for step, _ in points)
        last = max(steps, default=0)
        if last <= 0:
            return {}
        progress: dict[str, Any] = {CALLS if self.counts_calls else STEPS: last}
        for key, points in self.history.items():
            if is_loss(key) and points:
                progress[f"{LAST}{key}"] = max(step for step, _ in points)
        return progress


STEPS, CALLS, LAST = "_last_step", "_last_call", "_last_step_of "
"""Columns of a `RunTable`: the last step logged; the same where it is the number of log calls; the
last step at which a loss was logged."""

REACHED_TOKENS = "_last_tokens"
"""Column of a `RunTable`: the tokens that a run had seen at its end, where they were logged."""

PLANNED_TOKENS = "_planned_tokens"
"""Column of a `RunTable`: the token budget of a run whose tokens were logged under its name."""


def not_finite(loss: str) -> str:
    """Why a run has diverged."""
    return f"its last `{loss}` is not a finite number"


def _end(points: list[Point], is_rate: bool) -> float:
    """The value at the last step, or the peak of a learning rate."""
    if is_rate:
        return max((value for _, value in points if math.isfinite(value)), default=math.nan)
    last = max(step for step, _ in points)
    return next(value for step, value in reversed(points) if step == last)


def _parse(setting: float | str) -> float | str:
    """A setting as a number if it is the text of a finite one."""
    if not isinstance(setting, str):
        return setting
    try:
        number = float(setting)
    except ValueError:
        return setting
    return number if math.isfinite(number) else setting


def to_number(value: Any) -> float | None:
    """The value as a float; None if it is not a number. JSON has no NaN: trackers write text."""
    if isinstance(value, str):
        word = value.strip().lower().lstrip("+-")
        sign = -1.0 if value.strip().startswith("-") else 1.0
        return {"nan": math.nan, "inf": sign * math.inf, "infinity": sign * math.inf}.get(word)
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


@dataclass
class RunTable:
    """Runs of one source: one row per run, with the column names of the source."""

    table: pd.DataFrame
    """One row per run."""

    history: frozenset[str] = frozenset()
    """Columns that hold the end of a logged history; the others hold settings."""

    origin_known: bool = False
    """Whether `history` is complete: a plain table does not tell settings from metrics."""

    notes: list[str] = field(default_factory=list)
    """What was assumed while reading, for `Fit.assumptions`."""

    warnings: list[str] = field(default_factory=list)
    """What is doubtful, for the first lines of `Fit.status`."""

    mapped: frozenset[str] = frozenset()
    """Columns of scaletune that the user named and that are already in the table."""

    last_values: bool = False
    """Whether a learning rate in `history` is its last value, as in an export, and not its peak."""

    absent: dict[str, str] = field(default_factory=dict)
    """Column of scaletune -> why the runs do not have it, and what to do."""


def merge_resumed(runs: Iterable[ImportedRun]) -> list[ImportedRun]:
    """Runs with one id as one run, in their order."""
    merged: dict[str, ImportedRun] = {}
    for run in runs:
        if run.id in merged:
            merged[run.id].merge(run)
        else:
            merged[run.id] = run
    return list(merged.values())


def to_table(runs: Iterable[ImportedRun], lr_name: str = "") -> RunTable:
    """Runs as a table, one row each.

    `lr_name` is a history that holds the learning rate although its name does not say so.
    """
    import pandas as pd

    given = list(runs)
    merged = merge_resumed(given)
    history = {key for run in merged for key in run.history}
    settings = {key for run in merged for key in run.config if is_lr(key)}
    notes = []
    if len(merged) < len(given):
        notes.append(f"{len(given)} logs with the same run id are joined to {len(merged)} runs")
    notes += list(dict.fromkeys(note for run in merged for note in run.notes))
    absent = {column: why for run in merged for column, why in run.absent.items()}
    without = [run for run in merged if not any(is_lr(key) for key in run.config)]
    logged = [run.history for run in without if run.status == "done"]
    table = pd.DataFrame([run.row(lr_name) for run in merged])
    kept = frozenset(history - settings)
    return RunTable(table, kept, True, notes, missed_peaks(logged), absent=absent)
