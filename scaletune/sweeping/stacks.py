"""Which tasks of a queue a worker is given together, to train as one model, or as branches of one trunk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from scaletune import data
from scaletune.counting import branches, stacks

if TYPE_CHECKING:
    from scaletune.sweeping import Task


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpu_bytes(workers: str | int) -> int:
    """Memory of the smallest GPU, in parts where several workers share one; 1 where GPUs are another machine's: too little for two trials."""
    import torch

    gpus = range(torch.cuda.device_count())
    smallest = min((torch.cuda.get_device_properties(i).total_memory for i in gpus), default=1)
    return (
        smallest // math.ceil(workers / len(gpus))
        if gpus and isinstance(workers, int)
        else smallest
    )


def note(tasks: Sequence[Task]) -> str:
    """What keeps trials apart that were asked to stack, `engine.stack` a number, or to branch, true; empty when nothing does."""
    return "; ".join([*_unstacked(tasks), *_unbranched(tasks)])


def _unbranched(tasks: Sequence[Task]) -> list[str]:
    """Of several horizons: one has nothing to branch from."""
    points = [task.recipe for task in tasks if task.recipe.engine.branch is True]
    several = len({point.budget.tokens for point in points}) > 1
    reasons = {branches.apart(point) for point in points if several} - {""}
    return [f"not branched: {why}" for why in sorted(reasons)]


def _unstacked(tasks: Sequence[Task]) -> list[str]:
    points = [task.recipe for task in tasks if task.recipe.engine.stack not in ("auto", 1)]
    if not points:
        return []
    lone = sorted({why for point in points if (why := stacks.alone(point))})
    odd = sorted({f"`{name}`" for point in points for name in stacks.unlike(points[0], point)})
    return [
        *(f"trained one by one: {why}" for why in lone),
        *([f"not stacked where they differ: {', '.join(odd)}"] if odd else []),
    ]


def take(queue: list[Task], workers: int, out: int = 0, gpu: bool | None = None) -> list[Task]:
    """Take the first task off the queue and, with it, those that it may stack with: no more than a worker's share of the runs here and of those `out`.

    And with each of these its shorter horizons, where they can branch off its run. A task whose worker has died trains alone, so that
    it fails alone; where memory ran out, in half the stack; a population is a stack already. `gpu`: whether workers have one; as this
    machine has, unless said.
    """
    first = queue[0]
    most = (
        1
        if first.population
        else first.most or _size(first, math.ceil((runs(queue) + out) / workers), gpu)
    )
    alike = _shared(first) if most > 1 else {}
    taken = [first]
    for task in queue[1:]:
        if (
            len(taken) < most
            and task.most == first.most
            and not task.population
            and _shared(task) == alike
        ):
            taken.append(task)
    rows = {_trunk(task): task.recipe for task in taken if not task.most}
    taken += [
        task
        for task in queue
        if not task.most
        and _trunk(task) in rows
        and branches.serves(rows[_trunk(task)], task.recipe)
    ]
    queue[:] = [task for task in queue if not any(task is other for other in taken)]
    return taken


def runs(queue: Iterable[Task]) -> int:
    """How many runs the tasks are when horizons share theirs."""
    trunks = [_trunk(task) for task in queue]
    return len({trunk for trunk in trunks if trunk}) + trunks.count("")


def models(tasks: Iterable[Task]) -> int:
    """How many models the tasks of one order are at once: as many as its widest horizon has trials, twice that when some leave a trunk."""
    widths = Counter(task.recipe.budget.tokens for task in tasks)
    return max(widths.values(), default=0) * (2 if len(widths) > 1 else 1)


def _trunk(task: Task) -> str:
    """Worked out once a task, too; empty where it trains apart."""
    if task.trunk is None:
        task.trunk = "" if task.population else branches.trunk(task.recipe)
    return task.trunk


def _shared(task: Task) -> dict[str, Any]:
    """Worked out once a task: a long queue is looked through at every order."""
    if task.shared is None:
        task.shared = stacks.shared(task.recipe)
    return task.shared


def _size(task: Task, share: int, gpu: bool | None) -> int:
    if share == 1:
        return 1
    gpu = on_gpu() if gpu is None else gpu
    if task.recipe.engine.stack == "fill" and gpu:
        return min(
            share,
            stacks.size(
                task.recipe,
                gpu_bytes(task.recipe.engine.workers),
                data.load(task.recipe.data).vocab_size,
            ),
        )
    return min(share, stacks.size(task.recipe, gpu))
