"""The code of a Slurm job: trains one order with a local pool of one worker on the job's node.

Slurm may preempt the job and start it again at any time. It then continues with the trials that
have no answer yet, from their checkpoints.
"""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

from scaletune.records import write_atomically
from scaletune.sweeping.engines import local
from scaletune.sweeping.engines.pool import Message
from scaletune.sweeping.engines.slurm import job_messages
from scaletune.sweeping.task import Task

TAKEN = 300.0  # seconds that a job which got SIGTERM waits for Slurm to end it, at most
REPORTS = 100  # held-out losses of a trial in a heartbeat
TAIL = 2000  # characters of a worker's log in a heartbeat


class Job:
    """The callable that submitit runs on a node."""

    def __init__(self, folder: str):
        self.folder = folder

    def checkpoint(self) -> Any:
        """What submitit runs after a requeue: the same, because trials have their checkpoints."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> None:
        import submitit

        folder = Path(self.folder)
        if job_messages.order_exists(folder):
            write_atomically(folder / "job", submitit.JobEnvironment().job_id)
            runner = OrderRunner(folder)
            signal.signal(signal.SIGTERM, runner.handle_sigterm)
            runner.run()


class OrderRunner:
    """Trains the tasks of one order that have no answer yet."""

    def __init__(self, folder: Path):
        self.folder, self.queue = folder, _unanswered_tasks(folder)
        self.shares: dict[str, float] = {}  # share done by id, of the trials that have begun
        # [tokens, held-out loss] on the way by id, the latest ones
        self.reports: dict[str, list[list[float]]] = {}
        self.beats, self.last_beat = 0, -job_messages.BEAT
        self.preempted = False

    def handle_sigterm(self, *_: object) -> None:
        """Notes that Slurm is about to end the job."""
        self.preempted = True

    @property
    def wanted(self) -> bool:
        """Whether the order has not been withdrawn."""
        return job_messages.order_exists(self.folder)

    def run(self) -> None:
        """Trains until all trials are answered, the order is withdrawn or Slurm ends the job."""
        if not self.queue:
            return
        with local.LocalPool(1, max(map(_count_gpus, self.queue))) as pool:
            while (self.queue or pool.busy) and not self.preempted and self.wanted:
                pool.hand_out(self.queue)
                if stops := job_messages.read_stops(self.folder):
                    pool.request_stop(stops)
                messages = pool.messages()
                if any("lost" in message for _, message in messages):
                    time.sleep(1)  # a preemption may kill the worker before it signals the job
                # Answered without a pause, so that the driver retries a lost stack as one.
                for task, message in messages:
                    self._answer(task, message)
                self._send_heartbeat(pool.workers[0].read_log())
        if self.preempted:
            self._wait_for_end()

    def _answer(self, task: Task, message: Message) -> None:
        if "progress" in message:
            self.shares[task.id] = message["progress"]
            return
        if "report" in message:
            points = self.reports.get(task.id, [])[-REPORTS + 1 :]
            self.reports[task.id] = [*points, [*message["report"].values()]]
            return
        if "lost" in message and self.preempted:
            return
        if self.wanted:
            job_messages.write_answer(self.folder, task.id, message)
        if "refused" in message:
            raise SystemExit(1)

    def _wait_for_end(self) -> None:
        """Waits until Slurm ends the job, or sends the signal at which submitit requeues it."""
        end = time.monotonic() + TAKEN
        while self.wanted and time.monotonic() < end:
            time.sleep(0.2)
        raise SystemExit(1)

    def _send_heartbeat(self, log: str) -> None:
        if time.monotonic() - self.last_beat >= job_messages.BEAT and self.wanted:
            self.beats, self.last_beat = self.beats + 1, time.monotonic()
            content = {
                "shares": self.shares,
                "reports": self.reports,
                "log": log[-TAIL:],
                "beats": self.beats,
            }
            job_messages.write_heartbeat(self.folder, content)


def _count_gpus(task: Task) -> int:
    """GPUs of the job that the trial uses: those it requests, or one per process if there are."""
    requested = task.recipe.engine.requested_gpus
    return task.recipe.engine.processes if requested is None else requested


def _unanswered_tasks(folder: Path) -> list[Task]:
    """The tasks of an order that no earlier run of the job has trained."""
    return [
        task
        for task in job_messages.read_tasks(folder)
        if not job_messages.is_answered(folder, task.id)
    ]
