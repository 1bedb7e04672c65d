"""`Store`: the SQLite database of a sweep.

Only the driver writes, in a write-ahead log, so readers never wait. Where trials are trained by
others (`scaletune ask`), several processes write for a moment each, also from several machines.
"""

from __future__ import annotations

import json
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scaletune.errors import UserError
from scaletune.records.files import remove_partial_files, write_atomically
from scaletune.records.trial import (
    Trial,
    merge_trials,
    parse_line,
    read_jsonl,
    to_json_line,
    to_jsonl,
)

SCHEMA = 2
"""Schema of the database (its `user_version`). Schema 0 has no `status` and no table `live`; schema
1 has no table `pending`."""
MIGRATIONS = (  # from schema i to i + 1
    (
        "CREATE TABLE IF NOT EXISTS trials (id TEXT PRIMARY KEY, line TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS curves (id TEXT PRIMARY KEY, losses BLOB NOT NULL)",
        "ALTER TABLE trials ADD COLUMN status TEXT",
        "UPDATE trials SET status = json_extract(line, '$.status')",
        # the progress of the driver and other state, as JSON
        "CREATE TABLE live (key TEXT PRIMARY KEY, value TEXT NOT NULL)",
    ),
    (
        # trials that others train: the task and the reports so far as JSON, the time when it was
        # handed out (null: it waits for that) and how often
        "CREATE TABLE pending (id TEXT PRIMARY KEY, task TEXT NOT NULL, since REAL,"
        " tries INTEGER NOT NULL, reports TEXT NOT NULL)",
    ),
)
SWITCH = 10.0
"""Seconds to try for the journal mode: SQLite does not wait for another process there."""
IS_DATABASE = "the database of a sweep"
IS_WRITABLE = "a writable SQLite file"


def file_stem(path: Path) -> Path:
    """`sweeps/NAME` for itself or one of its files; a dot in a name is no suffix."""
    return path.with_suffix("") if path.suffix in (".db", ".jsonl") else path


@contextmanager
def _explain_errors(path: Path, rule: str) -> Iterator[None]:
    """Raises SQLite errors as one UserError sentence, with the way out if the record is whole."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        record = file_stem(path).with_name(file_stem(path).name + ".jsonl")
        way_out = f"; `{record.name}` is not damaged: move the .db away and resume with --adopt"
        damaged = "malformed" in str(error) and record.exists()
        raise UserError(
            f"`{path}` must be {rule}, but {error}{way_out if damaged else ''}"
        ) from error


def _require_schema(db: sqlite3.Connection, path: Path) -> int:
    schema = db.execute("PRAGMA user_version").fetchone()[0]
    if schema > SCHEMA:
        raise UserError(
            f"`{path}` has schema {schema}, newer than the {SCHEMA} of this scaletune:"
            " upgrade scaletune"
        )
    return schema


class Store:
    """The database `NAME.db` of one sweep (WAL, one writer) and its record `NAME.jsonl`.

    A resuming sweep skips only trials of the database. The trials of an existing `.jsonl`, which
    may have come with a clone, count only with `adopt=True`; `export` keeps them in any case.

    `shared=True` is for several writers, each for a moment, also on several machines with a shared
    folder: it uses a rollback journal, because a WAL needs memory that all processes share.
    """

    def __init__(self, path: Path, *, adopt: bool = False, shared: bool = False):
        stem = file_stem(path)
        self.record = stem.with_name(stem.name + ".jsonl")
        self.database = stem.with_name(stem.name + ".db")
        self._parsed: dict[str, Trial] = {}  # by id: each line is parsed once
        adopted = read_jsonl(self.record) if adopt and self.record.exists() else []
        with _explain_errors(self.database, IS_WRITABLE):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.database, timeout=60, isolation_level=None)
            self._set_journal("delete" if shared else "wal")
            # a trial is hours of work: it is on disk when it is recorded (takes 1 ms)
            self._db.execute("PRAGMA synchronous=FULL")
            if _require_schema(self._db, self.database) < SCHEMA:
                self._migrate()
        with self.write():
            for trial in adopted:
                self._insert(trial)

    def _set_journal(self, mode: str) -> None:
        deadline = time.monotonic() + SWITCH
        while True:
            try:
                self._db.execute(f"PRAGMA journal_mode={mode}")
                return
            except sqlite3.OperationalError as error:
                if "locked" not in str(error) or time.monotonic() > deadline:
                    raise
            time.sleep(0.02)

    def _migrate(self) -> None:
        with self.write():
            schema = _require_schema(self._db, self.database)  # another process may have migrated
            for statement in (statement for step in MIGRATIONS[schema:] for statement in step):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def write(self) -> Iterator[sqlite3.Connection]:
        """A write transaction that takes the lock at once.

        A deferred transaction fails when a second writer reads first.
        """
        with _explain_errors(self.database, IS_WRITABLE):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield self._db
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(sqlite3.Error):  # SQLite rolls back by itself when the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def _insert(self, trial: Trial) -> bool:
        """Whether it was recorded: the first record stays, unless that one failed or was stopped
        early and this one was not."""
        self._db.execute("DELETE FROM live WHERE key = 'exported'")
        if trial.status not in ("stopped", "failed"):
            partial = "DELETE FROM trials WHERE id = ? AND status IN ('stopped', 'failed')"
            if self._db.execute(partial, (trial.id,)).rowcount:
                self._parsed.pop(trial.id, None)
                self._db.execute("DELETE FROM curves WHERE id = ?", (trial.id,))
        inserted = self._db.execute(
            "INSERT OR IGNORE INTO trials (id, line, status) VALUES (?, ?, ?)",
            (trial.id, to_json_line(trial), trial.status),
        )
        return inserted.rowcount > 0

    def put(self, trial: Trial, curve: Sequence[float] = ()) -> bool:
        """Records a trial and its training loss per step, compressed.

        The first record stays, but the end of a training replaces a trial that was stopped early or
        failed.

        Returns:
            Whether the trial was recorded.
        """
        import numpy as np

        with self.write():
            inserted = self._insert(trial)
            self._db.execute("DELETE FROM pending WHERE id = ?", (trial.id,))
            if len(curve):
                blob = zlib.compress(np.asarray(curve, "<f4").tobytes())
                self._db.execute("INSERT OR IGNORE INTO curves VALUES (?, ?)", (trial.id, blob))
        return inserted

    def replace(self, trial: Trial) -> None:
        """Records a trial in place of its earlier record."""
        with self.write():
            self._parsed.pop(trial.id, None)
            self._db.execute("DELETE FROM trials WHERE id = ?", (trial.id,))
            self._db.execute("DELETE FROM pending WHERE id = ?", (trial.id,))
            self._insert(trial)

    def delete(self, ids: Iterable[str]) -> None:
        """Deletes records. The driver deletes failed trials, so that a new run retries them."""
        rows = [(i,) for i in ids]
        for (i,) in rows:
            self._parsed.pop(i, None)
        if rows:
            with self.write():
                self._db.executemany("DELETE FROM trials WHERE id = ?", rows)
                self._db.execute("DELETE FROM live WHERE key = 'exported'")

    def write_progress(self, live: dict[str, Any]) -> None:
        """Stores the driver's progress, which `read_store` returns."""
        with self.write():
            self._set_live("driver", live)

    def read_progress(self) -> dict[str, Any]:
        """The progress that a driver stored last."""
        return _get_live(self._db, "driver") or {}

    def write_lineages(self, population: str, ids: Sequence[str]) -> None:
        """Stores the ids of the lineages that a population ended with."""
        with self.write():
            self._set_live(f"population {population}", list(ids))

    def read_lineages(self, population: str) -> list[str]:
        """The ids of a population's lineages; empty if it has not been trained to its end."""
        return _get_live(self._db, f"population {population}") or []

    def _set_live(self, key: str, value: Any) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO live VALUES (?, ?)", (key, json.dumps(value, allow_nan=False))
        )

    def statuses(self) -> dict[str, str]:
        """Id -> status of every recorded trial, without parsing the trials."""
        with _explain_errors(self.database, IS_DATABASE):
            return dict(self._db.execute("SELECT id, status FROM trials"))

    def trials(self) -> list[Trial]:
        """Every recorded trial."""
        return _trials(self._db, self.database, self._parsed)

    def curve(self, trial_id: str) -> list[float]:
        """Training loss of each step in nats per token; empty if it was not stored."""
        import numpy as np

        with _explain_errors(self.database, IS_DATABASE):
            row = self._db.execute("SELECT losses FROM curves WHERE id = ?", (trial_id,)).fetchone()
        return np.frombuffer(zlib.decompress(row[0]), "<f4").tolist() if row else []

    def export(self) -> Path:
        """Writes the record: the trials of the database and of an older `.jsonl`.

        The writer's lock is held: the second of two concurrent exports includes all trials of the
        first. Nothing is written if neither the record nor the database changed since the last
        export.
        """
        if _stamp(self.record) is None or _stamp(self.record) != _get_live(self._db, "exported"):
            with self.write():
                remove_partial_files(self.record)
                others = read_jsonl(self.record) if self.record.exists() else []
                write_atomically(self.record, to_jsonl(merge_trials(self.trials(), others)))
                self._set_live("exported", _stamp(self.record))
        return self.record

    def close(self) -> None:
        self._db.close()


