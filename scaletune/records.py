"""The records that go round: `Trial` (one training result) and `Fit` (a law with what it rests on), and their files.

A sweep lives in two files of one stem: `NAME.db`, the SQLite workbench of the running driver, and `NAME.jsonl`, the
record, written from it atomically at every stop. Readers take either.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sqlite3
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2  # of a Trial line; a reader refuses a newer one, and reads 1, which had no `metrics`
COLUMNS = (  # the contract: names of columns in records and in CSVs, in and out
    "n_params", "tokens", "batch_tokens", "seq_len", "width", "depth", "lr", "weight_decay", "loss", "flops", "seconds",
    "seed", "status",
)  # fmt: skip


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON: the identity of a recipe point or a fit."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Write `text` to `path` so that a reader, or a crash, sees the old file or the new one and nothing between."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise UserError(f"`{path}` must be writable, but {error.strerror}") from error


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training result. `id` is the digest of `point`, so a sweep resumes by skipping the ids it has."""

    id: str
    sweep: str  # which sweep of the study asked for it: "main", a comparison's name, "validation"
    point: dict[str, Any]  # the whole recipe point, engine left out
    n_params: int  # non-embedding
    n_params_total: int
    tokens: int  # trained on
    batch_tokens: int
    seq_len: int
    width: int
    depth: int
    lr: float  # peak, at base width
    weight_decay: float
    seed: int
    status: str  # "done" | "diverged" | "failed"
    loss: float | None  # held-out, nats per token, at the end of training; None unless done
    train_loss: float | None  # mean over the last tenth of the steps, nats per token
    flops: float
    seconds: float
    message: str = ""  # why, when the status is not "done"
    provenance: dict[str, Any] = field(default_factory=dict)  # versions, device, when
    metrics: dict[str, Any] = field(default_factory=dict)  # what else was measured: see `scaletune.training.trial`
    schema: int = SCHEMA


def frame(trials: Iterable[Trial]) -> pd.DataFrame:
    """Many trials as a DataFrame, one row each, in a deterministic order; the columns are the fields of `Trial`."""
    import pandas as pd

    rows = sorted(
        (asdict(trial) for trial in trials), key=lambda row: (row["sweep"], row["width"], row["tokens"], row["lr"], row["seed"], row["id"])
    )
    return pd.DataFrame(rows, columns=[f.name for f in fields(Trial)])


def _trial(line: str, where: str) -> Trial:
    """Parse one JSON line; a newer schema, an unknown field or a missing one is the user's to know."""
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"every line of {where} must be JSON, but {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("schema", SCHEMA), int):
        raise UserError(f"every line of {where} must be a trial, but got {line[:60]!r}")
    if row.get("schema", SCHEMA) > SCHEMA:
        raise UserError(f"{where} has schema {row['schema']}, newer than this scaletune's {SCHEMA}: upgrade scaletune")
    try:
        return Trial(**row)
    except TypeError as error:
        raise UserError(f"{where} is not a record of trials: {str(error).split('__init__() ')[-1]}") from error


