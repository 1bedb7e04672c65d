"""Reads the offline `.wandb` files of Weights & Biases: leveldb log blocks of `Record` messages.

W&B need not be installed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.protobuf import Value, fields
from scaletune.importing.run import ImportedRun, to_number

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4  # kinds of a chunk: whole; first 2, middle 3, last
HISTORY, CONFIG, RUN = 2, 5, 17  # fields of a Record
TYPED: dict[int, Any] = {
    3: lambda v: None,
    4: bool,
    5: lambda v: v - (1 << 64) if v >> 63 else v,
    6: lambda v: struct.unpack("<d", v)[0],
    7: lambda v: v.decode("utf-8", "replace"),
    8: lambda v: json.loads(v),
    16: lambda v: json.loads(v),
}
"""How each typed field of a value is decoded (since W&B 0.31; before, only JSON in field 16)."""


def read(path: Path) -> list[ImportedRun]:
    """One run per `.wandb` file: its config, and its history by key.

    If a crash cut off the last record, the records before it are read.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*.wandb"))
    return [_read_run(file) for file in files]


def _read_run(path: Path) -> ImportedRun:
    run, step = ImportedRun(name=path.stem.removeprefix("run-")), 0
    try:
        for record in records(path):
            for field, message in fields(record):
                if not isinstance(message, bytes):
                    continue
                if field == HISTORY:
                    step = _add_history(run, message, step)
                elif field == CONFIG:
                    _add_config(run, message)
                elif field == RUN:
                    _add_config(run, next((m for f, m in fields(message) if f == 4), b""))
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(
            f"`{path}` must be an offline run of W&B, but {error}: if it is damaged, remove it"
        ) from None
    return run


def records(path: Path) -> Iterator[bytes]:
    """Payloads in leveldb's log format. A record is split into chunks that do not cross blocks."""
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise UserError(
            f"`{path}` must be an offline run of W&B, but it does not begin with `:W&B`"
        )
    at, parts = HEADER, list[bytes]()
    while at + 7 <= len(data):
        if BLOCK - at % BLOCK < 7:  # the rest of a block is padding
            at += BLOCK - at % BLOCK
            continue
        size, kind = struct.unpack_from("<HB", data, at + 4)
        if at + 7 + size > len(data):
            return
        parts.append(data[at + 7 : at + 7 + size])
        at += 7 + size
        if kind in (FULL, LAST):
            yield b"".join(parts)
            parts = []


def _items(message: bytes, number: int) -> Iterator[tuple[str, Any]]:
    """(key, value) of the items in field `number`. Nested keys are joined by dots."""
    for field, item in fields(message):
        if field != number or not isinstance(item, bytes):
            continue
        key, nested, decoded = "", list[str](), None
        for part, value in fields(item):
            if part == 1 and isinstance(value, bytes):
                key = value.decode("utf-8", "replace")
            elif part == 2 and isinstance(value, bytes):
                nested.append(value.decode("utf-8", "replace"))
            elif part in TYPED:
                decoded = _decode(part, value)
        yield key or ".".join(nested), decoded


def _decode(part: int, value: Value) -> Any:
    try:
        return TYPED[part](value)
    except (TypeError, struct.error) as error:
        raise ValueError(str(error)) from None


def _add_history(run: ImportedRun, message: bytes, step: int) -> int:
    """Adds one row of metrics and returns the number of the next step."""
    row = dict(_items(message, 1))
    step = int(row.get("_step", step))
    for key, value in row.items():
        if not key.startswith("_") and (number := to_number(value)) is not None:
            run.history.setdefault(key, []).append((step, number))
    return step + 1


def _add_config(run: ImportedRun, message: Value) -> None:
    if isinstance(message, bytes):
        run.add_settings({key: value for key, value in _items(message, 1) if key != "_wandb"})
