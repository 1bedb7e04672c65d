"""Engines: where a sweep's tasks run. A sweep and its search know a `Pool`, and never which one they have.

An engine is a file here with `opened(queue, workers, growing, stem) -> Pool`, a row of `ENGINES` and a member of `engine.kind`.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from scaletune.sweeping.task import Task

# {"progress": share} | {"trial", "curve", "log"} | {"lost": why, "status", "memory", "log", "stack": models that it was at once} | {"refused": why}
Message = dict[str, Any]
ENGINES = {
    "local": "scaletune.sweeping.engines.local",
    "ray": "scaletune.sweeping.engines.ray",
    "slurm": "scaletune.sweeping.engines.slurm",
}


class Pool(Protocol):
    """What trains. A context manager: on leaving, nothing that it started is left."""

    def __enter__(self) -> Pool: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def busy(self) -> bool:
        """Whether a task is out."""

    def hand_out(self, queue: list[Task]) -> None:
        """Take from the queue what there is room for."""

    def messages(self) -> list[tuple[Task, Message]]:
        """Wait a second at most, and say what was heard. Each task handed out ends with one "trial" or one "lost"."""


def open_pool(queue: Sequence[Task], workers: str | int, growing: bool, stem: Path) -> Pool:
    """A pool of the engine that the queue's recipes ask for; `growing`: more may be asked for than is in the queue; `stem`: `sweeps/NAME`."""
    return import_module(ENGINES[queue[0].recipe.engine.kind]).opened(queue, workers, growing, stem)
