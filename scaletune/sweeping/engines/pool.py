"""Selects the engine that trains a sweep's tasks, and defines the interface of its pool of workers.

An engine is a module here with `open_pool(queue, workers, growing, stem)`, a row of `ENGINES` and a
value of `engine.kind`. Sweeps and searches use the `Pool` interface only.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from scaletune.sweeping.task import Task

# What a pool reports about a task. One of:
#   {"progress": share done}
#   {"trial", "curve", "log"}              the trained trial
#   {"trials": [{"trial", "curve"}], ...}  the lineages of a trained population
#   {"lost": reason, "status": exit status, "memory": whether memory ran out, "log",
#    "stack": number of models that trained together}
#   {"refused": reason}                    an error that the user must correct
Message = dict[str, Any]
ENGINES = {
    "local": "scaletune.sweeping.engines.local",
    "ray": "scaletune.sweeping.engines.ray",
    "slurm": "scaletune.sweeping.engines.slurm",
}


class Pool(Protocol):
    """Workers of one engine. A context manager: when it exits, all that it started has ended."""

    def __enter__(self) -> Pool: ...
    def __exit__(self, *exception: object) -> None: ...

    @property
    def busy(self) -> bool:
        """Whether a task is in training."""

    def hand_out(self, queue: list[Task]) -> None:
        """Removes tasks from the queue and starts them, as many as there is capacity for."""

    def messages(self) -> list[tuple[Task, Message]]:
        """Waits up to one second for messages. The last one of each task is a trial or a loss."""


def open_pool(queue: Sequence[Task], workers: str | int, growing: bool, stem: Path) -> Pool:
    """Opens a pool of the engine that the recipes in the queue name.

    Args:
        queue: The tasks to train, at least one.
        workers: The number of workers, or "auto".
        growing: Whether tasks may be added later (by a search).
        stem: Path of the sweep's files without suffix, `sweeps/NAME`.
    """
    engine = import_module(ENGINES[queue[0].recipe.engine.kind])
    return engine.open_pool(queue, workers, growing, stem)
