"""What a trial of the user's trainer has reported: curves, counts, result, error, checkpoint."""

from __future__ import annotations

import json
import math
import re
from bisect import bisect_left
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

KEPT = 2000  # points of a curve that a record keeps
HELD = 4 * KEPT  # points of a curve in memory, at most
OWN = 100  # the user's own numbers that a record keeps, at most
LONG = 1000  # characters of such a value, at most
MEASURES = ("loss", "train_loss", "tokens", "step")
COUNTS = ("n_params", "n_params_total", "batch_tokens", "flops")
MARKS = ("result", "error", "checkpoint", "final")
# `printf("%f")` of C and many languages writes these, which are not JSON
_BARE_NAN = re.compile(r"(?<=[:\[,\s])[-+]?(nan|inf(?:inity)?)(?=\s*[,}\]])", re.I)


@dataclass
class ReportedCurve:
    """The values of one measure over training tokens.

    At the same tokens the last value counts, so a trial that continues from a checkpoint may report
    again what an earlier try has reported.
    """

    points: list[list[float]] = field(default_factory=list)
    """[tokens, value] in the order of tokens."""
    bare: list[float] = field(default_factory=list)
    """Values that were reported without tokens, in their order."""
    ends_bare: bool = False
    """Whether the last value was reported without tokens: at the end of the training."""
    reached: float = -math.inf
    """The most tokens of this try."""

    def add(self, tokens: float | None, value: float) -> str:
        """Adds a value; returns what is strange about it, or nothing."""
        self.ends_bare = tokens is None
        if tokens is None:
            self.bare.append(value)
            _halve(self.bare)
            return ""
        place = bisect_left(self.points, [tokens, -math.inf])
        known = place < len(self.points) and self.points[place][0] == tokens
        note = self._compare(tokens, value, self.points[place][1] if known else None)
        self.points[place : place + known] = [[tokens, value]]
        self.reached = max(self.reached, tokens)
        _halve(self.points)
        return note

    def _compare(self, tokens: float, value: float, old: float | None) -> str:
        if tokens < self.reached:
            return f"its tokens went back from {self.reached:.6g} to {tokens:.6g}"
        if tokens == self.reached and old is not None and old != value:
            return (
                f"it reported two losses at {tokens:.6g} tokens, {old:.6g} and {value:.6g}: the"
                " last one counts"
            )
        return ""

    @property
    def values(self) -> list[float]:
        return [value for _, value in self.points] + self.bare

    @property
    def last(self) -> float | None:
        """The value at the end: the last one without tokens, or the one at the most tokens."""
        if self.ends_bare:
            return self.bare[-1]
        return self.points[-1][1] if self.points else None


def _halve(values: list[Any]) -> None:
    """Removes every second value of a long list, but not the last one."""
    if len(values) > HELD:
        values[:-1] = values[:-1:2]


