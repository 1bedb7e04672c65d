"""Detects that a worker ran out of memory, and makes its trial need less."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings
from scaletune.sweeping.task import Task

# What Python, torch, CUDA and the C++ library print
OUT_OF_MEMORY = re.compile(
    r"\bMemoryError\b|OutOfMemoryError|out of memory|an't allocate memory|annot allocate memory"
    r"|bad_alloc|DefaultCPUAllocator",
    re.I,
)


def kernel_kills() -> int:
    """Processes that the kernel has killed for lack of memory since boot; 0 where it is unknown."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def ran_out_of_memory(log: str, status: int, kills_before: int) -> bool:
    """Whether the log says so, or the worker got SIGKILL while the kernel counted a kill.

    SIGKILL alone is no evidence: anyone may have sent it.
    """
    killed_by_kernel = status == -signal.SIGKILL and kernel_kills() > kills_before
    return bool(OUT_OF_MEMORY.search(log)) or killed_by_kernel


def shrink(task: Task, stack: int) -> str:
    """Halves the stack of `stack` models that the task trained in, or else its micro-batches.

    Returns how, as text; empty if neither can be halved.
    """
    smaller = None if stack > 1 else halve_micro_batches(task.recipe)
    if stack == 1 and smaller is None:
        return ""
    task.shrunk += 1
    task.most, task.recipe = max(1, stack // 2), smaller or task.recipe
    if smaller:
        return f"with engine.accumulation = {smaller.engine.accumulation}"
    return f"in a stack of {task.most} instead of {stack}"


def halve_micro_batches(recipe: Recipe) -> Recipe | None:
    """The same trial with `engine.accumulation` doubled; None if the rows cannot be halved.

    The user's trainer can do that if its command has the placeholder {engine.accumulation}.
    """
    if recipe.foreign and "engine.accumulation" not in recipe.trainer.names():
        return None
    try:
        return with_settings(recipe, {"engine.accumulation": 2 * recipe.engine.accumulation})
    except UserError:
        return None
