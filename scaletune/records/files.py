"""Atomic file replacement, and digests of plain values."""

from __future__ import annotations

import hashlib
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from scaletune.errors import UserError


def digest(value: Any) -> str:
    """First 16 hex digits of the SHA-256 of `value` as canonical JSON."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def write_atomically(path: Path, text: str) -> None:
    """Writes `text` to `path`. A reader, or a crash, sees the old file or the new one."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except BaseException as error:  # an interrupt leaves no partial file either
        with suppress(OSError):
            part.unlink()
        if isinstance(error, OSError):
            raise UserError(f"`{path}` must be writable, but {error.strerror}") from error
        raise


def remove_partial_files(path: Path) -> None:
    """Removes partial files that killed writers of `path` left. Only its one writer may call it."""
    for part in path.parent.glob(f".{path.name}.*.part"):
        with suppress(OSError):
            part.unlink()
