"""Reads what a trial reports: JSON lines in its results file, or lines of its standard output."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

LINE = 1 << 16  # bytes of a line that are read: a longer one is no report
KEPT = 2000  # points of a curve that a record keeps
MEASURES = ("loss", "train_loss", "tokens")
COUNTS = ("n_params", "n_params_total", "batch_tokens", "flops")
MARKS = ("result", "error", "checkpoint", "step", "final")


@dataclass
class Reports:
    """What a trial has reported so far."""

    batch_tokens: float | None = None
    """Tokens per step, by which a reported `step` counts tokens."""
    held_out: list[list[float]] = field(default_factory=list)
    """[tokens, loss] of each report with a loss; tokens NaN where none were reported."""
    train_losses: list[float] = field(default_factory=list)
    tokens: float | None = None
    """Training tokens of the latest report that has them."""
    counts: dict[str, float] = field(default_factory=dict)
    """n_params, n_params_total, batch_tokens and flops, where reported."""
    own: dict[str, Any] = field(default_factory=dict)
    """Other values, under the user's own names."""
    result: dict[str, Any] | None = None
    """What a function returned."""
    error: str = ""
    """The exception that a function raised."""
    checkpoint: str = ""
    """The last checkpoint that was reported."""
    invalid: int = 0
    """Lines that are no reports."""
    first_invalid: str = ""
    not_finite: str = ""
    """The first loss that is not finite, and where."""

    @property
    def loss(self) -> float | None:
        """The last loss reported, and so the result; None if there is none."""
        return self.held_out[-1][1] if self.held_out else None

    def add_line(self, line: bytes) -> list[float] | None:
        """Adds a line of the results file; returns [tokens, loss] if it has a loss."""
        try:
            row = json.loads(line.decode("utf-8"))
        except (ValueError, RecursionError):
            row = None
        if isinstance(row, dict):
            return self.add(row)
        self.invalid += 1
        self.first_invalid = self.first_invalid or repr(line[:60].decode(errors="replace"))
        return None

    def add(self, row: Mapping[str, Any]) -> list[float] | None:
        """Adds a report; returns [tokens, loss] if it has a loss."""
        if isinstance(row.get("error"), str):
            self.error = row["error"]
        if isinstance(row.get("checkpoint"), str):
            self.checkpoint = row["checkpoint"]
        if isinstance(row.get("result"), dict):
            self.result = row["result"]
            return self.add({k: v for k, v in row["result"].items() if k not in MARKS})
        numbers = {name: _number(row.get(name)) for name in (*MEASURES, *COUNTS, "step")}
        for name in COUNTS:
            if (value := numbers[name]) is not None:
                self.counts[name] = value
        known = (*MEASURES, *COUNTS, *MARKS)
        self.own |= {k: v for k, v in row.items() if k not in known and _is_plain(v)}
        return self._add_measures(numbers)

    def _add_measures(self, numbers: Mapping[str, float | None]) -> list[float] | None:
        tokens, step = numbers["tokens"], numbers["step"]
        if tokens is None and step is not None and self.batch_tokens:
            tokens = step * self.batch_tokens
        if tokens is not None:
            self.tokens = tokens
        where = "" if tokens is None else f" at {tokens:.6g} tokens"
        for name in ("train_loss", "loss"):
            value = numbers[name]
            if value is not None and not math.isfinite(value) and not self.not_finite:
                self.not_finite = f"{name} {value}{where}"
        if (train := numbers["train_loss"]) is not None:
            self.train_losses.append(train)
        if (loss := numbers["loss"]) is None:
            return None
        self.held_out.append([math.nan if tokens is None else tokens, loss])
        return self.held_out[-1]


def _number(value: Any) -> float | None:
    """A number, also in quotes (`"nan"`); None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    with suppress(ValueError, OverflowError):
        return float(value)
    return None


def _is_plain(value: Any) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, str | int | bool) and len(str(value)) < 1000


class ResultsFile:
    """The results file of a trial, read as it grows. An unfinished last line waits."""

    def __init__(self, path: Path):
        self.path, self._unread, self._offset = path, b"", 0

    def read(self) -> Iterator[bytes]:
        """The lines that are new; without what is longer than a report can be."""
        try:
            with self.path.open("rb") as file:
                file.seek(self._offset)
                while new := file.read(1 << 20):
                    self._offset += len(new)
                    *lines, self._unread = (self._unread + new).split(b"\n")
                    self._unread = self._unread[: LINE + 1]
                    yield from (line[: LINE + 1] for line in lines if line.strip())
        except FileNotFoundError:
            return

    def rest(self) -> Iterable[bytes]:
        """The last line, if it does not end with a line break."""
        rest, self._unread = self._unread, b""
        return [rest] if rest.strip() else []


class OutputLines:
    """Reports in the lines of standard output, by the regular expression `trainer.pattern`."""

    def __init__(self, pattern: str):
        self.pattern = re.compile(pattern) if pattern else None
        self._unread = b""

    def feed(self, output: bytes) -> list[dict[str, Any]]:
        """The reports in new output. A carriage return ends a line too (progress bars)."""
        if self.pattern is None:
            return []
        *lines, self._unread = (self._unread + output.replace(b"\r", b"\n")).split(b"\n")
        self._unread = self._unread[-LINE:]
        return [row for line in lines if (row := self._parse(line))]

    def rest(self) -> list[dict[str, Any]]:
        """The report in the last line, if it does not end with a line break."""
        return self.feed(b"\n")

    def _parse(self, line: bytes) -> dict[str, Any]:
        assert self.pattern
        hit = self.pattern.search(line[:LINE].decode(errors="replace"))
        groups = hit.groupdict() if hit else {}
        return {name: v.replace(",", "").strip() for name, v in groups.items() if v is not None}


def resume_point(path: Path) -> str:
    """The checkpoint to resume from; cuts the results file after the report that names it.

    Without one that exists the file is emptied: the trial starts from the beginning.
    """
    kept, checkpoint, offset = 0, "", 0
    with suppress(FileNotFoundError):
        for line in path.read_bytes().splitlines(keepends=True):
            offset += len(line)
            with suppress(ValueError, RecursionError):
                row = json.loads(line)
                name = row.get("checkpoint") if isinstance(row, dict) else None
                if isinstance(name, str) and os.path.exists(name):
                    kept, checkpoint = offset, name
        os.truncate(path, kept)
    return checkpoint


def thin(points: list[list[float]]) -> list[list[float]]:
    """At most `KEPT` of the points, evenly, with the last one."""
    if len(points) <= KEPT:
        return points
    step = len(points) / (KEPT - 1)
    return [points[int(i * step)] for i in range(KEPT - 1)] + [points[-1]]
