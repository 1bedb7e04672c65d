"""The local engine: one worker process a core (or a GPU), started as a plain subprocess.

Driver and worker speak JSON lines over the worker's standard input and output. A worker whose driver is gone reads the end
of its input and leaves at once, and is killed by the kernel where it cannot: a killed driver leaves no orphan.
"""

from __future__ import annotations

import contextlib
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from scaletune.errors import UserError
from scaletune.sweeping import stacks
from scaletune.sweeping.engines.parent_death import leave_with_parent
from scaletune.sweeping.engines.pool import Message
from scaletune.sweeping.out_of_memory import kernel_kills, ran_out
from scaletune.sweeping.task import Task

WAIT = 1.0  # seconds until the driver looks up though no worker speaks
LOG = 1 << 16  # bytes of a log that are kept, the last ones

HEAP = {  # glibc's: a stack's tensors would be mapped anew each step
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}
INHERITED = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "MASTER_ADDR",
    "MASTER_PORT",
)  # would make a worker wait for peers


def _gpus() -> int:
    import torch

    return torch.cuda.device_count()


def slots(workers: str | int, processes: int = 1) -> int:
    """How many workers, each with `processes` of its own: as asked, or as the GPUs go round, or the cores this process may use."""
    cores, gpus = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        _gpus(),
    )
    if gpus and processes > gpus:
        raise UserError(
            f"`processes <= GPUs` must hold, but got {processes} processes and {gpus} GPUs"
        )
    return workers if isinstance(workers, int) else max(1, (gpus or cores) // processes)


def environment(slot: int, processes: int = 1, gpus: int | None = None) -> dict[str, str]:
    """One thread a process (two on a shared core collapse), and its own of `gpus` GPUs; nothing of a surrounding distributed launch."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in INHERITED and not key.startswith("TORCHELASTIC_")
    }
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
    gpus = _gpus() if gpus is None else gpus
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    own = [visible[(slot * processes + i) % gpus] for i in range(processes)] if gpus else []
    return kept | HEAP | threads | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if own else {})


class Worker:
    """A worker process, its log, and the tasks of the order it is on."""

    def __init__(self, slot: int, processes: int = 1, gpus: int | None = None):
        self.slot, self.heard = slot, b""
        self.tasks: dict[str, Task] = {}  # those that it has not answered yet
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (`stop` closes it)
        command = [sys.executable, "-m", "scaletune.sweeping.engines.worker"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, env=environment(slot, processes, gpus),
            preexec_fn=leave_with_parent,
            process_group=0,  # an interrupt from the keyboard is the driver's to take; and its own processes go with it
        )  # fmt: skip
        assert self.process.stdin and self.process.stdout
        self.orders: IO[bytes] = self.process.stdin
        self.answers: IO[bytes] = self.process.stdout
        self.spoke, self.kills = time.monotonic(), kernel_kills()

    def order(self, tasks: Sequence[Task]) -> None:
        """Give it what to train, as one model where it is several."""
        orders = [
            {"sweep": task.sweep, "recipe": task.recipe.model_dump(), "population": task.population}
            for task in tasks
        ]
        self.tasks = {task.id: task for task in tasks}
        self.spoke, self.kills = time.monotonic(), kernel_kills()
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows as the end of its output
            self.orders.write(json.dumps(orders).encode() + b"\n")
            self.orders.flush()

    def lines(self) -> list[bytes] | None:
        """What it has said since, in whole lines, or None when its output has ended. Call when there is something to read.

        Read past any buffer of ours: a second line left in one would never wake the selector.
        """
        said = os.read(self.answers.fileno(), 1 << 16)
        self.spoke = time.monotonic()
        *lines, self.heard = (self.heard + said).split(b"\n")
        return lines if said else None

    def concerns(self, message: Message) -> list[Task]:
        """The tasks a message is about: the one whose id it has, else all of the order."""
        named = message.get("id") or message.get("trial", {}).get("id")
        return [self.tasks[named]] if named in self.tasks else list(self.tasks.values())

    @property
    def hung(self) -> bool:
        """Whether it has said nothing for longer than its trials have patience, by a clock that no one sets."""
        patience = min(
            (task.recipe.engine.patience for task in self.tasks.values()), default=float("inf")
        )
        return time.monotonic() - self.spoke > patience

    def answered(self, task: Task) -> None:
        """One task less; after the last of an order the log starts anew."""
        del self.tasks[task.id]
        if not self.tasks:
            os.lseek(self.log.fileno(), 0, os.SEEK_SET)  # the worker writes at the same offset
            os.ftruncate(self.log.fileno(), 0)

    def said(self) -> str:
        """The end of its log since it answered the order before."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), LOG, max(0, size - LOG)).decode(errors="replace").strip()

    def stop(self) -> int:
        """Kill it and the processes it started; the status it ended with."""
        with contextlib.suppress(
            ProcessLookupError, PermissionError
        ):  # macOS says so of a group of the dead
            os.killpg(self.process.pid, signal.SIGKILL)
        for stream in (self.orders, self.answers):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return self.process.wait()


class Pool:
    """Workers, replaced when they die; `gpus`: as torch counts them, unless said."""

    def __init__(self, size: int, processes: int = 1, gpus: int | None = None):
        self.processes, self.gpus = processes, gpus  # of each worker's trials; of all workers
        self.selector = selectors.DefaultSelector()
        self.workers: list[Worker] = []
        self.news: list[tuple[Task, Message]] = []  # that no worker needs to say
        for slot in range(size):
            self._start(slot)

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.stop()
            worker.log.close()
        self.selector.close()

    def _start(self, slot: int) -> None:
        worker = Worker(slot, self.processes, self.gpus)
        self.workers.append(worker)
        self.selector.register(worker.answers, selectors.EVENT_READ, worker)

    @property
    def busy(self) -> bool:
        return any(worker.tasks for worker in self.workers)

    def hand_out(self, queue: list[Task]) -> None:
        """Give each idle worker the next task, and what may train as one model with it."""
        for worker in [worker for worker in self.workers if not worker.tasks]:
            if queue:
                taken = stacks.take(
                    queue,
                    len(self.workers),
                    sum(stacks.runs(other.tasks.values()) for other in self.workers),
                )
                worker.order(taken)
                self.news += [(task, {"progress": 0.0}) for task in taken]

    def messages(self) -> list[tuple[Task, Message]]:
        """Wait for workers to speak, at most `WAIT`: (task, message). A worker that died or hung is replaced."""
        heard, self.news = self.news, []
        for key, _ in self.selector.select(0 if heard else WAIT):
            heard += self._heard(key.data)
        for worker in [worker for worker in self.workers if worker.hung]:
            heard += self._replace(
                worker, f"its worker said nothing for {time.monotonic() - worker.spoke:.0f} s"
            )
        return heard

    def _heard(self, worker: Worker) -> list[tuple[Task, Message]]:
        lines, heard = worker.lines(), []
        for message in map(json.loads, lines or []):
            for task in worker.concerns(message):
                if "trial" in message or "trials" in message:
                    message["log"] = worker.said()
                    worker.answered(task)
                heard.append((task, message))
        return heard if lines is not None else heard + self._replace(worker, "its worker died")

    def _replace(self, worker: Worker, why: str) -> list[tuple[Task, Message]]:
        """Start another in its place; what it was on is lost."""
        self.selector.unregister(worker.answers)
        self.workers.remove(worker)
        status, log, tasks = worker.stop(), worker.said(), list(worker.tasks.values())
        worker.log.close()
        self._start(worker.slot)
        lost: Message = {
            "lost": why, "status": status, "memory": ran_out(log, status, worker.kills), "log": log, "stack": stacks.models(tasks),
        }  # fmt: skip
        return [(task, lost) for task in tasks]


def opened(queue: Sequence[Task], workers: str | int, growing: bool, stem: Path) -> Pool:
    """As many workers as go round, and no more than the queue can use where it will not grow."""
    processes = max(task.recipe.engine.processes for task in queue)
    most = slots(workers, processes)
    return Pool(most if growing else min(most, stacks.runs(queue)), processes)
