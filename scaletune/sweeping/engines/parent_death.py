"""How a process leaves with the one that started it, even while it imports, hangs or is stopped."""

from __future__ import annotations

import ctypes
import signal
import sys

PR_SET_PDEATHSIG = 1  # linux/prctl.h
_PRCTL = (
    ctypes.CDLL(None).prctl if sys.platform == "linux" else None
)  # looked up before a fork, after which little is safe to do


def leave_with_parent() -> None:
    """Be killed by the kernel when the parent is gone, through an exec too (Linux; elsewhere the end of standard input has to do)."""
    if _PRCTL:
        _PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
