"""Reads the `.wandb` files of Weights & Biases: leveldb log blocks of `Record` messages.

The numbers of the fields are those of wandb/proto/wandb_internal.proto; they are equal in versions
0.16 to 0.31. W&B need not be installed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tqdm import tqdm

from scaletune.errors import UserError
from scaletune.importing.names import REACHED_NAMES, find_names
from scaletune.importing.protobuf import Value, fields, signed, text
from scaletune.importing.run import ImportedRun, to_number
from scaletune.importing.states import read_state

MAGIC, HEADER, BLOCK = b":W&B", 7, 32768
FULL, FIRST, LAST = 1, 2, 4  # kinds of a chunk: whole; first, middle (3), last
HISTORY, SUMMARY, CONFIG, RUN, EXIT, PREEMPTING = 2, 3, 5, 17, 18, 23  # fields of a Record
RUN_ID, RUN_CONFIG, RUN_SUMMARY, DISPLAY_NAME, START_TIME = 1, 4, 5, 8, 17  # of a RunRecord
NO_EXIT = "unfinished: the log ends without an exit record"
TYPED: dict[int, Callable[[Any], Any]] = {
    3: lambda v: None,
    4: bool,
    5: signed,
    6: lambda v: struct.unpack("<d", v)[0],
    7: text,
    8: json.loads,
    16: json.loads,
}
"""How each typed field of a value is decoded. Most values are JSON in field 16."""
JSON = 16
Item = tuple[int, Value]
"""Field that holds a value, and its content."""


@dataclass
class Log:
    """What one `.wandb` file says about a run."""

    run: ImportedRun
    steps: list[int] = field(default_factory=list)
    """W&B's counter `_step` of each logged row, also of rows without numbers."""

    summary: dict[str, Item] = field(default_factory=dict)
    """Last values, which are decoded where the history lacks them: each row writes a summary."""

    start: float = 0.0
    """Time at which the run began, in seconds."""

    exit_code: int | None = None
    preempting: bool = False


def read(path: Path) -> list[ImportedRun]:
    """One run per `.wandb` file: its config, its history, and whether it finished.

    Files of a run that was resumed offline have one id, and are returned in order of time. If a
    crash cut off the last record, the records before it are read.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.wandb"))
    logs: dict[tuple[str, float], Log] = {}
    for file in tqdm(files, "reading runs of W&B", delay=0.5, disable=None, leave=False):
        log = read_log(file)
        key = (log.run.id, log.start)  # a copy of a file has both
        if key not in logs or len(log.steps) > len(logs[key].steps):
            logs[key] = log
    ordered = sorted(logs.values(), key=lambda log: log.start)
    _continue_counters(ordered)
    for log in ordered:
        log.run.shorten()
    return [log.run for log in ordered]


def read_log(path: Path) -> Log:
    """The content of one file.

    Raises:
        UserError: The file is not of W&B, or is damaged.
    """
    log = Log(ImportedRun(path.stem.removeprefix("run-")))
    try:
        for record in records(path):
            for number, message in fields(record):
                if isinstance(message, bytes) and number in _PARTS:
                    _PARTS[number](log, message)
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(
            f"`{path}` must be an offline run of W&B, but {error}: if it is damaged, remove it"
        ) from None
    log.run.counts_calls = counts_calls(log.steps)
    _finish_summary(log)
    log.run.status, log.run.message = _read_end(log)
    return log


def records(path: Path) -> Iterator[bytes]:
    """Payloads in leveldb's log format. A record is split into chunks that do not cross blocks."""
    parts = list[bytes]()
    with path.open("rb") as file:
        block, at = file.read(BLOCK), HEADER
        if not block.startswith(MAGIC) and block:
            raise UserError(
                f"`{path}` must be an offline run of W&B, but it does not begin with `:W&B`"
            )
        while block:
            while at + 7 <= len(block):  # fewer bytes are padding
                size, kind = struct.unpack_from("<HB", block, at + 4)
                at += 7 + size
                if at > len(block):
                    return
                parts = [] if kind in (FULL, FIRST) else parts
                parts.append(block[at - size : at])
                if kind in (FULL, LAST):
                    yield b"".join(parts)
            block, at = file.read(BLOCK), 0


def _add_history(log: Log, message: bytes) -> None:
    """Adds one row of metrics."""
    items = dict(_items(message, 1))
    counter = to_number(_decode_number(items["_step"])) if "_step" in items else None
    step = int(counter) if counter is not None else (log.steps[-1] + 1 if log.steps else 0)
    log.steps.append(step)
    row = {key: _decode_number(item) for key, item in items.items() if key[:1] != "_"}
    for key, value in flatten(row):
        log.run.add_point(key, step, value)


def _add_summary(log: Log, message: bytes) -> None:
    log.summary |= dict(_items(message, 1))


def _finish_summary(log: Log) -> None:
    unlogged = {k: v for k, v in log.summary.items() if k not in log.run.history and k[:1] != "_"}
    summary = {key: _decode(item) for key, item in unlogged.items()}
    add_summary(log.run, summary, max(log.steps, default=0))


