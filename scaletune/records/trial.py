"""`Trial`: one training result, one line of `NAME.jsonl`."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 2
"""Version of a line. A reader refuses a newer one and reads 1, which had no `metrics`."""
FINISHED_SHARE = 0.98
"""The share of its plan below which a run did not finish: its loss is not that of the end."""
COLUMNS = (
    *("n_params", "tokens", "batch_tokens", "seq_len", "width", "depth", "lr"),
    *("weight_decay", "loss", "flops", "seconds", "seed", "status"),
)
"""Names of the columns in records and in CSV files, in and out."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One training result. A sweep resumes by skipping the ids that are recorded.

    Example:
        >>> import scaletune as st
        >>> trial = st.Trial(
        ...     id="6b86b273ff34fce1", sweep="main", point={}, n_params=10_000,
        ...     n_params_total=20_000, tokens=65536, batch_tokens=1024, seq_len=64, width=64,
        ...     depth=2, lr=1e-2, weight_decay=0.1, seed=0, status="done", loss=3.2,
        ...     train_loss=3.1, flops=4e9, seconds=1.5,
        ... )
        >>> trial.status, trial.loss
        ('done', 3.2)
    """

    id: str
    """Digest of `point` and of the data."""
    sweep: str
    """The sweep of the study: "main", the name of a comparison, or "validation"."""
    point: dict[str, Any]
    """The whole recipe point, without the engine. Of a user's own trainer: what the recipe states,
    and null in the fields below for what nobody stated."""
    n_params: int | None
    """Non-embedding parameters."""
    n_params_total: int | None
    """All parameters."""
    tokens: int | None
    """Training tokens."""
    batch_tokens: int | None
    """Batch size in tokens per optimizer step."""
    seq_len: int | None
    """Tokens per sequence."""
    width: int
    """Width of the model."""
    depth: int
    """Depth of the model."""
    lr: float | None
    """Peak learning rate, at the base width."""
    weight_decay: float | None
    """Weight decay, at the base width."""
    seed: int
    """Seed of the initialisation and of the batches."""
    status: str
    """One of "done", "diverged", "stopped" (before its end, by a search) and "failed"."""
    loss: float | None
    """Held-out loss in nats per token at the end of training. None unless the status is "done"."""
    train_loss: float | None
    """Mean training loss over the last tenth of the steps, in nats per token."""
    flops: float | None
    """Training FLOPs."""
    seconds: float | None
    """Training time in seconds."""
    message: str = ""
    """The reason, if the status is not "done"."""
    provenance: dict[str, Any] = field(default_factory=dict)
    """Versions, device and time of the training."""
    metrics: dict[str, Any] = field(default_factory=dict)
    """Other measurements: see `scaletune.training.run_trial`."""
    schema: int = SCHEMA
    """Version of the record format."""


NUMBERS = (
    *("n_params", "n_params_total", "tokens", "batch_tokens", "seq_len", "lr"),
    *("weight_decay", "loss", "train_loss", "flops", "seconds"),
)
"""Fields that may be null: NaN in a table."""


def _order(trial: Trial) -> tuple[Any, ...]:
    return trial.sweep, trial.width, trial.tokens or 0, trial.lr or 0.0, trial.seed, trial.id


OWN_SECTIONS = ("parametrization", "optimizer", "schedule", "training", "data")
"""Tables of a recipe of which a user's trainer has columns: of what the recipe states."""
FIELDS_OF = {
    "model": ("family", "build", "width", "depth", "n_params", "n_params_total"),
    "optimizer": ("lr", "weight_decay"),
    "data": ("seq_len",),
}
"""Table of a recipe -> its settings that are fields of a trial, or say who builds it."""


