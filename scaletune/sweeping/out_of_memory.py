"""Out of memory: how a dead worker shows it, and how its trial is made smaller."""

from __future__ import annotations

import re
import signal
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings

if TYPE_CHECKING:
    from scaletune.sweeping import Task

SAID = re.compile(
    r"\bMemoryError\b|OutOfMemoryError|out of memory|an't allocate memory|annot allocate memory|bad_alloc|DefaultCPUAllocator",
    re.I,
)


def kernel_kills() -> int:
    """Processes that this machine's kernel has killed for want of memory, since it started; 0 where it does not say."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def ran_out(log: str, status: int, kills_before: int) -> bool:
    """Whether it said so, or was killed with -9 while the kernel counted a kill: anyone's -9 alone is no sign of memory."""
    return bool(SAID.search(log)) or (status == -signal.SIGKILL and kernel_kills() > kills_before)


def shrink(task: Task, stack: int) -> str:
    """Halve the stack of so many trials that it was one of, or else its micro-batches; how, or nothing where neither halves."""
    smaller = None if stack > 1 else halved(task.recipe)
    if stack == 1 and smaller is None:
        return ""
    task.shrunk += 1
    task.most, task.recipe = max(1, stack // 2), smaller or task.recipe
    return (
        f"with engine.accumulation = {smaller.engine.accumulation}"
        if smaller
        else f"in a stack of {task.most}, not of {stack}"
    )


def halved(recipe: Recipe) -> Recipe | None:
    """The same trial in micro-batches of half the rows (`engine.accumulation` doubled); None when rows do not halve."""
    try:
        return with_settings(recipe, {"engine.accumulation": 2 * recipe.engine.accumulation})
    except UserError:
        return None
