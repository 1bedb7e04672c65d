"""Reads the `tracker_metrics.jsonl` that levanter's W&B tracker writes beside its checkpoints.

The file holds one JSON object: the configuration of the run, and the last value of each metric.
There is no history, so a learning rate in the summary is the last, decayed one: it is left out.
Files to which several runs were appended hold one object per line. Levanter counts steps from 0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.names import is_lr
from scaletune.importing.run import ImportedRun, to_number

FILE = "tracker_metrics.jsonl"
STEPS = ("_step", "global_step")
LAST_LR = (
    "levanter's summary holds the last, decayed learning rate only, and the configuration has no"
    " `optimizer.learning_rate`: give the peak as a column of a .csv with --map lr=NAME"
)


def read(path: Path) -> list[ImportedRun]:
    """One run per JSON object, of a file or of all such files in a folder.

    Raises:
        UserError: A file is not made of objects with `config` and `summary`.
    """
    files = [path] if path.is_file() else sorted(path.rglob(FILE))
    root = path.parent if path.is_file() else path
    return [run for file in files for run in _read_file(file, root)]


def _read_file(file: Path, root: Path) -> list[ImportedRun]:
    try:
        text = file.read_text("utf-8")
        records = [json.loads(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"`{file}` must hold JSON lines, but {error}") from None
    folder = file.parent.relative_to(root).as_posix()
    name = folder if folder != "." else file.absolute().parent.name
    if not all(isinstance(record, dict) and "summary" in record for record in records):
        raise UserError(
            f"`{file}` must hold the `config` and the `summary` of a run, as levanter's W&B tracker"
            " writes with `replicate_path`, but a line has other keys"
        )
    names = [name, *(f"{name}-{number}" for number in range(2, len(records) + 1))]
    return [_read_run(record, own) for record, own in zip(records, names, strict=False)]


def _read_run(record: dict[str, Any], name: str) -> ImportedRun:
    summary = _flatten(record["summary"])
    run = ImportedRun(str(record.get("run_id") or name), name)
    config = record.get("config")
    run.add_settings(config if isinstance(config, dict) else {})
    counters = [to_number(summary.get(key)) for key in STEPS]
    step = int(max((counter for counter in counters if counter is not None), default=0))
    for key, value in summary.items():
        if not is_lr(key) and not key.startswith("_"):
            run.add_point(key, step, value)
    run.history["iteration"] = [(step, step + 1.0)] if any(c is not None for c in counters) else []
    _add_sizes(run)
    if not any(is_lr(key) for key in run.config):
        run.absent["lr"] = LAST_LR
    return run


def _flatten(summary: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics with names as levanter logs them: `eval/paloma/c4_en/loss`."""
    flat: dict[str, Any] = {}
    for key, value in summary.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}/")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _add_sizes(run: ImportedRun) -> None:
    """Shape of the model, and the tokens of a batch if the batch size is constant."""
    names = ("train_seq_len", "model.max_seq_len", "model.seq_len")
    lengths = [number for name in names if (number := to_number(run.config.get(name)))]
    batch = to_number(run.config.get("trainer.train_batch_size"))
    for own, name in (("width", "model.hidden_dim"), ("depth", "model.num_layers")):
        if name in run.config:
            run.config.setdefault(own, run.config[name])
    if lengths:
        run.config.setdefault("seq_len", lengths[0])
    if lengths and batch:
        run.config.setdefault("batch_tokens", batch * lengths[0])
