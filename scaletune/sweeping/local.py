"""The local engine: one worker process a core (or a GPU), started as a plain subprocess.

Driver and worker speak JSON lines over the worker's standard input and output. A worker whose driver is gone reads the end
of its input and leaves at once, so a killed driver leaves no orphan.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import subprocess
import sys
import tempfile
from typing import IO, TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.sweeping import stacks

if TYPE_CHECKING:
    from scaletune.sweeping import Task

HEAP = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}  # glibc's: a stack's tensors would be mapped anew each step
INHERITED = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")  # would make a worker wait for peers


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def slots(workers: str | int, processes: int = 1) -> int:
    """How many workers, each with `processes` of its own: as asked, or as the GPUs go round, or the cores this process may use."""
    cores, gpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _gpus()
    if gpus and processes > gpus:
        raise UserError(f"`processes <= GPUs` must hold, but got {processes} processes and {gpus} GPUs")
    return workers if isinstance(workers, int) else max(1, (gpus or cores) // processes)


def environment(slot: int, processes: int = 1) -> dict[str, str]:
    """One thread a process (two on a shared core collapse), and its own GPU; nothing of a surrounding distributed launch."""
    kept = {key: value for key, value in os.environ.items() if key not in INHERITED and not key.startswith("TORCHELASTIC_")}
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    gpus = _gpus()
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    own = [visible[(slot * processes + i) % gpus] for i in range(processes)] if gpus else []
    return HEAP | kept | threads | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})


class Worker:
    """A worker process, its log, and the tasks it is on."""

    def __init__(self, slot: int, processes: int = 1):
        self.slot, self.heard = slot, b""
        self.tasks: list[Task] = []
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (`stop` closes it)
        command = [sys.executable, "-m", "scaletune.sweeping.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment(slot, processes)
        )
        assert self.process.stdin and self.process.stdout
        self.orders: IO[bytes] = self.process.stdin
        self.answers: IO[bytes] = self.process.stdout

    def lines(self) -> list[bytes] | None:
        """What it has said since, in whole lines, or None when its output has ended. Call when there is something to read.

        Read past any buffer of ours: a second line left in one would never wake the selector.
        """
        said = os.read(self.answers.fileno(), 1 << 16)
        *lines, self.heard = (self.heard + said).split(b"\n")
        return lines if said else None

    def last_words(self) -> str:
        """The last line of its log, and how it ended."""
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").strip().splitlines()
        return f"{lines[-1] if lines else 'none'} (exit status {self.process.wait()})"

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.orders, self.answers, self.log):
            with contextlib.suppress(BrokenPipeError):
                stream.close()


def _place(tasks: list[Task], message: dict[str, Any]) -> int:
    """Which task an answer is of; the first when it is of none, which the driver will find out."""
    return next((i for i, task in enumerate(tasks) if task.id == message["trial"]["id"]), 0)


class Pool:
    """Workers, replaced when they die."""

    def __init__(self, size: int, processes: int = 1):
        self.processes = processes  # of each worker's trials
        self.selector = selectors.DefaultSelector()
        self.workers: list[Worker] = []
        self.last_words = ""
        for slot in range(size):
            self._start(slot)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.stop()
        self.selector.close()

    def _start(self, slot: int) -> None:
        worker = Worker(slot, self.processes)
        self.workers.append(worker)
        self.selector.register(worker.answers, selectors.EVENT_READ, worker)

    @property
    def busy(self) -> bool:
        return any(worker.tasks for worker in self.workers)

    def hand_out(self, queue: list[Task]) -> None:
        """Give each idle worker the next task, and what may train as one model with it."""
        for worker in [worker for worker in self.workers if not worker.tasks]:
            if not queue:
                return
            worker.tasks = stacks.take(queue, len(self.workers))
            orders = [{"sweep": task.sweep, "recipe": task.recipe.model_dump()} for task in worker.tasks]
            with contextlib.suppress(BrokenPipeError):  # a dead worker shows as the end of its output
                worker.orders.write(json.dumps(orders).encode() + b"\n")
                worker.orders.flush()

    def messages(self) -> list[tuple[Task, dict[str, Any] | None]]:
        """Wait for workers to speak: (task, message), the message None when the worker died on it."""
        heard: list[tuple[Task, dict[str, Any] | None]] = []
        for key, _ in self.selector.select():
            worker: Worker = key.data
            lines = worker.lines()
            for message in map(json.loads, lines or []):
                if "progress" in message:
                    heard += [(task, message) for task in worker.tasks]
                else:
                    heard.append((worker.tasks.pop(_place(worker.tasks, message)), message))
            if lines is None:
                heard += [(task, None) for task in worker.tasks]
                self._replace(worker)
        return heard

    def _replace(self, worker: Worker) -> None:
        self.selector.unregister(worker.answers)
        self.workers.remove(worker)
        self.last_words = worker.last_words()
        worker.stop()
        self._start(worker.slot)
