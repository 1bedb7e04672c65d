"""The local engine: one worker process per GPU or CPU core, each started as a plain subprocess.

Driver and worker exchange JSON lines over the worker's standard input and output. A worker whose
driver is gone reads the end of its input and exits at once; if it cannot, the kernel kills it
(`parent_death`). A killed driver leaves no orphans.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from scaletune import environment
from scaletune.sweeping import stacks
from scaletune.sweeping.engines import devices
from scaletune.sweeping.engines.forked_worker import ForkedProcess
from scaletune.sweeping.engines.parent_death import die_with_parent
from scaletune.sweeping.engines.pool import Message
from scaletune.sweeping.out_of_memory import kernel_kills, ran_out_of_memory
from scaletune.sweeping.task import Task

if TYPE_CHECKING:
    from scaletune.sweeping.trainers.start import Train

WAIT = 1.0  # seconds that the driver waits for a message before it checks for hung workers
GUARD = 10.0  # seconds that the guard of a user's trial may take to end it
LOG = 1 << 16  # bytes kept of a log, from its end

# For glibc's malloc. Without these a stack's tensors are mapped into memory anew in each step.
MALLOC_SETTINGS = {
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**33),
}


def _count_gpus() -> int:
    import torch

    return torch.cuda.device_count()


def _count_cores() -> int:
    """The number of CPU cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def count_workers(workers: str | int, processes: int = 1, requested: int | None = None) -> int:
    """The number of workers on this machine for trials of `processes` processes.

    "auto": as many as the GPUs allow; on a machine without GPUs, as many as its CPU cores allow.
    `requested` is the number of GPUs per trial; None: one per process.
    """
    gpus = _count_gpus()
    per_worker = devices.gpus_per_worker(requested, processes, gpus)
    return devices.count_workers(workers, per_worker, processes, gpus, _count_cores())


def worker_environment(slot: int, per_worker: int = 1, gpus: int | None = None) -> dict[str, str]:
    """The environment variables of the worker with index `slot`.

    One thread per process (two threads on a shared core are much slower) and `per_worker` of the
    `gpus` GPUs; by default of all that torch counts. Variables that could change what a trial
    computes, or of a surrounding distributed launch, are removed.
    """
    gpus = _count_gpus() if gpus is None else gpus
    visible = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(gpus)))).split(",")
    own = devices.pin_gpus(slot, per_worker, visible[:gpus])
    return (
        environment.trial_environment(os.environ)
        | MALLOC_SETTINGS
        | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}
        | ({"CUDA_VISIBLE_DEVICES": ",".join(own)} if gpus else {})
    )


