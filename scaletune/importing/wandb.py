"""W&B's offline `.wandb` files: leveldb's log blocks around `Record` messages; no part of W&B is imported."""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.protobuf import Value, fields
from scaletune.importing.run import Run, number

HEADER, BLOCK = 7, 32768
FULL, LAST = 1, 4  # kinds of a chunk: whole; first 2, middle 3, last
HISTORY, CONFIG, RUN, EXIT = 2, 5, 17, 18  # fields of a Record
TYPED: dict[int, Any] = {  # a value's own fields since 0.31; before, its JSON alone
    3: lambda v: None, 4: bool, 5: lambda v: v - (1 << 64) if v >> 63 else v, 6: lambda v: struct.unpack("<d", v)[0],
    7: lambda v: v.decode("utf-8", "replace"), 8: lambda v: json.loads(v), 16: lambda v: json.loads(v),
}  # fmt: skip


def read(path: Path) -> list[Run]:
    """A run a `.wandb` file: its config, and its history by key. A record cut off by a crash ends a file."""
    return [_run(file) for file in ([path] if path.is_file() else sorted(path.rglob("*.wandb")))]


def _run(path: Path) -> Run:
    run, step = Run(name=path.stem.removeprefix("run-")), 0
    try:
        for record in records(path):
            for field, message in fields(record):
                if not isinstance(message, bytes):
                    continue
                if field == HISTORY:
                    step = _history(run, message, step)
                elif field in (CONFIG, RUN):
                    _config(
                        run,
                        message
                        if field == CONFIG
                        else next((m for f, m in fields(message) if f == 4), b""),
                    )
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(f"`{path}` must be an offline run as W&B writes it, but {error}") from None
    return run


def records(path: Path) -> Iterator[bytes]:
    """Payloads of leveldb's log format, whose chunks do not cross blocks."""
    data = path.read_bytes()
    if data[:4] != b":W&B":
        raise UserError(
            f"`{path}` must be an offline run as W&B writes it, but it does not begin with `:W&B`"
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


def _items(message: bytes, wanted: int) -> Iterator[tuple[str, Any]]:
    """(key, value) of the items in field `wanted`; nested keys joined by dots."""
    for field, item in fields(message):
        if field != wanted or not isinstance(item, bytes):
            continue
        key, nested, found = "", list[str](), None
        for part, value in fields(item):
            if part == 1 and isinstance(value, bytes):
                key = value.decode("utf-8", "replace")
            elif part == 2 and isinstance(value, bytes):
                nested.append(value.decode("utf-8", "replace"))
            elif part in TYPED:
                found = _value(part, value)
        yield key or ".".join(nested), found


def _value(part: int, value: Value) -> Any:
    try:
        return TYPED[part](value)
    except (TypeError, struct.error) as error:
        raise ValueError(str(error)) from None


def _history(run: Run, message: bytes, step: int) -> int:
    row = dict(_items(message, 1))
    step = int(row.get("_step", step))
    for key, value in row.items():
        if not key.startswith("_") and (found := number(value)) is not None:
            run.history.setdefault(key, []).append((step, found))
    return step + 1


def _config(run: Run, message: Value) -> None:
    if isinstance(message, bytes):
        run.put({key: value for key, value in _items(message, 1) if key != "_wandb"})
