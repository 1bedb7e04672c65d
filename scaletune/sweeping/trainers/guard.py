"""Starts the process of a trial, and ends it with all of its descendants.

Between the worker and the user's process stands a guard, a process that only waits. It adopts the
descendants of the trial whose parents have ended (PR_SET_CHILD_SUBREAPER, Linux), and kills all of
them when the trial's own process has ended, when the worker asks for it, or when the worker is
gone. The kernel kills the user's process when the guard is gone.

On other systems the guard kills the trial's process group; a descendant that has left the group
remains.
"""

from __future__ import annotations

import ctypes
import json
import os
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, NoReturn

from scaletune.sweeping.engines.parent_death import die_with_parent, fork
from scaletune.sweeping.trainers.descendants import descendants, kill_all, kill_marked

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
_PRCTL = ctypes.CDLL(None).prctl if sys.platform == "linux" else None
TERMINATE, KILL = b"T", b"K"  # what the worker may write to a guard
LOOK = 0.05  # seconds between looks at the trial's process, where no descriptor shows its end
SETTLE = 0.5  # seconds that descendants may take to end by themselves after the trial's process
MOST = 1 << 16  # descriptors that a process may inherit


@dataclass
class End:
    """How the process of a trial ended."""

    status: int
    """Exit status; negative: the signal that ended it."""
    remaining: int = 0
    """Processes that it left running, which were killed."""


class GuardedProcess:
    """The process of a trial and its guard.

    Args:
        run: Called in the new process. It executes a program, or returns an exit status.
        mark: Path of the trial's file that is open, or named in the environment, in its processes:
            by it they are found if the guard is killed.
    """

    def __init__(self, run: Callable[[], int], mark: str):
        self.mark = mark
        alive, self._alive = os.pipe()
        self._status, status = os.pipe()
        self.output, output = os.pipe()
        ours = (self._alive, self._status, self.output)
        self.guard = fork()
        if not self.guard:
            _enter_child(lambda: _guard(run, mark, alive, status, output, ours))
        for end in (alive, status, output):
            os.close(end)
        os.set_blocking(self.output, False)
        os.set_blocking(self._status, False)
        self.pid, self._unread = 0, b""
        self.ended: End | None = None

    def fileno(self) -> int:
        """The descriptor that is readable when the guard has news."""
        return self._status

    def poll(self) -> End | None:
        """How the process ended; None while it runs."""
        with suppress(BlockingIOError):
            while self.ended is None:
                if not (new := os.read(self._status, 4096)):
                    self.ended = self._end_without_guard()
                    break
                self._unread += new
                *lines, self._unread = self._unread.split(b"\n")
                for line in lines:
                    self._hear(json.loads(line))
        return self.ended

    def _hear(self, news: dict[str, Any]) -> None:
        self.pid = news.get("pid", self.pid)
        if "status" in news:
            self.ended = End(news["status"], news["remaining"])

    def _end_without_guard(self) -> End:
        """The guard was killed: the kernel has killed the trial's process; the rest is killed."""
        if self.pid:
            _kill_group(self.pid, signal.SIGKILL)
        kill_marked(self.mark)
        return End(-signal.SIGKILL)

    def terminate(self) -> None:
        """Sends SIGTERM to the trial's process group."""
        self._ask(TERMINATE)

    def kill(self) -> None:
        """Kills the trial's process and all of its descendants."""
        self._ask(KILL)

    def _ask(self, what: bytes) -> None:
        with suppress(BrokenPipeError):
            os.write(self._alive, what)

    def close(self) -> None:
        """Ends what still runs, and the guard."""
        os.close(self._alive)
        with suppress(ChildProcessError):
            os.waitpid(self.guard, 0)
        for end in (self._status, self.output):
            os.close(end)


def _enter_child(run: Callable[[], int]) -> NoReturn:
    """Runs in a forked process and never returns into the code of the parent."""
    status = 70
    try:
        status = run()
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        with suppress(BaseException):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(status & 0xFF)