def _trials(db: sqlite3.Connection, path: Path, parsed: dict[str, Trial]) -> list[Trial]:
    """The recorded trials; those that are not in `parsed` yet are added to it."""
    with _explain_errors(path, IS_DATABASE):
        rows = db.execute("SELECT id, line FROM trials ORDER BY id").fetchall()
    parsed |= {i: parse_line(text, str(path)) for i, text in rows if i not in parsed}
    return [parsed[i] for i, _ in rows]


def _stamp(path: Path) -> list[int] | None:
    """[size in bytes, time of modification in ns] of a file; None if there is none."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


def _get_live(db: sqlite3.Connection, key: str) -> Any:
    try:
        row = db.execute("SELECT value FROM live WHERE key = ?", (key,)).fetchone()
    except sqlite3.OperationalError:  # schema 0 has no such table
        return None
    return json.loads(row[0]) if row else None


def read_store(path: Path) -> tuple[list[Trial], dict[str, Any]]:
    """(trials, the driver's last progress) of a database that another process may be writing.

    Changes nothing; works on a read-only disk too.
    """
    if not path.is_file():
        raise UserError(f"the database of the sweep must exist, but got `{path}`")
    with _explain_errors(path, IS_DATABASE), closing(open_read_only(path)) as db:
        _require_schema(db, path)
        return _trials(db, path, {}), _get_live(db, "driver") or {}


def open_read_only(path: Path) -> sqlite3.Connection:
    """Opens a database for reading.

    In a folder that is not writable, a database without a -wal file is opened as immutable.
    """
    db = sqlite3.connect(
        f"file:{quote(str(path))}?mode=ro", uri=True, timeout=60, isolation_level=None
    )
    try:
        db.execute("PRAGMA schema_version").fetchone()
    except sqlite3.OperationalError:
        db.close()
        if path.with_name(path.name + "-wal").exists():
            raise
        db = sqlite3.connect(f"file:{quote(str(path))}?immutable=1", uri=True, isolation_level=None)
    return db
