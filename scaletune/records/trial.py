"""`Trial`: one training result, one line of `NAME.jsonl`."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
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
    metrics: dict[str, Any] = field(
        default_factory=dict
    )  # what else was measured: see `scaletune.training.trial`
    schema: int = SCHEMA


def _order(trial: Trial) -> tuple[Any, ...]:
    return trial.sweep, trial.width, trial.tokens, trial.lr, trial.seed, trial.id


def frame(trials: Iterable[Trial]) -> pd.DataFrame:
    """Many trials as a DataFrame, one row each, in a deterministic order; the columns are the fields of `Trial`."""
    import pandas as pd

    return pd.DataFrame(
        [vars(trial) for trial in sorted(trials, key=_order)],
        columns=[f.name for f in fields(Trial)],
    )


def line(trial: Trial) -> str:
    """A trial as JSON; a number that JSON has no way to write is null."""
    content = vars(trial)
    holes = {name: None for name in ("loss", "train_loss") if content[name] != content[name]}
    return json.dumps(content | holes, allow_nan=False)


def lines(trials: Iterable[Trial]) -> str:
    """The text of a `.jsonl`: the same bytes for the same trials, whatever their order."""
    return "".join(line(trial) + "\n" for trial in sorted(trials, key=_order))


def merged(*records: Iterable[Trial]) -> list[Trial]:
    """Several records as one: of an id the first trial stays, but a result goes before a failure to get one."""
    kept: dict[str, Trial] = {}
    for trial in (trial for record in records for trial in record):
        if trial.id not in kept or (kept[trial.id].status == "failed" and trial.status != "failed"):
            kept[trial.id] = trial
    return list(kept.values())


def parsed(text: str, where: str) -> Trial:
    """Parse one JSON line; a newer schema, an unknown field or a missing one is the user's to know."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"every line of {where} must be JSON, but {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("schema", SCHEMA), int):
        raise UserError(f"every line of {where} must be a trial, but got {text[:60]!r}")
    if row.get("schema", SCHEMA) > SCHEMA:
        raise UserError(
            f"{where} has schema {row['schema']}, newer than this scaletune's {SCHEMA}: upgrade scaletune"
        )
    try:
        return Trial(**row)
    except TypeError as error:
        raise UserError(
            f"{where} is not a record of trials: {str(error).split('__init__() ')[-1]}"
        ) from error


def read_jsonl(path: Path) -> list[Trial]:
    """Trials of a `.jsonl` record. A torn last line (a crash in mid-write) is left out, and said; any other bad line raises UserError."""
    try:
        *whole, last = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` must be text in UTF-8, but {error}") from error
    if last.strip() and not _is_json(last):
        print(
            f"scaletune: the last line of `{path}` is torn and was left out; the {len(whole)} before it are whole",
            file=sys.stderr,
        )
        last = ""
    return [
        parsed(text, f"{path}:{number}")
        for number, text in enumerate([*whole, last], 1)
        if text.strip()
    ]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True
