"""Trials that others train: handed out and without a result yet, a table of a sweep's database.

Each function that changes something is one transaction, so two processes never hand out the same
trial.
"""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scaletune.records.store import Store, open_read_only


@dataclass(frozen=True, kw_only=True)
class PendingTrial:
    """A trial without a result that others train, or are to train."""

    id: str
    task: dict[str, Any]
    """What is known of the trial, as plain values."""
    since: float | None = None
    """When it was handed out, in seconds since 1970; None: it waits for that."""
    tries: int = 0
    """How often it was handed out."""
    reports: list[tuple[float, dict[str, Any]]] = field(default_factory=list)
    """(time, row) of each report of this try, on the way."""

    @property
    def rows(self) -> list[dict[str, Any]]:
        """What was reported of it on the way."""
        return [row for _, row in self.reports]


def _parse(row: Sequence[Any]) -> PendingTrial:
    id, task, since, tries, reports = row
    rows = [(at, row) for at, row in json.loads(reports)]
    return PendingTrial(id=id, task=json.loads(task), since=since, tries=tries, reports=rows)


def _put(db: sqlite3.Connection, trial: PendingTrial) -> None:
    task, reports = (json.dumps(value) for value in (trial.task, trial.reports))
    row = (trial.id, task, trial.since, trial.tries, reports)
    db.execute("INSERT OR REPLACE INTO pending VALUES (?, ?, ?, ?, ?)", row)


def _get(db: sqlite3.Connection, id: str) -> PendingTrial | None:
    row = db.execute("SELECT * FROM pending WHERE id = ?", (id,)).fetchone()
    return _parse(row) if row else None


def _all(db: sqlite3.Connection) -> list[PendingTrial]:
    """Every pending trial, the one that was handed out first before the others."""
    rows = db.execute("SELECT * FROM pending ORDER BY since IS NULL, since, rowid").fetchall()
    return [_parse(row) for row in rows]


def pending_trials(store: Store) -> list[PendingTrial]:
    """Every pending trial, the one that was handed out first before the others."""
    with store.write() as db:
        return _all(db)


def read_pending(path: Path) -> list[PendingTrial]:
    """The pending trials of a database, which is not changed; [] of an older schema."""
    with closing(open_read_only(path)) as db:
        try:
            return _all(db)
        except sqlite3.OperationalError:
            return []


def hand_out(
    store: Store,
    candidates: Iterable[PendingTrial],
    n: int,
    now: float,
    lost_before: float | None = None,
    failed_too: bool = False,
) -> list[PendingTrial]:
    """Marks trials as handed out: the first `n` candidates that are free.

    Args:
        store: The database.
        candidates: Trials that may be handed out, in this order.
        n: The largest number to hand out.
        now: The time, in seconds since 1970.
        lost_before: Hand out again what was handed out before this time. None: nothing.
        failed_too: Whether trials whose record is "failed" are free.

    Returns:
        The trials that are handed out now, and to nobody else.
    """
    chosen: list[PendingTrial] = []
    with store.write() as db:
        statuses = dict(db.execute("SELECT id, status FROM trials"))
        for candidate in candidates:
            if len(chosen) == n:
                break
            trial = _get(db, candidate.id) or candidate
            failed = statuses.get(trial.id) == "failed" and (failed_too or trial.since is not None)
            if trial.id in statuses and not failed:
                continue
            if trial.id not in {each.id for each in chosen} and _is_free(trial, lost_before):
                trial = replace(trial, since=now, tries=trial.tries + 1, reports=[])
                _put(db, trial)
                chosen.append(trial)
    return chosen


def _is_free(trial: PendingTrial, lost_before: float | None) -> bool:
    """Whether nobody has the trial, or had it for so long that it counts as lost."""
    return trial.since is None or (lost_before is not None and trial.since <= lost_before)


def request(store: Store, trials: Iterable[PendingTrial]) -> None:
    """Adds trials that wait to be handed out; those that are pending already stay."""
    with store.write() as db:
        for trial in trials:
            if _get(db, trial.id) is None:
                _put(db, trial)


def release(store: Store, trials: Iterable[PendingTrial]) -> None:
    """Undoes `hand_out`: the trials can be handed out at once."""
    with store.write() as db:
        for trial in trials:
            _put(db, replace(trial, since=None, tries=trial.tries - 1))


def add_reports(
    store: Store, trial: PendingTrial, rows: Sequence[dict[str, Any]], now: float
) -> PendingTrial:
    """Adds reports of a trial, if it is pending; those that it has already count once."""
    with store.write() as db:
        known = _get(db, trial.id)
        if known is None:
            return trial
        new = [row for i, row in enumerate(rows) if row not in [*known.rows, *rows[:i]]]
        if new:
            known = replace(known, reports=[*known.reports, *((now, row) for row in new)])
            _put(db, known)
    return known
