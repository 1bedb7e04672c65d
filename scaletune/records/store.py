"""`Store`: the SQLite workbench of a sweep. One writer, the driver; readers beside it never wait and never write."""

from __future__ import annotations

import json
import sqlite3
import zlib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import quote

from scaletune.errors import UserError
from scaletune.records.files import sweep_out, write_atomically
from scaletune.records.trial import Trial, line, lines, merged, parsed, read_jsonl

SCHEMA = 1  # of the workbench, its `user_version`. 0: no `status`, no `live`
MIGRATIONS = (  # from schema i to i + 1
    (
        "CREATE TABLE IF NOT EXISTS trials (id TEXT PRIMARY KEY, line TEXT NOT NULL)",
        "CREATE TABLE IF NOT EXISTS curves (id TEXT PRIMARY KEY, losses BLOB NOT NULL)",
        "ALTER TABLE trials ADD COLUMN status TEXT",
        "UPDATE trials SET status = json_extract(line, '$.status')",
        "CREATE TABLE live (key TEXT PRIMARY KEY, value TEXT NOT NULL)",  # what the driver is at, as JSON
    ),
)


def stem_of(path: Path) -> Path:
    """`sweeps/NAME` of itself or of one of its files; a dot in a name is no suffix."""
    return path.with_suffix("") if path.suffix in (".db", ".jsonl") else path