def _guard(
    run: Callable[[], int],
    mark: str,
    alive: int,
    status: int,
    output: int,
    others: tuple[int, ...],
) -> int:
    """The guard: starts the trial's process and waits for its end, or for the worker's."""
    os.setpgid(0, 0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for end in others:
        os.close(end)
    if _PRCTL:
        _PRCTL(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    guard, child = os.getpid(), os.fork()
    if not child:
        _enter_child(lambda: _start(run, mark, output, guard))
    os.close(output)
    _write(status, {"pid": child})
    watched = [alive, *_open_process(child)]
    while True:
        ready = select.select(watched, [], [], LOOK if len(watched) == 1 else 1.0)[0]
        order = os.read(alive, 1) if alive in ready else None
        if order == TERMINATE:
            _kill_group(child, signal.SIGTERM)
        elif order is not None:  # the worker is gone, or asks to kill
            kill_descendants(child)
        ended = _reap(child)
        if ended is not None or order == b"":
            break
    remaining = 0
    if ended is None or not _descendants_end():
        remaining = kill_descendants(child)
    if not _PRCTL:  # it does not adopt descendants, so some may be left in the group
        _kill_group(child, signal.SIGKILL)
    _write(status, {"status": -9 if ended is None else ended, "remaining": remaining})
    return 0


def close_descriptors() -> None:
    """Closes what a forked process has inherited, besides standard input, output and error.

    Each number stays taken, by a descriptor that cannot be read: an object of the parent that still
    has the number reads and closes nothing that this process opens later.
    """
    nothing = os.open(os.devnull, os.O_WRONLY)
    for number in range(3, min(os.sysconf("SC_OPEN_MAX"), MOST)):
        with suppress(OSError):
            os.fstat(number)
            os.dup2(nothing, number, inheritable=False)


def open_standard_streams() -> None:
    """New `sys.stdin`, `stdout` and `stderr` of a forked process, over its descriptors 0 to 2."""
    sys.stdin = open(0, closefd=False)  # noqa: SIM115
    for name, number in (("stdout", 1), ("stderr", 2)):
        options: dict[str, Any] = {"buffering": 1, "errors": "backslashreplace", "closefd": False}
        setattr(sys, name, open(number, "w", **options))  # noqa: SIM115


def _open_process(pid: int) -> list[int]:
    """A descriptor that is readable when a child has ended; none where the system has none."""
    try:
        return [os.pidfd_open(pid)]
    except (AttributeError, OSError):
        return []


def _start(run: Callable[[], int], mark: str, output: int, guard: int) -> int:
    """In the new process: a session of its own, no input, output to the worker, default signals."""
    die_with_parent()
    if os.getppid() != guard:  # it was killed before this process could ask for that
        return 70
    os.setsid()
    for each in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGPIPE):
        signal.signal(each, signal.SIG_DFL)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(output, 1)
    os.dup2(output, 2)
    close_descriptors()
    with suppress(OSError):
        os.open(mark, os.O_RDONLY | os.O_CLOEXEC)  # never closed: it marks the forks of a function
    open_standard_streams()
    return run()


def _write(end: int, news: dict[str, Any]) -> None:
    with suppress(BrokenPipeError):
        os.write(end, json.dumps(news).encode() + b"\n")


def _reap(child: int) -> int | None:
    """Waits for ended children; the exit status of `child` if it is one of them."""
    status = None
    with suppress(ChildProcessError):
        while (pair := os.waitpid(-1, os.WNOHANG))[0]:
            if pair[0] == child:
                status = os.waitstatus_to_exitcode(pair[1])
    return status


def _kill_group(leader: int, number: int) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(leader, number)


def _descendants_end() -> bool:
    """Whether all descendants end within a moment after the trial's process, as helpers do.

    This process has adopted them, so it has no children when there are none.
    """
    end = time.monotonic() + SETTLE
    while time.monotonic() < end:
        try:
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        except ChildProcessError:
            return True
        time.sleep(0.01)
    return False


def kill_descendants(child: int) -> int:
    """Kills all descendants of this process, and the group of `child`; how many ran.

    Does not wait for `child` itself, whose status the caller reads.
    """
    running = set(descendants(os.getpid()))
    _kill_group(child, signal.SIGKILL)
    return len((running | kill_all(lambda: descendants(os.getpid()))) - {child})