def _start_worker(log: IO[bytes], env: dict[str, str]) -> subprocess.Popen[bytes]:
    """A worker in a new interpreter.

    With a process group of its own, an interrupt from the keyboard reaches the driver only, and
    `Worker.stop` also ends the processes that the worker started.
    """
    return subprocess.Popen(
        [sys.executable, "-m", "scaletune.sweeping.engines.worker"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env=env,
        preexec_fn=die_with_parent,
        process_group=0,
    )


class Worker:
    """A worker process, its log, and the tasks that it trains."""

    def __init__(
        self,
        slot: int,
        processes: int = 1,
        gpus: int | None = None,
        train: Train | None = None,
    ):
        self.slot, self.unread = slot, b""  # bytes of a message that is not complete yet
        self.tasks: dict[str, Task] = {}  # those without a result yet
        self.free = 0  # rows of its stack that are free for further tasks
        self.log = tempfile.TemporaryFile()  # noqa: SIM115 (`LocalPool` closes it)
        env = worker_environment(slot, processes, gpus)
        self.process = (
            ForkedProcess(train, self.log, env) if train else _start_worker(self.log, env)
        )
        assert self.process.stdin and self.process.stdout
        self.input: IO[bytes] = self.process.stdin
        self.output: IO[bytes] = self.process.stdout
        self.last_message, self.kills = time.monotonic(), kernel_kills()

    def send(self, tasks: Sequence[Task]) -> None:
        """Starts the training of tasks; several tasks train as one model."""
        self.tasks, self.free = {}, 0
        self.last_message, self.kills = time.monotonic(), kernel_kills()
        self.refill(tasks)

    def refill(self, tasks: Sequence[Task]) -> None:
        """Adds tasks to those in training, for free rows of their stack."""
        orders = [
            {
                "id": task.id,
                "sweep": task.sweep,
                "recipe": task.recipe.dump(),
                "population": task.population,
            }
            for task in tasks
        ]
        self.tasks |= {task.id: task for task in tasks}
        self.free = max(0, self.free - len(tasks))
        self._write(orders)

    def request_stop(self, ids: Collection[str]) -> None:
        """Asks the worker to stop those of the trials that it trains."""
        if own := [id for id in ids if id in self.tasks]:
            self._write({"stop": own})

    def _write(self, content: Any) -> None:
        with contextlib.suppress(BrokenPipeError):  # a dead worker shows as the end of its output
            self.input.write(json.dumps(content).encode() + b"\n")
            self.input.flush()

    def read_lines(self) -> list[bytes] | None:
        """The complete lines of new output, or None when the output has ended.

        For a readable output only. Reads the file descriptor itself: a second line that stayed in
        a Python buffer would never wake the selector.
        """
        new = os.read(self.output.fileno(), 1 << 16)
        self.last_message = time.monotonic()
        *lines, self.unread = (self.unread + new).split(b"\n")
        return lines if new else None

    def tasks_of(self, message: Message) -> list[Task]:
        """The task that a message names by its id, else all tasks of this worker."""
        id = message.get("id") or message.get("trial", {}).get("id")
        if {"report", "free"} & message.keys():
            return [self.tasks[id]] if id in self.tasks else []
        return [self.tasks[id]] if id in self.tasks else list(self.tasks.values())

    @property
    def seconds_silent(self) -> float:
        """Seconds since the last message, by the monotonic clock."""
        return time.monotonic() - self.last_message

    @property
    def hung(self) -> bool:
        """Whether the worker has been silent for longer than its tasks' `engine.patience`."""
        patience = (task.recipe.engine.patience for task in self.tasks.values())
        return self.seconds_silent > min(patience, default=float("inf"))

    def finish(self, task: Task) -> None:
        """Removes a task that has its result; empties the log after the last one."""
        del self.tasks[task.id]
        if not self.tasks:
            os.lseek(self.log.fileno(), 0, os.SEEK_SET)  # the worker writes at the same offset
            os.ftruncate(self.log.fileno(), 0)

    def read_log(self) -> str:
        """The end of the log of the current tasks."""
        size = os.fstat(self.log.fileno()).st_size
        return os.pread(self.log.fileno(), LOG, max(0, size - LOG)).decode(errors="replace").strip()

    def stop(self) -> int:
        """Kills the worker and the processes that it started; returns its exit status."""
        # macOS raises PermissionError for a process group that has ended
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self._wait_for_guard()
        for stream in (self.input, self.output):
            with contextlib.suppress(BrokenPipeError):
                stream.close()
        return self.process.wait()

    def _wait_for_guard(self) -> None:
        """Waits until the guard of a user's trial has ended the trial's processes, and itself.

        It shares the worker's output, which ends then.
        """
        end = time.monotonic() + GUARD
        with contextlib.suppress(OSError, ValueError):
            while (seconds := end - time.monotonic()) > 0:
                if select.select([self.output], [], [], seconds)[0] and not os.read(
                    self.output.fileno(), 1 << 16
                ):
                    return


class LocalPool:
    """Worker processes on this machine; a worker that dies or hangs is replaced."""

    def __init__(
        self,
        size: int,
        processes: int = 1,
        gpus: int | None = None,
        train: Train | None = None,
    ):
        self.train = train
        self.processes, self.gpus = processes, gpus  # per worker; in total (None: as torch counts)
        self.selector = selectors.DefaultSelector()
        self.workers: list[Worker] = []
        self.news: list[tuple[Task, Message]] = []  # messages that the pool itself makes
        for slot in range(size):
            self._start(slot)

    def __enter__(self) -> LocalPool:
        return self

    def __exit__(self, *exception: object) -> None:
        for worker in self.workers:
            worker.stop()
            worker.log.close()
        self.selector.close()

    def _start(self, slot: int) -> None:
        worker = Worker(slot, self.processes, self.gpus, self.train)
        self.workers.append(worker)
        self.selector.register(worker.output, selectors.EVENT_READ, worker)

    @property
    def busy(self) -> bool:
        return any(worker.tasks for worker in self.workers)

    def hand_out(self, queue: list[Task]) -> None:
        """Gives each idle worker the next task and those that can train as one model with it.

        A worker whose stack has free rows gets further tasks that can train in it.
        """
        for worker in [worker for worker in self.workers if not worker.tasks]:
            if queue:
                running = sum(stacks.count_runs(other.tasks.values()) for other in self.workers)
                tasks = stacks.take_stack(queue, len(self.workers), running)
                worker.send(tasks)
                self.news += [(task, {"progress": 0.0}) for task in tasks]
        for worker in [worker for worker in self.workers if worker.tasks and worker.free]:
            if tasks := stacks.take_refill(queue, next(iter(worker.tasks.values())), worker.free):
                worker.refill(tasks)
                self.news += [(task, {"progress": 0.0}) for task in tasks]

    def request_stop(self, ids: Collection[str]) -> None:
        """Asks for the end of trials that are in training."""
        for worker in self.workers:
            worker.request_stop(ids)

    def messages(self) -> list[tuple[Task, Message]]:
        """Waits up to `WAIT` seconds for messages; replaces workers that died or hang."""
        messages, self.news = self.news, []
        for key, _ in self.selector.select(0 if messages else WAIT):
            messages += self._read(key.data)
        for worker in [worker for worker in self.workers if worker.hung]:
            reason = f"its worker sent no message for {worker.seconds_silent:.0f} s"
            messages += self._replace(worker, reason)
        return messages

    def _read(self, worker: Worker) -> list[tuple[Task, Message]]:
        lines, messages = worker.read_lines(), []
        for message in map(json.loads, lines or []):
            worker.free += message.get("free", 0)
            for task in worker.tasks_of(message):
                if {"trial", "trials", "lost"} & message.keys():
                    message["log"] = message.get("log") or worker.read_log()
                    worker.finish(task)
                messages.append((task, message))
        return (
            messages if lines is not None else messages + self._replace(worker, "its worker died")
        )

    def _replace(self, worker: Worker, reason: str) -> list[tuple[Task, Message]]:
        """Starts another worker in place of this one, and reports its tasks as lost."""
        self.selector.unregister(worker.output)
        self.workers.remove(worker)
        status, log, tasks = worker.stop(), worker.read_log(), list(worker.tasks.values())
        worker.log.close()
        self._start(worker.slot)
        lost: Message = {
            "lost": reason,
            "status": status,
            "memory": ran_out_of_memory(log, status, worker.kills),
            "log": log,
            "stack": stacks.count_models(tasks),
        }
        return [(task, lost) for task in tasks]


def open_pool(
    queue: Sequence[Task],
    workers: str | int,
    growing: bool,
    stem: Path,
    train: Train | None = None,
) -> LocalPool:
    """Opens a pool with no more workers than the queue has runs, unless the queue may grow."""
    engine = max((task.recipe.engine for task in queue), key=lambda engine: engine.group_size)
    gpus = _count_gpus()
    per_worker = devices.gpus_per_worker(engine.requested_gpus, engine.processes, gpus)
    size = count_workers(workers, engine.processes, engine.requested_gpus)
    size = size if growing else min(size, stacks.count_runs(queue))
    if note := devices.describe_sharing(size, per_worker, gpus):
        print(note, file=sys.stderr)
    return LocalPool(size, per_worker, gpus, train)