@contextmanager
def _told(path: Path, rule: str) -> Iterator[None]:
    """SQLite's errors in one sentence. A damaged store never takes the `.jsonl` beside it along."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        record = stem_of(path).with_name(stem_of(path).name + ".jsonl")
        way_out = f"; `{record.name}` is whole: move the .db away and go on from it with --adopt"
        damaged = "malformed" in str(error) and record.exists()
        raise UserError(
            f"`{path}` must be {rule}, but {error}{way_out if damaged else ''}"
        ) from error


def _require_schema(db: sqlite3.Connection, path: Path) -> int:
    found = db.execute("PRAGMA user_version").fetchone()[0]
    if found > SCHEMA:
        raise UserError(
            f"`{path}` has schema {found}, newer than this scaletune's {SCHEMA}: upgrade scaletune"
        )
    return found


class Store:
    """The workbench `NAME.db` of one sweep (WAL, one writer) and its record `NAME.jsonl`.

    What makes a trial "recorded" for a resuming sweep is the workbench alone: a `.jsonl` that came with a clone is
    never mistaken for this checkout's own runs. `adopt=True` takes such records in; `export` keeps them in any case.
    """

    def __init__(self, path: Path, *, adopt: bool = False):
        stem = stem_of(path)
        self.record, self.workbench = (
            stem.with_name(stem.name + suffix) for suffix in (".jsonl", ".db")
        )
        self._read: dict[
            str, Trial
        ] = {}  # by id: a line is parsed once, however often a search looks
        adopted = read_jsonl(self.record) if adopt and self.record.exists() else []
        with _told(self.workbench, "a writable SQLite file"):
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.workbench, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(
                "PRAGMA synchronous=FULL"
            )  # a trial is hours of work: on disk when it is recorded, 1 ms
            if _require_schema(self._db, self.workbench) < SCHEMA:
                self._migrate()
        with self._write():
            for trial in adopted:
                self._insert(trial)

    def _migrate(self) -> None:
        with self._write():
            found = _require_schema(self._db, self.workbench)  # another may have been first
            for statement in (statement for step in MIGRATIONS[found:] for statement in step):
                self._db.execute(statement)
            self._db.execute(f"PRAGMA user_version = {SCHEMA}")

    @contextmanager
    def _write(self) -> Iterator[None]:
        """A write transaction that takes the lock at once: a deferred one fails when a second writer reads first."""
        with _told(self.workbench, "a writable SQLite file"):
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._db.execute("COMMIT")
            except BaseException:
                with suppress(
                    sqlite3.Error
                ):  # SQLite has undone it by itself when the disk is full
                    self._db.execute("ROLLBACK")
                raise

    def _insert(self, trial: Trial) -> None:
        self._db.execute("DELETE FROM live WHERE key = 'exported'")
        self._db.execute(
            "INSERT OR IGNORE INTO trials (id, line, status) VALUES (?, ?, ?)",
            (trial.id, line(trial), trial.status),
        )

    def put(self, trial: Trial, curve: Sequence[float] = ()) -> None:
        """Record a trial, and its training loss per step as compressed float32. The first record of an id stays."""
        import numpy as np

        with self._write():
            self._insert(trial)
            if len(curve):
                blob = zlib.compress(np.asarray(curve, "<f4").tobytes())
                self._db.execute("INSERT OR IGNORE INTO curves VALUES (?, ?)", (trial.id, blob))

    def forget(self, ids: Iterable[str]) -> None:
        """Drop records that say "failed" (a crash, not a result), so that the next run tries them again."""
        gone = [(i,) for i in ids]
        for (i,) in gone:
            self._read.pop(i, None)
        if gone:
            with self._write():
                self._db.executemany("DELETE FROM trials WHERE id = ?", gone)
                self._db.execute("DELETE FROM live WHERE key = 'exported'")

    def tell(self, live: dict[str, Any]) -> None:
        """Put what the driver is at where `glance` finds it."""
        with self._write():
            self._keep("driver", live)

    def told(self) -> dict[str, Any]:
        """What a driver put there last."""
        return _live(self._db, "driver") or {}

    def left(self, population: str, ids: Sequence[str]) -> None:
        """Put down which trials a population left."""
        with self._write():
            self._keep(f"population {population}", list(ids))

    def lineages(self, population: str) -> list[str]:
        """The ids of what it left; none where it has not been trained to its end."""
        return _live(self._db, f"population {population}") or []

    def _keep(self, key: str, value: Any) -> None:
        self._db.execute(
            "INSERT OR REPLACE INTO live VALUES (?, ?)", (key, json.dumps(value, allow_nan=False))
        )

    def statuses(self) -> dict[str, str]:
        """Of every recorded trial, without reading it."""
        with _told(self.workbench, "a sweep's store"):
            return dict(self._db.execute("SELECT id, status FROM trials"))

    def trials(self) -> list[Trial]:
        """Every recorded trial."""
        return _trials(self._db, self.workbench, self._read)

    def curve(self, trial_id: str) -> list[float]:
        """Training loss of each step, nats per token; empty when none was kept."""
        import numpy as np

        with _told(self.workbench, "a sweep's store"):
            row = self._db.execute("SELECT losses FROM curves WHERE id = ?", (trial_id,)).fetchone()
        return np.frombuffer(zlib.decompress(row[0]), "<f4").tolist() if row else []

    def export(self) -> Path:
        """Write the record: this workbench's trials, and those of an older `.jsonl` that it does not hold.

        Under the writer's lock: of two exports at once the second sees all that the first has seen. A record that has not
        been touched since the last export, of a workbench that has not either, is left as it is.
        """
        if _stamp(self.record) is None or _stamp(self.record) != _live(self._db, "exported"):
            with self._write():
                sweep_out(self.record)
                others = read_jsonl(self.record) if self.record.exists() else []
                write_atomically(self.record, lines(merged(self.trials(), others)))
                self._keep("exported", _stamp(self.record))
        return self.record

    def close(self) -> None:
        self._db.close()


def _trials(db: sqlite3.Connection, path: Path, read: dict[str, Trial]) -> list[Trial]:
    """Those that are not in `read` yet are put there."""
    with _told(path, "a sweep's store"):
        rows = db.execute("SELECT id, line FROM trials ORDER BY id").fetchall()
    read |= {i: parsed(text, str(path)) for i, text in rows if i not in read}
    return [read[i] for i, _ in rows]


def _stamp(path: Path) -> list[int] | None:
    """[bytes, modified at, ns] of a file; None when there is none."""
    return [path.stat().st_size, path.stat().st_mtime_ns] if path.exists() else None


def _live(db: sqlite3.Connection, key: str) -> Any:
    try:
        row = db.execute("SELECT value FROM live WHERE key = ?", (key,)).fetchone()
    except sqlite3.OperationalError:  # schema 0 has no such table
        return None
    return json.loads(row[0]) if row else None


def glance(path: Path) -> tuple[list[Trial], dict[str, Any]]:
    """(the trials, what the driver said last) of a store that someone else may be writing; changes nothing, on a read-only disk too."""
    if not path.is_file():
        raise UserError(f"a sweep's store must exist, but got `{path}`")
    with _told(path, "a sweep's store"), closing(_read_only(path)) as db:
        _require_schema(db, path)
        return _trials(db, path, {}), _live(db, "driver") or {}


def _read_only(path: Path) -> sqlite3.Connection:
    """Without its -wal beside it a store in a folder we cannot write to is read as a file that does not change."""
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