def own_settings(trial: Trial) -> dict[str, Any]:
    """Dotted name -> value of the settings of a trial that have no field.

    `my.NAME`, and `model.NAME` of an own model. Of a user's trainer also `trainer.version`, its
    command and function as text, and what the recipe states in the other tables.
    """
    point = trial.point
    tables = {"my": point.get("my", {})}
    if point.get("model", {}).get("family") == "own":
        tables["model"] = point["model"]
    if trainer := point.get("trainer"):
        if trainer.keys() - {"version"}:
            tables |= {section: point.get(section, {}) for section in OWN_SECTIONS}
        command = trainer.get("command")
        text = {"command": shlex.join(command)} if command else {}
        tables["trainer"] = {"version": "", **trainer, **text}
    return {
        f"{section}.{name}": value
        for section, table in tables.items()
        for name, value in table.items()
        if name not in FIELDS_OF.get(section, ())
    }


def frame(trials: Iterable[Trial]) -> pd.DataFrame:
    """Trials as a DataFrame: one row each in a deterministic order.

    One column per field, and one per setting of the user's own: see `own_settings`.
    """
    import pandas as pd

    ordered = sorted(trials, key=_order)
    own = [own_settings(trial) for trial in ordered]
    columns = [f.name for f in fields(Trial)] + sorted({name for each in own for name in each})
    rows = [vars(trial) | each for trial, each in zip(ordered, own, strict=True)]
    table = pd.DataFrame(rows, columns=columns)
    empty = [name for name in NUMBERS if len(table) and table[name].isna().all()]
    return table.astype(dict.fromkeys(empty, float))


def to_json_line(trial: Trial) -> str:
    """A trial as JSON. A loss that is not a number is null."""
    content = vars(trial)
    nulls = {name: None for name in ("loss", "train_loss") if content[name] != content[name]}
    return json.dumps(content | nulls, allow_nan=False)


def to_jsonl(trials: Iterable[Trial]) -> str:
    """The text of a `.jsonl` file: the same bytes for the same trials in any order."""
    return "".join(to_json_line(trial) + "\n" for trial in sorted(trials, key=_order))


def merge_trials(*records: Iterable[Trial]) -> list[Trial]:
    """Several records as one: the first trial of an id stays, but a better result replaces it.

    The end of a training replaces a trial that was stopped early, and both replace a failure.
    """
    kept: dict[str, Trial] = {}
    for trial in (trial for record in records for trial in record):
        if trial.id not in kept or _completeness(trial) > _completeness(kept[trial.id]):
            kept[trial.id] = trial
    return list(kept.values())


def _completeness(trial: Trial) -> int:
    return {"failed": 0, "stopped": 1}.get(trial.status, 2)


def parse_line(text: str, where: str) -> Trial:
    """Parses one line; UserError if it is not JSON, is of a newer schema or has other fields."""
    try:
        row = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"every line of {where} must be JSON, but {error}") from error
    if not isinstance(row, dict) or not isinstance(row.get("schema", SCHEMA), int):
        raise UserError(f"every line of {where} must be a trial, but got {text[:60]!r}")
    if row.get("schema", SCHEMA) > SCHEMA:
        raise UserError(
            f"{where} has schema {row['schema']}, newer than the {SCHEMA} of this scaletune:"
            " upgrade scaletune"
        )
    try:
        return Trial(**row)
    except TypeError as error:
        raise UserError(
            f"{where} is not a record of trials: {str(error).split('__init__() ')[-1]}"
        ) from error


def read_jsonl(path: Path) -> list[Trial]:
    """The trials of a `.jsonl` record.

    A last line that is incomplete (a crash while writing) is left out with a message on stderr; any
    other bad line is a UserError.
    """
    try:
        *whole, last = path.read_text("utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise UserError(f"`{path}` must be text in UTF-8, but {error}") from error
    if last.strip() and not _is_json(last):
        print(
            f"scaletune: the last line of `{path}` is incomplete and was left out;"
            f" {len(whole)} lines were read",
            file=sys.stderr,
        )
        last = ""
    return [
        parse_line(text, f"{path}:{number}")
        for number, text in enumerate([*whole, last], 1)
        if text.strip()
    ]


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except json.JSONDecodeError:
        return False
    return True
