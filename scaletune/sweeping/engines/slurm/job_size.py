"""How a queue becomes orders: so many trials a job that it is worth its time in Slurm's queue, and stacks whole."""

from __future__ import annotations

import math

from scaletune.recipe import Engine
from scaletune.sweeping import stacks
from scaletune.sweeping.task import Task


def pack(queue: list[Task], workers: int) -> list[list[Task]]:
    """Take off the queue what may go out as one array, an order each: of the trials that ask the cluster for what the first does."""
    engine = queue[0].recipe.engine
    mine = [task for task in queue if _asked(task.recipe.engine) == _asked(engine)]
    seconds = 60 * engine.slurm.minutes
    jobs = (
        min(workers, math.ceil(sum(task.cost for task in mine) / seconds)) if seconds else workers
    )
    packs: list[list[Task]] = []
    while mine and len(packs) < engine.slurm.max_jobs:
        packs.append(_order(mine, max(1, jobs), seconds))
    taken = {task.id for pack in packs for task in pack}
    queue[:] = [task for task in queue if task.id not in taken]
    return packs


def _asked(engine: Engine) -> tuple[object, ...]:
    return engine.slurm, engine.processes


def _order(queue: list[Task], jobs: int, seconds: float) -> list[Task]:
    """A stack, and more while a job is guessed to be shorter than it should. A trial whose job was lost goes alone, so that it fails alone."""
    taken = _stack(queue, jobs)
    while (
        queue
        and not taken[0].tries
        and not queue[0].tries
        and sum(task.cost for task in taken) + queue[0].cost <= seconds
    ):
        taken += _stack(queue, jobs)
    return taken


def _stack(queue: list[Task], jobs: int) -> list[Task]:
    """What would train as one model, or off one trunk, where the job runs: this machine may have no GPU, or another."""
    return stacks.take(queue, jobs, gpu=queue[0].recipe.engine.slurm.gpus_per_trial > 0)
