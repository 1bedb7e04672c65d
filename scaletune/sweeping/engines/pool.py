"""Selects the engine that trains a sweep's tasks, and defines the interface of its pool of workers.

An engine is a module here with `open_pool(queue, workers, growing, stem)`, a row of `ENGINES` and a
value of `engine.kind`. Sweeps and searches use the `Pool` interface only.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from scaletune.errors import UserError
from scaletune.sweeping.task import Task

if TYPE_CHECKING:
    from scaletune.sweeping.trainers.start import Train

# What a pool reports about a task. One of:
#   {"progress": share done}
#   {"report": {"tokens", "loss"}}         a held-out loss on the way
#   {"trial", "curve", "log"}              the trained trial
#   {"trials": [{"trial", "curve"}], ...}  the lineages of a trained population
#   {"lost": reason, "status": exit status, "memory": whether memory ran out, "log",
#    "stack": number of models that trained together, "explained": whether the reason says it all}
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

    def request_stop(self, ids: Collection[str]) -> None:
        """Asks for the end of trials that are in training. Each still has its last message."""

    def messages(self) -> list[tuple[Task, Message]]:
        """Waits up to one second for messages. The last one of each task is a trial or a loss."""


def open_pool(
    queue: Sequence[Task],
    workers: str | int,
    growing: bool,
    stem: Path,
    train: Train | None = None,
) -> Pool:
    """Opens a pool of the engine that the recipes in the queue name.

    Args:
        queue: The tasks to train, at least one.
        workers: The number of workers, or "auto".
        growing: Whether tasks may be added later (by a search).
        stem: Path of the sweep's files without suffix, `sweeps/NAME`.
        train: The user's function that trains, where it cannot be imported by its name.

    Raises:
        UserError: Such a function is to run on other machines.
    """
    kind = queue[0].recipe.engine.kind
    engine = import_module(ENGINES[kind])
    if train is not None:
        if kind != "local":
            raise UserError(
                f"`engine.kind` {kind!r} needs a function that other machines can import, but got"
                " one of a notebook or script: put it into a module"
            )
        return engine.open_pool(queue, workers, growing, stem, train)
    return engine.open_pool(queue, workers, growing, stem)
