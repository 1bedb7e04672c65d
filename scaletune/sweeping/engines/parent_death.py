"""Kills a worker process when its parent dies (Linux only).

A worker calls `die_with_parent` before it imports torch. A driver that is killed with SIGKILL then
leaves no orphans, even while its workers are starting, hang or are stopped. On other systems a
worker ends when its standard input closes.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import warnings

PR_SET_PDEATHSIG = 1  # linux/prctl.h
# Looked up before the fork: in a forked child few calls are safe.
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None


def die_with_parent() -> None:
    """Asks the kernel to send SIGKILL to this process when its parent exits (PR_SET_PDEATHSIG)."""
    if _PRCTL:
        _PRCTL(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)


def fork() -> int:
    """`os.fork`, without the warning of Python 3.12 where other threads run.

    The new process uses none of them.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return os.fork()
