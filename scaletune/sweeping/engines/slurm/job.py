"""What runs in a Slurm job: one order, by a local pool of one worker on the job's node.

Slurm may take the job away at any time and start it again: it then goes on with what is not answered, from the trials' checkpoints.
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

TAKEN = 300.0  # seconds that a job which is being taken away waits for its end, at most
TAIL = 2000  # characters of a worker's log in a beat


class Job:
    """What submitit calls, on a node."""

    def __init__(self, folder: str):
        self.folder = folder

    def checkpoint(self) -> Any:
        """What to call when the job is back from the queue: the same, for trials keep checkpoints of their own."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(self)

    def __call__(self) -> None:
        import submitit

        folder = Path(self.folder)
        if job_messages.standing(folder):
            write_atomically(folder / "job", submitit.JobEnvironment().job_id)
            training = Training(folder)
            signal.signal(signal.SIGTERM, training.take)
            training.run()


class Training:
    """An order under way."""

    def __init__(self, folder: Path):
        self.folder, self.queue = folder, _unanswered(folder)
        self.shares: dict[str, float] = {}  # by id, of the trials begun
        self.beats, self.beaten = 0, -job_messages.BEAT
        self.taken = False

    def take(self, *_: object) -> None:
        """Slurm tells the job to go."""
        self.taken = True

    def run(self) -> None:
        """Train what the queue has, unless the order is withdrawn."""
        if not self.queue:
            return
        with local.Pool(1, max(task.recipe.engine.processes for task in self.queue)) as pool:
            while (
                (self.queue or pool.busy) and not self.taken and job_messages.standing(self.folder)
            ):
                pool.hand_out(self.queue)
                heard = pool.messages()
                if any("lost" in message for _, message in heard):
                    time.sleep(1)  # what takes the job away may take its worker first
                for (
                    task,
                    message,
                ) in heard:  # answered together: what was a stack is taken up as one
                    self._hear(task, message)
                self._beat(pool.workers[0].said())
        if self.taken:
            self._wait()

    def _hear(self, task: Task, message: Message) -> None:
        if "progress" in message:
            self.shares[task.id] = message["progress"]
            return
        if "lost" in message and self.taken:
            return
        if job_messages.standing(self.folder):
            job_messages.answer(self.folder, task.id, message)
        if "refused" in message:
            raise SystemExit(1)

    def _wait(self) -> None:
        """Until Slurm ends the job, or sends the signal at which submitit puts it back into the queue."""
        end = time.monotonic() + TAKEN
        while job_messages.standing(self.folder) and time.monotonic() < end:
            time.sleep(0.2)
        raise SystemExit(1)

    def _beat(self, log: str) -> None:
        if time.monotonic() - self.beaten >= job_messages.BEAT and job_messages.standing(
            self.folder
        ):
            self.beats, self.beaten = self.beats + 1, time.monotonic()
            job_messages.beat(
                self.folder, {"shares": self.shares, "log": log[-TAIL:], "beats": self.beats}
            )


def _unanswered(folder: Path) -> list[Task]:
    """Of an order, what no earlier run of the job has trained."""
    return [
        task for task in job_messages.tasks(folder) if not job_messages.answered(folder, task.id)
    ]