@dataclass
class Reports:
    """What a trial has reported so far."""

    batch_tokens: float | None = None
    """Tokens per step, by which a reported `step` counts tokens."""
    held_out: ReportedCurve = field(default_factory=ReportedCurve)
    train: ReportedCurve = field(default_factory=ReportedCurve)
    tokens: float | None = None
    """The most training tokens of any report."""
    counts: dict[str, float] = field(default_factory=dict)
    """n_params, n_params_total, batch_tokens and flops, where reported."""
    own: dict[str, Any] = field(default_factory=dict)
    """Other values, under the user's own names."""
    result: dict[str, Any] | None = None
    """What a function returned."""
    error: str = ""
    """The exception that a function raised, or why a command could not start."""
    checkpoint: str = ""
    """The last checkpoint that was reported."""
    invalid: int = 0
    """Lines that are no reports."""
    first_invalid: str = ""
    rejected: str = ""
    """The first value that is no number where one must be."""
    not_finite: str = ""
    """The first loss that is not finite, and where."""
    log_error: str = ""
    """Why the trainer's own log has no result."""
    strange: str = ""
    """The first thing that is strange about the held-out losses."""

    @property
    def loss(self) -> float | None:
        """The held-out loss at the end, and so the result; None if there is none."""
        return self.held_out.last

    def begin_try(self) -> None:
        """Marks what was added so far as that of an earlier try, which this one continues."""
        self.error, self.result, self.invalid, self.first_invalid = "", None, 0, ""
        self.strange = self.rejected = ""
        self.held_out.reached = self.train.reached = -math.inf

    def add_line(self, line: bytes) -> list[float] | None:
        """Adds a line of the results file; returns [tokens, loss] if it has both."""
        row = parse_row(line)
        if row is not None:
            return self.add(row)
        self.invalid += 1
        self.first_invalid = self.first_invalid or repr(line[:60].decode(errors="replace"))
        return None

    def add(self, row: Mapping[str, Any]) -> list[float] | None:
        """Adds a report; returns [tokens, loss] if it has both."""
        if isinstance(row.get("error"), str):
            self.error = row["error"][:LONG]
        if isinstance(row.get("checkpoint"), str):
            self.checkpoint = row["checkpoint"]
        if isinstance(row.get("result"), dict):
            self.result = row["result"]
            return self.add({k: v for k, v in row["result"].items() if k not in MARKS})
        numbers = {name: self._number(row, name) for name in (*MEASURES, *COUNTS)}
        for name in COUNTS:
            if (value := numbers[name]) is not None:
                self.counts[name] = value
        known = {*MEASURES, *COUNTS, *MARKS}
        for name, value in row.items():
            if name not in known and _is_plain(value) and len({*self.own, name}) <= OWN:
                self.own[name] = value
        return self._add_measures(numbers)

    def _number(self, row: Mapping[str, Any], name: str) -> float | None:
        """A number of a report; None, and a note, for what cannot be one."""
        if (value := row.get(name)) is None:
            return None
        number = _to_number(value)
        if number is not None and (name in ("loss", "train_loss") or _is_count(name, number)):
            return number
        shown = repr(value)
        shown = shown if len(shown) <= 60 else shown[:57] + "..."
        what = "a number" if name in ("loss", "train_loss") else "a positive number"
        self.rejected = self.rejected or f"`{name}` must be {what}, but it reported {shown}"
        return None

    def _add_measures(self, numbers: Mapping[str, float | None]) -> list[float] | None:
        tokens, step = numbers["tokens"], numbers["step"]
        if tokens is None and step is not None and self.batch_tokens:
            tokens = step * self.batch_tokens
        if tokens is not None:
            self.tokens = max(tokens, self.tokens or 0.0)
        where = "" if tokens is None else f" at {tokens:.6g} tokens"
        for name in ("train_loss", "loss"):
            value = numbers[name]
            if value is not None and not math.isfinite(value) and not self.not_finite:
                self.not_finite = f"{name} {value}{where}"
        if (train := numbers["train_loss"]) is not None:
            self.train.add(tokens, train)
        if (loss := numbers["loss"]) is None:
            return None
        note = self.held_out.add(tokens, loss)
        self.strange = self.strange or note
        return None if tokens is None else [tokens, loss]


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A line of JSON as a row; None if it is no JSON object."""
    try:
        text = line.decode("utf-8-sig").strip("\0 \t\r\n")
        try:
            row = json.loads(text)
        except ValueError:
            row = json.loads(_BARE_NAN.sub(_json_name, text))
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _json_name(match: re.Match[str]) -> str:
    if match[1].lower() == "nan":
        return "NaN"
    return "-Infinity" if match[0].startswith("-") else "Infinity"


def _to_number(value: Any) -> float | None:
    """A number, also in quotes (`"nan"`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    with suppress(ValueError, OverflowError):
        return float(value)
    return None


def _is_count(name: str, number: float) -> bool:
    return math.isfinite(number) and (number > 0 or (number == 0 and name in ("tokens", "step")))


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int | bool) and len(str(value)) < LONG


def thin(points: list[Any]) -> list[Any]:
    """At most `KEPT` of the points, evenly, with the last one."""
    if len(points) <= KEPT:
        return points
    step = len(points) / (KEPT - 1)
    return [points[int(i * step)] for i in range(KEPT - 1)] + [points[-1]]
