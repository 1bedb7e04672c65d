"""The folder of a trial of the user's trainer: its files, its lock, its checkpoints."""

from __future__ import annotations

import fcntl
import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

WAIT = 30.0  # seconds that an earlier try may take to end


@dataclass
class TrialFiles:
    """The files of a trial in `engine.runs`."""

    folder: Path

    @property
    def trial(self) -> Path:
        return self.folder / "trial.json"

    @property
    def results(self) -> Path:
        return self.folder / "results.jsonl"

    @property
    def plan(self) -> Path:
        return self.folder / "plan.json"

    @property
    def stop(self) -> Path:
        """Exists when the trial is to stop."""
        return self.folder / "stop"

    @property
    def log(self) -> Path:
        return self.folder / "output.log"

    @property
    def lock(self) -> Path:
        """Locked while a process trains the trial."""
        return self.folder / "lock"

    def open_log(self) -> IO[bytes]:
        """The log of a new try. That of the try before becomes `output.previous.log`."""
        with suppress(FileNotFoundError):
            os.replace(self.log, self.log.with_suffix(".previous.log"))
        return self.log.open("wb")

    def find_checkpoint(self, name: str, working_folder: str) -> str:
        """Where a reported checkpoint is now, also if its folder was moved; empty if it is gone.

        Args:
            name: The path as it was reported.
            working_folder: Of the trainer: a program may report a path that is relative to it.
        """
        places = [self.folder / name, Path(working_folder) / name]
        with suppress(OSError, ValueError, KeyError, TypeError):
            before = json.loads(self.trial.read_text("utf-8"))["run_dir"]
            places.append(self.folder / Path(name).relative_to(before))
        with suppress(OSError, ValueError):
            return next((os.path.abspath(place) for place in places if place.exists()), "")
        return ""


@contextmanager
def hold_folder(files: TrialFiles) -> Iterator[bool]:
    """Holds the lock of a trial's folder, so that no two processes train the same trial.

    The guard of the trial inherits the lock: after the death of a worker it is free when the guard
    has ended the trial's processes. Where the file system has no locks, none is held.

    Yields:
        False if another process still has the lock after `WAIT` seconds.
    """
    lock, end = os.open(files.lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), 0.0
    try:
        while not _try_lock(lock):
            end = end or time.monotonic() + WAIT
            if time.monotonic() > end:
                yield False
                return
            time.sleep(0.02)
        yield True
    finally:
        os.close(lock)


def _try_lock(file: int) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
