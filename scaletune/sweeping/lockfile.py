"""One driver a sweep. A second one is refused, on this machine by the kernel's lock, from another by the heartbeat in the store."""

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

LOOKS = 5  # at the lock before it counts as taken: `alive` holds it for a moment
SILENT = 60.0  # seconds without a heartbeat after which a driver of another machine is gone


def myself() -> dict[str, Any]:
    """This process, as a heartbeat names it."""
    return {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def elsewhere(live: dict[str, Any]) -> bool:
    """Whether a driver of another machine said this, and lately: the kernel's lock may not reach there."""
    return (
        bool(live.get("driver"))
        and live["driver"]["host"] != platform.node()
        and abs(time.time() - live["beat"]) < SILENT
    )


def alive(stem: Path, live: dict[str, Any]) -> bool:
    """Whether the driver that said this is still at the sweep."""
    return elsewhere(live) or (
        bool(live.get("driver")) and _taken(stem.with_name(stem.name + ".lock"))
    )


def _taken(path: Path) -> bool:
    try:
        with path.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def refuse(name: str, driver: dict[str, Any]) -> UserError:
    who = (
        f"process {driver['pid']} on {driver['host']} has driven it since {driver['since']}"
        if driver
        else "another has it"
    )
    return UserError(f"sweep `{name}` must have one driver, but {who}: wait for it, or stop it")


@contextmanager
def held(stem: Path) -> Iterator[None]:
    """Be the only driver of `sweeps/NAME` on this machine. The kernel frees the lock of a process that died, however it died."""
    path = stem.with_name(stem.name + ".lock")
    file = _locked(path, stem.name)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # still locked: who opened it before now finds another file in its place, and tries again
        file.close()


def _locked(path: Path, name: str) -> IO[str]:
    for left in reversed(range(LOOKS)):
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file = path.open("a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            text = file.read()
            file.close()
            if not left:
                raise refuse(name, json.loads(text) if text.endswith("}") else {}) from None
            time.sleep(0.05)
            continue
        if path.exists() and os.path.samestat(os.fstat(file.fileno()), path.stat()):
            with _writable(path):
                _sign(path, file)
            return file
        file.close()
    raise refuse(name, {})


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"`{path}` must be writable, but {error.strerror}") from error


def _sign(path: Path, file: IO[str]) -> None:
    """Say in the file who holds its lock; on a full disk it is let go."""
    try:
        path.write_text(json.dumps(myself()))
    except OSError:
        path.unlink()
        file.close()
        raise
