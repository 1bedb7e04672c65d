"""Out of memory: how a dead worker shows it, and how its trial is made smaller."""

from __future__ import annotations

import re
import signal
from pathlib import Path

from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings

SAID = re.compile(
    r"\bMemoryError\b|OutOfMemoryError|out of memory|an't allocate memory|annot allocate memory|bad_alloc|DefaultCPUAllocator", re.I
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


def halved(recipe: Recipe) -> Recipe | None:
    """The same trial in micro-batches of half the rows (`engine.accumulation` doubled); None when rows do not halve."""
    try:
        return with_settings(recipe, {"engine.accumulation": 2 * recipe.engine.accumulation})
    except UserError:
        return None
