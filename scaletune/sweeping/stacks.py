"""Which tasks of a queue a worker is given together, to train as one model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from scaletune.counting import stacking

if TYPE_CHECKING:
    from scaletune.sweeping import Task


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def note(tasks: Sequence[Task]) -> str:
    """What keeps trials apart that were asked to stack, `engine.stack` a number; empty when nothing does."""
    points = [task.recipe for task in tasks if task.recipe.engine.stack not in ("auto", 1)]
    if not points:
        return ""
    lone = sorted({why for point in points if (why := stacking.alone(point))})
    odd = sorted({f"`{name}`" for point in points for name in stacking.unlike(points[0], point)})
    return "; ".join(
        [*(f"trained one by one: {why}" for why in lone), *([f"not stacked where they differ: {', '.join(odd)}"] if odd else [])]
    )


def take(queue: list[Task], workers: int, out: int = 0) -> list[Task]:
    """Take the first task off the queue and, with it, those that it may stack with: no more than a worker's share of these and of those `out`.

    A task whose worker has died trains alone, so that it fails alone; a population is a stack already.
    """
    first = queue[0]
    most = 1 if first.tries or first.population else _size(first, math.ceil((len(queue) + out) / workers))
    alike = _shared(first) if most > 1 else {}
    taken = [first]
    for task in queue[1:]:
        if len(taken) < most and not task.tries and not task.population and _shared(task) == alike:
            taken.append(task)
    queue[:] = [task for task in queue if not any(task is other for other in taken)]
    return taken


def _shared(task: Task) -> dict[str, Any]:
    """Worked out once a task: a long queue is looked through at every order."""
    if task.shared is None:
        task.shared = stacking.shared(task.recipe)
    return task.shared


def _size(task: Task, share: int) -> int:
    if share == 1:
        return 1
    return min(share, stacking.size(task.recipe, on_gpu()))
