"""A worker process that is forked from this one, for a function that no other process can import.

A function of a notebook or of the script that runs cannot be sent to another interpreter. A forked
process has it. Nothing that this process computes on a GPU survives a fork, so it is refused then.
"""

from __future__ import annotations

import os
import sys
from functools import partial
from pathlib import Path
from typing import IO, TYPE_CHECKING, NoReturn

from scaletune.errors import UserError
from scaletune.sweeping.engines.parent_death import die_with_parent, fork
from scaletune.sweeping.trainers.guard import close_descriptors, open_standard_streams

if TYPE_CHECKING:
    from scaletune.sweeping.trainers.start import Train


class ForkedProcess:
    """The part of `subprocess.Popen` that a worker needs, for a fork of this process."""

    def __init__(self, train: Train, log: IO[bytes], env: dict[str, str]):
        torch = sys.modules.get("torch")
        if torch is not None and torch.cuda.is_initialized():
            raise UserError(
                "a function of a notebook or script needs a process that has not used the GPU yet:"
                " restart the kernel, or put the function into a module and import it"
            )
        orders, self_in = os.pipe()
        self_out, messages = os.pipe()
        self.pid = fork()
        if not self.pid:
            _run_worker(train, (orders, messages, log.fileno()), env)
        os.close(orders)
        os.close(messages)
        self.stdin: IO[bytes] = os.fdopen(self_in, "wb")
        self.stdout: IO[bytes] = os.fdopen(self_out, "rb", buffering=0)
        os.setpgid(self.pid, self.pid)

    def wait(self) -> int:
        """Waits for the end of the process; its exit status."""
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def _run_worker(train: Train, streams: tuple[int, int, int], env: dict[str, str]) -> NoReturn:
    """In the forked process: becomes a worker, and never returns into the code of the parent."""
    try:
        die_with_parent()
        os.setpgid(0, 0)
        for number, stream in enumerate(streams):
            os.dup2(stream, number)
        close_descriptors()
        os.environ.clear()
        os.environ.update(env)
        open_standard_streams()
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # the threads of the parent do not exist here
        from scaletune.sweeping.engines import worker

        worker.main(train)
    finally:
        os._exit(1)


def is_importable(train: Train) -> bool:
    """Whether another process can import the function by its module and name."""
    module, name = getattr(train, "__module__", None), getattr(train, "__qualname__", "")
    if module in (None, "__main__") or "<" in name:
        return False
    value: object = sys.modules.get(str(module))
    for part in name.split("."):
        value = getattr(value, part, None)
    return value is train


def function_name(train: Train) -> str:
    """`package.module:function`; the module of a notebook or script is `__main__`.

    A `functools.partial` has the name of its function and the arguments that it binds.
    """
    if isinstance(train, partial):
        bound = [*map(_plain, train.args)]
        bound += [f"{name}={_plain(value)}" for name, value in sorted(train.keywords.items())]
        return f"{function_name(train.func)}<{', '.join(bound)}>"
    module = getattr(train, "__module__", None) or "__main__"
    return f"{module}:{getattr(train, '__qualname__', type(train).__name__)}"


def _plain(value: object) -> str:
    """A plain value as Python writes it, anything else by its type: it may have an address."""
    plain = value is None or isinstance(value, str | int | float)
    return repr(value) if plain else type(value).__name__


def import_path() -> str:
    """PYTHONPATH with which another process finds the modules that this one finds."""
    return os.pathsep.join(dict.fromkeys(str(Path(p).absolute()) for p in sys.path))