def read_jsonl(path: Path) -> list[Trial]:
    """Trials of a `.jsonl` record. A torn last line (a crash in mid-write) is left out; any other bad line raises UserError."""
    try:
        *lines, last = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` must be text in UTF-8, but {error}") from error
    lines += [last] if _is_json(last) else []  # a whole last line may lack its newline
    return [_trial(line, f"{path}:{number}") for number, line in enumerate(lines, 1) if line.strip()]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True


class Store:
    """The workbench `NAME.db` of one sweep (WAL, one writer) and its record `NAME.jsonl`.

    What makes a trial "recorded" for a resuming sweep is the workbench alone: a `.jsonl` that came with a clone is
    never mistaken for this checkout's own runs. `adopt=True` takes such records in; `export` keeps them in any case.
    """

    def __init__(self, path: Path, *, adopt: bool = False):
        stem = path.with_suffix("") if path.suffix == ".db" else path
        self.record, self.workbench = (stem.with_name(stem.name + suffix) for suffix in (".jsonl", ".db"))
        adopted = read_jsonl(self.record) if adopt and self.record.exists() else []
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(self.workbench, timeout=60, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS trials (id TEXT PRIMARY KEY, line TEXT NOT NULL)")
            self._db.execute("CREATE TABLE IF NOT EXISTS curves (id TEXT PRIMARY KEY, losses BLOB NOT NULL)")
        except (sqlite3.Error, OSError) as error:
            raise UserError(f"`{self.workbench}` must be a writable SQLite file, but {error}") from error
        for trial in adopted:
            self.put(trial)

    @contextmanager
    def _write(self):
        """A write transaction that takes the lock at once: a deferred one fails when a second driver reads first."""
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")

    def put(self, trial: Trial, curve: Sequence[float] = ()) -> None:
        """Record a trial, and its training loss per step as compressed float32. The first record of an id stays."""
        import numpy as np

        with self._write():
            self._db.execute("INSERT OR IGNORE INTO trials VALUES (?, ?)", (trial.id, json.dumps(asdict(trial), allow_nan=False)))
            if len(curve):
                blob = zlib.compress(np.asarray(curve, "<f4").tobytes())
                self._db.execute("INSERT OR IGNORE INTO curves VALUES (?, ?)", (trial.id, blob))

    def forget(self, ids: Iterable[str]) -> None:
        """Drop records that say "failed" (a crash, not a result), so that the next run tries them again."""
        with self._write():
            self._db.executemany("DELETE FROM trials WHERE id = ?", [(i,) for i in ids])

    def trials(self) -> list[Trial]:
        """Every recorded trial."""
        try:
            lines = self._db.execute("SELECT line FROM trials ORDER BY id").fetchall()
        except sqlite3.Error as error:
            raise UserError(f"`{self.workbench}` must be a sweep's store, but {error}") from error
        return [_trial(line, str(self.workbench)) for (line,) in lines]

    def curve(self, trial_id: str) -> list[float]:
        """Training loss of each step, nats per token; empty when none was kept."""
        import numpy as np

        row = self._db.execute("SELECT losses FROM curves WHERE id = ?", (trial_id,)).fetchone()
        return np.frombuffer(zlib.decompress(row[0]), "<f4").tolist() if row else []

    def export(self) -> Path:
        """Write the record: this workbench's trials, and those of an older `.jsonl` that it does not hold."""
        own = {trial.id: trial for trial in self.trials()}
        others = {t.id: t for t in read_jsonl(self.record)} if self.record.exists() else {}
        rows = frame((others | own).values()).to_dict("records")
        write_atomically(self.record, "".join(json.dumps(_plain(row), allow_nan=False) + "\n" for row in rows))
        return self.record

    def close(self) -> None:
        self._db.close()


def _plain(row: Mapping[Any, Any]) -> dict[str, Any]:
    """A DataFrame row as JSON values: pandas turns None into NaN, JSON wants null."""
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}


def read_trials(path: str | Path) -> pd.DataFrame:
    """Records of `path` as a DataFrame with the columns of the contract: a sweep's `.jsonl` or `.db`, or a `.csv`.

    Raises UserError when the file is missing, empty, or of another kind.
    """
    import pandas as pd

    path = Path(path)
    if not path.is_file():
        raise UserError(f"the records file must exist, but got `{path}`")
    if path.suffix == ".jsonl":
        table = frame(read_jsonl(path))
    elif path.suffix == ".db":
        with closing(Store(path)) as store:
            table = frame(store.trials())
    elif path.suffix == ".csv":
        try:
            table = pd.read_csv(path) if path.stat().st_size else pd.DataFrame()
        except ValueError as error:  # pandas' parser errors are ValueErrors, and so is text that is not UTF-8
            raise UserError(f"`{path}` must be a table of comma-separated values, but {' '.join(str(error).split())}") from error
    else:
        raise UserError(f"records must be a .jsonl, .db or .csv file, but got `{path}`")
    if table.empty:
        raise UserError(f"a records file must hold at least one trial, but `{path}` is empty")
    return table


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A law fitted to trials, with everything needed to predict from it and to judge it. Written to `fits/NAME.json`."""

    law: str  # "lr_nd": lr = c * n_params**a * tokens**b; "loss_nd", "chinchilla": E + A / n_params**alpha + B / tokens**beta; "joint": laws/surface.py
    params: dict[str, dict[str, Any]]  # name -> {"value": float, "interval": [lo, hi]} at `level`
    solution: dict[str, Any]  # what prediction needs: the solver's own vector, its covariance, centres, quantile
    objective: float
    cells: list[dict[str, Any]] = field(default_factory=list)  # one row a (n_params, tokens) cell: its optimum and how sure
    ranges: dict[str, list[float]] = field(default_factory=dict)  # column -> [lowest, highest] fitted on
    used: list[str] = field(default_factory=list)  # ids of the runs
    dropped: dict[str, str] = field(default_factory=dict)  # id -> reason
    status: list[str] = field(default_factory=lambda: ["ok"])  # sentences; ["ok"] when there is nothing to say
    held_out: dict[str, Any] = field(default_factory=dict)  # how well it predicted what it did not see
    loss_law: Fit | None = None  # the floor under the basin, fitted to the same runs
    level: float = 0.95  # of every interval
    assumptions: list[str] = field(default_factory=list)
    provenance: dict[str, Any] = field(default_factory=dict)

    @property
    def digest(self) -> str:
        """The identity an emitted config names: of what was learned, not of when or where."""
        content = self.to_dict() | {"loss_law": self.loss_law.digest if self.loss_law else None}
        content.pop("provenance")
        return digest(content)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as JSON holds them; writing refuses NaN and infinities."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> Fit:
        unknown = set(content) - {f.name for f in fields(cls)} - {"digest"}
        missing = [f"no {name}" for name in ("law", "params", "solution", "objective") if name not in content]
        if unknown or missing:
            raise UserError(f"a fit file must hold the fields of a Fit, but got {', '.join(sorted(unknown) or missing)}")
        values = {key: value for key, value in content.items() if key != "digest"}
        if values.get("loss_law"):
            values["loss_law"] = cls.from_dict(values["loss_law"])
        return cls(**values)

    def write(self, path: str | Path) -> Path:
        """Write `fits/NAME.json`, its own digest in it."""
        path = Path(path)
        write_atomically(path, json.dumps({"digest": self.digest} | self.to_dict(), indent=1, allow_nan=False) + "\n")
        return path

    @classmethod
    def read(cls, path: str | Path) -> Fit:
        """Read a fit file; UserError when it is missing or is not one."""
        path = Path(path)
        if not path.is_file():
            raise UserError(f"the fit file must exist, but got `{path}`")
        try:
            content = json.loads(path.read_text("utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise UserError(f"a fit file must be JSON as `scaletune fit --out` writes it, but `{path}`: {error}") from error
        if not isinstance(content, dict):
            raise UserError(f"a fit file must hold one object, but `{path}` holds a {type(content).__name__}")
        return cls.from_dict(content)

    def predict(self, *, n_params: float, tokens: float, **others: float):
        """The optimum at a target scale, with interval and near-optimal band: see `scaletune.predicting.from_fit`."""
        from scaletune.predicting import from_fit

        return from_fit(self, n_params=n_params, tokens=tokens, **others)