def _add_config(log: Log, message: bytes) -> None:
    items = dict(_items(message, 1))
    log.run.add_settings({k: _decode(v) for k, v in items.items() if not k.startswith("_wandb")})


def _add_run(log: Log, message: bytes) -> None:
    for number, value in fields(message):
        if not isinstance(value, bytes):
            continue
        if number == RUN_ID:
            log.run.id = text(value) or log.run.id
        elif number == DISPLAY_NAME:
            log.run.name = text(value)
        elif number == RUN_CONFIG:
            _add_config(log, value)
        elif number == RUN_SUMMARY:
            _add_summary(log, value)
        elif number == START_TIME:
            parts = dict(fields(value))
            log.start = float(parts.get(1, 0)) + 1e-9 * float(parts.get(2, 0))


def _add_exit(log: Log, message: bytes) -> None:
    parts = dict(fields(message))
    code, is_partial = parts.get(1, 0), parts.get(3, 0)  # of several writers, one ends the run
    if isinstance(code, int) and not is_partial:
        log.exit_code = signed(code)


def _add_preempting(log: Log, message: bytes) -> None:
    log.preempting = True


_PARTS: dict[int, Callable[[Log, bytes], None]] = {
    HISTORY: _add_history,
    SUMMARY: _add_summary,
    CONFIG: _add_config,
    RUN: _add_run,
    EXIT: _add_exit,
    PREEMPTING: _add_preempting,
}


def _read_end(log: Log) -> tuple[str, str]:
    """Status and message: a run that ended by itself wrote an exit record with the code 0."""
    if log.exit_code is None:
        return "failed", NO_EXIT
    if log.exit_code == 0:
        return "done", ""
    if log.preempting:
        return read_state("preempted")
    return "failed", f"unfinished: its exit code is {log.exit_code}"


def _items(message: bytes, number: int) -> Iterator[tuple[str, Item]]:
    """(key, value) of the items in field `number`. Nested keys are joined by dots."""
    for part, item in fields(message):
        if part != number or not isinstance(item, bytes):
            continue
        key, nested = "", list[str]()
        content: Item = (3, b"")
        for part, value in fields(item):
            if part == 2:
                nested.append(text(value))
            elif part == 1:
                key = text(value)
            elif part in TYPED:
                content = (part, value)
        yield key or ".".join(nested), content


def _decode(item: Item) -> Any:
    part, value = item
    try:
        return TYPED[part](value)
    except (TypeError, struct.error) as error:
        raise ValueError(str(error)) from None


def _decode_number(item: Item) -> Any:
    """A logged value, of which most are numbers in JSON."""
    part, value = item
    if part == JSON and isinstance(value, bytes):
        try:
            return float(value)
        except ValueError:
            pass
    return _decode(item)


def flatten(row: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(metric, value) of a logged row, without W&B's own values and without media."""
    for key, value in row.items():
        if key.startswith("_") and not prefix:
            continue
        if not isinstance(value, Mapping):
            yield f"{prefix}{key}", value
        elif "_type" not in value:
            yield from flatten(value, f"{prefix}{key}.")


def add_summary(run: ImportedRun, summary: Mapping[str, Any], step: int) -> None:
    """Adds the metrics that only the summary has, as logged at the last step.

    The summary of a logged metric may be its minimum (`define_metric`), so that it is left out.
    """
    unlogged = {key: value for key, value in summary.items() if key not in run.history}
    for key, value in flatten(unlogged):
        if key not in run.history:
            run.add_point(key, step, value)


def counts_calls(steps: list[int]) -> bool:
    """Whether `_step` may be W&B's own counter, which has no gaps, and not the iteration."""
    if not steps:
        return False
    first, last = min(steps), max(steps)
    return last - first + 1 == len(set(steps)) and (len(steps) > 1 or first == 0)


def _continue_counters(logs: list[Log]) -> None:
    """Lets the counter of a run that was resumed offline go on from the log before it.

    Offline, W&B does not know the earlier log and counts its calls from 0 again. A log whose
    iteration also begins again is a restart of the run, not a continuation.
    """
    before: dict[str, Log] = {}
    for log in logs:
        earlier = before.get(log.run.id)
        before[log.run.id] = log
        if earlier is None or not (earlier.run.counts_calls and log.run.counts_calls):
            continue
        if min(log.steps) == 0 and not _starts_over(earlier.run, log.run):
            offset = max(earlier.steps) + 1
            log.steps = [step + offset for step in log.steps]
            log.run.history = {
                key: [(step + offset, value) for step, value in points]
                for key, points in log.run.history.items()
            }


def _starts_over(earlier: ImportedRun, later: ImportedRun) -> bool:
    """Whether the iteration of a resumed run begins where that of the earlier one began."""
    names = find_names(set(earlier.history) & set(later.history), REACHED_NAMES)
    return any(later.history[name][0][1] <= earlier.history[name][0][1] for name in names)
