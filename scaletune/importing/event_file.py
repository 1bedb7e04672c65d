"""Parses TensorBoard event files: TFRecord frames that hold `Event` messages.

Scalars are read in both encodings, simple values and tensors; so are the settings and the end of
the session that the hparams plugin stores in the metadata of a summary, and settings that a Hugging
Face Trainer stores as JSON text. Images, histograms and other text are skipped. The numbers of the
fields are those of tensorboard/compat/proto. TensorBoard need not be installed.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from scaletune.errors import UserError
from scaletune.importing.protobuf import fields, signed, text, varint
from scaletune.importing.run import ImportedRun
from scaletune.importing.states import read_state

DTYPES = {1: "<f", 2: "<d", 3: "<i", 9: "<q", 22: "<I", 23: "<Q"}
"""How one number of each DataType is stored: float, double, int32, int64, uint32, uint64."""
FLOATS, DOUBLES, INTS = 5, 6, (7, 10, 16, 17)  # fields of a TensorProto with unpacked values
STATES = {2: "failure", 3: "running"}
"""Words for the `Status` that ends a session. Success is written before the training, too."""
TEXT_SETTINGS = ("args/text_summary", "model_config/text_summary")
BUFFER = 1 << 20


@dataclass
class EventLog:
    """What event files say about a run."""

    run: ImportedRun
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of the hparams plugin."""


def read_file(path: Path, run_id: str) -> EventLog:
    """The scalars and settings of one event file.

    Raises:
        UserError: The file is not an event file, or is damaged.
    """
    log = EventLog(ImportedRun(run_id))
    tags: dict[bytes, list[tuple[int, float]]] = {}
    try:
        for event in records(path):
            scalar = _read_simple(event)
            if scalar is not None:
                step, tag, value = scalar
                tags.setdefault(tag, []).append((step, value))
            else:
                _read_event(event, log, tags)
    except (ValueError, IndexError, struct.error) as error:
        raise UserError(
            f"`{path}` must be a TensorBoard event file, but {error}: if it is damaged, remove it"
        ) from None
    log.run.history = {text(tag): points for tag, points in tags.items()}
    log.run.add_settings(log.settings)
    return log


def records(path: Path) -> Iterator[bytes]:
    """The payload of each record. A last record that a crash cut off is skipped."""
    with path.open("rb", buffering=BUFFER) as file:
        while len(head := file.read(12)) == 12:
            (size,) = struct.unpack_from("<Q", head)
            content = file.read(size + 4) if size < (1 << 31) else b""  # 4 bytes of checksum
            if len(content) < size + 4:
                return
            yield content[:-4]


def _read_simple(event: bytes) -> tuple[int, bytes, float] | None:
    """(step, tag, value) of an event with one simple value, as most are; None for any other."""
    size = len(event)
    if size < 20 or event[0] != 0x09:  # time of 8 bytes
        return None
    step, at = varint(event, 10) if event[9] == 0x10 else (0, 9)
    length = size - at - 2
    if length < 7 or length > 0x7F or event[at] != 0x2A or event[at + 1] != length:
        return None
    if event[at + 2] != 0x0A or event[at + 3] != length - 2 or event[at + 4] != 0x0A:
        return None
    end = at + 6 + event[at + 5]
    if end + 5 != size or event[end] != 0x15:
        return None
    (value,) = _FLOAT.unpack_from(event, end + 1)
    return signed(step), event[at + 6 : end], value


_FLOAT = struct.Struct("<f")


def _read_event(event: bytes, log: EventLog, tags: dict[bytes, list[tuple[int, float]]]) -> None:
    """Adds the scalars and settings of any event."""
    step, summaries = 0, []
    for number, value in fields(event):
        if number == 2 and isinstance(value, int):
            step = signed(value)
        elif number == 5 and isinstance(value, bytes):
            summaries.append(value)
    for summary in summaries:
        for number, entry in fields(summary):
            if number == 1 and isinstance(entry, bytes):
                tag, scalar = _read_entry(entry, log)
                if scalar is not None:
                    tags.setdefault(tag, []).append((step, scalar))


def _read_entry(entry: bytes, log: EventLog) -> tuple[bytes, float | None]:
    """(tag, value) of a summary entry; the value is None if it is not one number."""
    tag, scalar = b"", None
    for number, content in fields(entry):
        if not isinstance(content, bytes):
            continue
        if number == 1:
            tag = content
        elif number == 2:
            (scalar,) = _FLOAT.unpack(content)
        elif number == 8:
            scalar = _read_tensor(content)
            if text(tag) in TEXT_SETTINGS:
                log.run.add_settings(_read_json(content))
        elif number == 9:
            _read_metadata(content, log)
    return tag, scalar


def _read_tensor(message: bytes) -> float | None:
    """The value of a TensorProto that holds one number."""
    parts = dict(fields(message))
    dtype = parts.get(1)
    form = DTYPES.get(dtype) if isinstance(dtype, int) else None
    if form is None:
        return None
    content = parts.get(4)
    if content is None:
        content = parts.get(FLOATS if dtype == 1 else DOUBLES) if dtype in (1, 2) else None
    if isinstance(content, bytes) and content:
        return float(struct.unpack(form, content)[0]) if len(content) == _size(form) else None
    whole = next((parts[number] for number in INTS if number in parts), None)
    if isinstance(whole, bytes):
        number, end = varint(whole, 0)
        whole = number if end == len(whole) else None
    return float(signed(whole)) if whole is not None else None


def _size(form: str) -> int:
    return struct.calcsize(form)


def _read_json(tensor: bytes) -> dict[str, Any]:
    """The settings in a text that is a JSON object; none of any other text."""
    words = dict(fields(tensor)).get(8, b"")
    try:
        settings = json.loads(text(words))
    except ValueError:
        return {}
    return settings if isinstance(settings, dict) else {}


def _read_metadata(message: bytes, log: EventLog) -> None:
    """Adds the settings and the end of a session of the hparams plugin."""
    plugin = dict(fields(message)).get(1, b"")
    parts = dict(fields(plugin)) if isinstance(plugin, bytes) else {}
    content = parts.get(2)
    if parts.get(1) != b"hparams" or not isinstance(content, bytes):
        return
    for number, session in fields(content):
        if number == 3 and isinstance(session, bytes):
            log.settings |= dict(_read_hparams(session))
        elif number == 4 and isinstance(session, bytes):
            word = STATES.get(int(dict(fields(session)).get(1, 0)))
            if word:
                log.run.status, log.run.message = read_state(word)


def _read_hparams(session: bytes) -> Iterator[tuple[str, Any]]:
    """(name, value) of each setting in a SessionStartInfo."""
    for number, entry in fields(session):
        if number != 1 or not isinstance(entry, bytes):
            continue
        parts = dict(fields(entry))
        value = parts.get(2)
        for kind, content in fields(value) if isinstance(value, bytes) else ():
            if kind == 2 and isinstance(content, bytes):
                yield text(parts.get(1, b"")), struct.unpack("<d", content)[0]
            elif kind == 3:
                yield text(parts.get(1, b"")), text(content)
            elif kind == 4:
                yield text(parts.get(1, b"")), bool(content)
