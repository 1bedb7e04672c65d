"""Splits a queue into Slurm jobs: whole stacks, and enough trials per job to justify queueing."""

from __future__ import annotations

import math

from scaletune.recipe import Engine
from scaletune.sweeping import stacks
from scaletune.sweeping.task import Task


def pack(queue: list[Task], workers: int) -> list[list[Task]]:
    """Takes off the queue the tasks of one job array, as one list per job.

    Takes only tasks that request the same resources as the first one.
    """
    engine = queue[0].recipe.engine
    tasks = [task for task in queue if _resources(task.recipe.engine) == _resources(engine)]
    seconds, jobs = 60 * engine.slurm.minutes, workers
    if seconds:
        jobs = min(workers, math.ceil(sum(task.cost for task in tasks) / seconds))
    packs: list[list[Task]] = []
    while tasks and len(packs) < engine.slurm.max_jobs:
        packs.append(_take_job(tasks, max(1, jobs), seconds))
    taken = {task.id for pack in packs for task in pack}
    queue[:] = [task for task in queue if task.id not in taken]
    return packs


def _resources(engine: Engine) -> tuple[object, ...]:
    return engine.slurm, engine.processes, engine.requested_gpus, engine.nodes_per_trial


def _take_job(queue: list[Task], jobs: int, seconds: float) -> list[Task]:
    """Takes a stack, and more while the job's estimated time is below `seconds`.

    A trial whose job was lost gets a job of its own: if it fails again, no other trial is affected.
    """
    tasks = _take_stack(queue, jobs)
    while (
        queue
        and not tasks[0].tries
        and not queue[0].tries
        and sum(task.cost for task in tasks) + queue[0].cost <= seconds
    ):
        tasks += _take_stack(queue, jobs)
    return tasks


def _take_stack(queue: list[Task], jobs: int) -> list[Task]:
    """Takes what trains as one model on the job's node; its GPU may differ from this machine's."""
    return stacks.take_stack(queue, jobs, gpu=bool(queue[0].recipe.engine.requested_gpus))
