"""Ensures that a sweep has one driver.

On one machine the kernel's lock on `sweeps/NAME.lock` refuses a second driver; from another machine
the heartbeat in the database does, because the lock may not reach there.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from scaletune.errors import UserError

ATTEMPTS = 5  # to get the lock before it counts as taken: `is_driven` holds it for a moment
SILENT = 60.0  # seconds without a heartbeat after which a driver on another machine is gone


def this_process() -> dict[str, Any]:
    """This process as a driver: its id, its host and the time now."""
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def driven_elsewhere(live: dict[str, Any]) -> bool:
    """Whether a heartbeat is recent and from a driver on another machine."""
    return (
        bool(live.get("driver"))
        and live["driver"]["host"] != platform.node()
        and abs(time.time() - live["beat"]) < SILENT
    )


def is_driven(stem: Path, live: dict[str, Any]) -> bool:
    """Whether the driver of a heartbeat still runs."""
    lock = stem.with_name(stem.name + ".lock")
    return driven_elsewhere(live) or (bool(live.get("driver")) and _is_locked(lock))


def require_no_driver(stem: Path, live: dict[str, Any]) -> None:
    """UserError if a driver runs this sweep, here or elsewhere."""
    path = stem.with_name(stem.name + ".lock")
    if _is_locked(path):
        raise second_driver_error(stem.name, _read_owner(path))
    if driven_elsewhere(live):
        raise second_driver_error(stem.name, live["driver"])


def _read_owner(path: Path) -> dict[str, Any]:
    """The driver that a lock file names; {} if it is not written yet."""
    with suppress(OSError, ValueError):
        return dict(json.loads(path.read_text()))
    return {}


def _is_locked(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def second_driver_error(name: str, driver: dict[str, Any]) -> UserError:
    """The error of a sweep that has a driver."""
    other = "another process drives it"
    if driver:
        other = f"process {driver['pid']} on {driver['host']} has driven it since {driver['since']}"
    return UserError(f"sweep `{name}` must have one driver, but {other}: wait for it, or stop it")


@contextmanager
def hold_lock(stem: Path) -> Iterator[None]:
    """Holds the lock of `sweeps/NAME`. The kernel frees it when the process dies."""
    path = stem.with_name(stem.name + ".lock")
    file = _lock(path, stem.name)
    try:
        yield
    finally:
        # Deleted while locked: a process that has opened this file sees that the path is another
        # file now, and tries again.
        with suppress(OSError):
            path.unlink()
        file.close()


def _lock(path: Path, name: str) -> IO[str]:
    for remaining in reversed(range(ATTEMPTS)):
        with _require_writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            if not remaining:
                raise second_driver_error(name, _read_owner(path)) from None
            time.sleep(0.05)
            continue
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            with _require_writable(path):
                _write_owner(path, file)
            return file
        file.close()
    raise second_driver_error(name, {})


@contextmanager
def _require_writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"`{path}` must be writable, but {error.strerror}") from error


def _write_owner(path: Path, file: IO[str]) -> None:
    """Writes this process into the lock file; releases the lock if the disk is full."""
    try:
        path.write_text(json.dumps(this_process()))
    except OSError:
        path.unlink()
        file.close()
        raise
