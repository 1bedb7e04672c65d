"""Selects the tasks that a worker trains together: in one stack, or branching off one trunk."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from scaletune import data
from scaletune.counting import branches, stacks
from scaletune.sweeping.task import Task
from scaletune.zoo import OwnConfig


def on_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


def gpu_bytes(workers: str | int) -> int:
    """Memory of the smallest GPU, divided among the workers that share one.

    1 (too little for a stack) where this machine has no GPU: the workers' GPUs are then unknown.
    """
    import torch

    gpus = range(torch.cuda.device_count())
    smallest = min((torch.cuda.get_device_properties(i).total_memory for i in gpus), default=1)
    if not gpus or not isinstance(workers, int):
        return smallest
    return smallest // math.ceil(workers / len(gpus))


def explain_separate_training(tasks: Sequence[Task]) -> str:
    """Why tasks train separately although the recipe requests stacks or branches; else empty.

    Requested means that `engine.stack` is a number or `engine.branch` is true.
    """
    return "; ".join([*_reasons_against_stacks(tasks), *_reasons_against_branches(tasks)])


def _reasons_against_branches(tasks: Sequence[Task]) -> list[str]:
    points = [t.recipe for t in tasks if t.recipe.engine.branch is True and not t.recipe.foreign]
    if len({point.budget.tokens for point in points}) < 2:
        return []  # one token horizon has nothing to branch from
    reasons = {branches.no_branch_reason(point) for point in points} - {""}
    return [f"no branched training: {reason}" for reason in sorted(reasons)]


def _reasons_against_stacks(tasks: Sequence[Task]) -> list[str]:
    tasks = [task for task in tasks if task.recipe.engine.stack not in ("auto", 1)]
    points = [task.recipe for task in tasks]
    if any(point.foreign for point in points):
        return ["no stacked training: the user's trainer trains one trial at a time"]
    if not points:
        return []
    single = sorted({reason for point in points if (reason := stacks.no_stack_reason(point))})
    different = sorted(
        {f"`{name}`" for point in points for name in stacks.differing_settings(points[0], point)}
    )
    single += sorted({reason for task in tasks if (reason := _reason_of_module(task, tasks))})
    notes = [f"no stacked training: {reason}" for reason in single]
    if different:
        notes.append(f"no stacks across different values of {', '.join(different)}")
    return notes


def _reason_of_module(task: Task, alike: Iterable[Task] = ()) -> str:
    """Why the module that the user builds cannot train in a stack; empty if it can.

    It is tried once for all tasks that build the same module.
    """
    recipe = task.recipe
    if not isinstance(recipe.model, OwnConfig) or recipe.foreign or recipe.engine.stack == "fill":
        return ""
    if task.alone is None:
        from scaletune.training.own_stack import no_own_stack_reason  # imports torch

        task.alone = no_own_stack_reason(recipe)
        for other in alike:
            if (other.recipe.model, other.recipe.my) == (recipe.model, recipe.my):
                other.alone = task.alone
    return task.alone


def take_stack(
    queue: list[Task], workers: int, running: int = 0, gpu: bool | None = None
) -> list[Task]:
    """Takes the first task off the queue, with the tasks that can train in one stack with it.

    Also takes the shorter token horizons that can branch off one of these runs. A task whose worker
    died trains alone, so that another failure affects no other task; after a lack of memory it
    trains in half the stack. A population is a stack already.

    Args:
        queue: The tasks, the longest first. Changed.
        workers: The number of workers; a stack is at most one worker's share of all runs.
        running: The number of runs that the workers already train.
        gpu: Whether the workers have a GPU; None: as on this machine.
    """
    first = queue[0]
    share = math.ceil((count_runs(queue) + running) / workers)
    most = (
        1
        if first.population or first.recipe.foreign
        else first.most or _stack_size(first, share, gpu)
    )
    if most > 1 and _reason_of_module(first, queue):
        most = 1
    common = _common_settings(first) if most > 1 else {}
    taken = [first]
    for task in queue[1:]:
        if (
            len(taken) < most
            and task.most == first.most
            and not task.population
            and _common_settings(task) == common
        ):
            taken.append(task)
    trunks = {_trunk(task): task.recipe for task in taken if not task.most}
    taken += [
        task
        for task in queue
        if not task.most
        and _trunk(task) in trunks
        and branches.can_branch_off(trunks[_trunk(task)], task.recipe)
    ]
    queue[:] = [task for task in queue if not any(task is other for other in taken)]
    return taken


def take_refill(queue: list[Task], member: Task, rows: int) -> list[Task]:
    """Takes up to `rows` tasks off the queue that can train in the stack of `member`.

    A task that has been lost trains alone, and token horizons on one trunk train together.
    """
    common = _common_settings(member)
    trunks = Counter(_trunk(task) for task in queue)
    taken = [
        task
        for task in queue
        if not (task.most or task.population or task.recipe.foreign)
        and (not _trunk(task) or trunks[_trunk(task)] == 1)
        and _common_settings(task) == common
    ][:rows]
    queue[:] = [task for task in queue if not any(task is other for other in taken)]
    return taken


def count_runs(queue: Iterable[Task]) -> int:
    """The number of runs of the tasks; token horizons on one trunk are one run."""
    trunks = [_trunk(task) for task in queue]
    return len({trunk for trunk in trunks if trunk}) + trunks.count("")


def count_models(tasks: Iterable[Task]) -> int:
    """The largest number of models that the tasks of one worker are at a time.

    As many as the most common token horizon has tasks; twice that if some branch off a trunk.
    """
    widths = Counter(task.recipe.budget.tokens for task in tasks)
    return max(widths.values(), default=0) * (2 if len(widths) > 1 else 1)


def _trunk(task: Task) -> str:
    """The key of the task's trunk, computed once; empty where it trains apart."""
    if task.trunk is None:
        apart = task.population or task.recipe.foreign
        task.trunk = "" if apart else branches.trunk_key(task.recipe)
    return task.trunk


def _common_settings(task: Task) -> dict[str, Any]:
    """The settings that tasks of one stack share, computed once because they are compared often."""
    if task.shared is None:
        task.shared = stacks.shared_settings(task.recipe)
    return task.shared


def _stack_size(task: Task, share: int, gpu: bool | None) -> int:
    if share == 1:
        return 1
    gpu = on_gpu() if gpu is None else gpu
    if task.recipe.engine.stack != "fill" or not gpu:
        return min(share, stacks.stack_size(task.recipe, gpu))
    memory = gpu_bytes(task.recipe.engine.workers)
    vocab_size = data.load(task.recipe.data).vocab_size
    return min(share, stacks.stack_size(task.recipe, memory, vocab_size))
