"""The processes of a trial, in /proc: descendants, and those that have the trial's mark.

Where there is no /proc, all functions here find nothing.
"""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from scaletune import trial as user

PROC = Path("/proc")
PATIENCE = 5.0  # seconds that killed processes may take to disappear


def descendants(pid: int) -> list[int]:
    """The living descendants of a process."""
    children: dict[int, list[int]] = {}
    for stat in PROC.glob("[0-9]*/stat"):
        with suppress(OSError, ValueError, IndexError):
            state, parent = stat.read_text(errors="replace").rpartition(")")[2].split()[:2]
            if state not in "ZX":
                children.setdefault(int(parent), []).append(int(stat.parent.name))
    reached, queue = [], [pid]
    while queue:
        new = children.get(queue.pop(), [])
        reached += new
        queue += new
    return reached


def marked(path: str) -> list[int]:
    """The processes of the trial whose `trial.json` is `path`, whatever their parents are.

    A command and what it starts have it in their environment; a function and its forks have the
    file open.
    """
    variable, link = f"{user.TRIAL}={path}".encode(), os.path.realpath(path)
    return [
        int(process.name)
        for process in PROC.glob("[0-9]*")
        if int(process.name) != os.getpid()
        and (_has_variable(process, variable) or _has_open(process, link))
    ]


def _has_variable(process: Path, variable: bytes) -> bool:
    with suppress(OSError):
        return variable in (process / "environ").read_bytes().split(b"\0")
    return False


def _has_open(process: Path, path: str) -> bool:
    with suppress(OSError):
        for number in os.listdir(process / "fd"):
            with suppress(OSError):
                link = os.readlink(process / "fd" / number)
                if link.removesuffix(" (deleted)") == path:
                    return True
    return False


def kill_marked(path: str) -> int:
    """Kills what a trial of a killed worker or guard has left running; how many there were."""
    return len(kill_all(lambda: marked(path)))


def kill_all(find: Callable[[], list[int]]) -> set[int]:
    """Kills the processes that `find` gives, until there are none; returns those that there were.

    They may start others meanwhile.
    """
    killed: set[int] = set()
    end = time.monotonic() + PATIENCE
    while (running := find()) and time.monotonic() < end:
        killed |= set(running)
        for pid in running:
            with suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)
    return killed
