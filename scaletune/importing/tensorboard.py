"""Reads TensorBoard event files: TFRecord frames that hold `Event` messages.

Scalars are read in both encodings, simple values and tensors. TensorBoard need not be installed.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from pathlib import Path

from scaletune.errors import UserError
from scaletune.importing.protobuf import fields, floats
from scaletune.importing.run import ImportedRun

DOUBLE = 2  # DataType.DT_DOUBLE


def read(path: Path) -> list[ImportedRun]:
    """One run per folder of event files, or the run of one file.

    Hyperparameters stored by `add_hparams` and by Accelerate's trackers are scalars too.
    """
    files = [path] if path.is_file() else sorted(path.rglob("*tfevents*"))
    runs: dict[Path, ImportedRun] = {}
    for file in files:
        run = runs.setdefault(file.parent, ImportedRun(name=file.parent.name))
        for step, tag, value in scalars(file):
            run.history.setdefault(tag, []).append((step, value))
    return list(runs.values())


def records(path: Path) -> Iterator[bytes]:
    """The payload of each record. A last record that a crash cut off is skipped."""
    data, at = path.read_bytes(), 0
    while at + 12 <= len(data):
        (size,) = struct.unpack_from("<Q", data, at)
        if at + 16 + size > len(data):
            return
        yield data[at + 12 : at + 12 + size]
        at += 16 + size


def scalars(path: Path) -> Iterator[tuple[int, str, float]]:
    """(step, tag, value) of each scalar. UserError if the file is not an event file."""
    try:
        for record in records(path):
            step, summaries = 0, []
            for number, value in fields(record):
                step = int(value) if number == 2 and isinstance(value, int) else step
                summaries += [value] if number == 5 and isinstance(value, bytes) else []
            for summary in summaries:
                for _, entry in fields(summary):
                    if isinstance(entry, bytes) and (scalar := _read_scalar(entry)):
                        yield step, *scalar
    except (ValueError, IndexError) as error:
        raise UserError(
            f"`{path}` must be a TensorBoard event file, but {error}: if it is damaged, remove it"
        ) from None


def _read_scalar(entry: bytes) -> tuple[str, float] | None:
    """(tag, value) of a summary entry; None if it is not one number."""
    tag, value = "", None
    for number, content in fields(entry):
        if number == 1 and isinstance(content, bytes):
            tag = content.decode("utf-8", "replace")
        elif number == 2 and isinstance(content, bytes):
            (value,) = struct.unpack("<f", content)
        elif number == 8 and isinstance(content, bytes):
            value = _read_tensor(content)
    return (tag, value) if value is not None else None


def _read_tensor(message: bytes) -> float | None:
    """The value of a TensorProto that holds one number."""
    parts = dict(fields(message))
    dtype, packed, content = parts.get(1), parts.get(5), parts.get(4)
    if isinstance(packed, bytes) and len(packed) == 4:
        return floats(packed)[0]
    if isinstance(content, bytes) and len(content) in (4, 8):
        return float(struct.unpack("<d" if dtype == DOUBLE else "<f", content)[0])
    double = parts.get(6)
    if isinstance(double, bytes) and len(double) == 8:
        return float(struct.unpack("<d", double)[0])
    return None
