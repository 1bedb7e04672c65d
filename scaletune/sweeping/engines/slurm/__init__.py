"""The Slurm engine: submits trials as job arrays (submitit) and reads results from JSON files.

The files are in `sweeps/NAME.slurm`. `sweeps/`, `runs/`, the data and the Python environment must
be on file systems that the login node and the compute nodes share under the same paths.

A job that is preempted or reaches its time limit is requeued and continues from its trials'
checkpoints. A job that is killed or loses its node is lost, and the driver submits its trials
again. A driver that is killed leaves its jobs running: the next driver reads their results, waits
for the other jobs, and submits nothing twice.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Collection, Sequence
from pathlib import Path

from scaletune.errors import UserError
from scaletune.recipe import Engine
from scaletune.sweeping import stacks
from scaletune.sweeping.engines.pool import Message
from scaletune.sweeping.engines.slurm import cluster, job_messages, job_size
from scaletune.sweeping.engines.slurm.cluster import GONE, SlurmCluster, State, SubmissionRefused
from scaletune.sweeping.engines.slurm.job_messages import Order
from scaletune.sweeping.out_of_memory import OUT_OF_MEMORY
from scaletune.sweeping.task import Task

WAIT = 1.0  # seconds between checks for answers
LOOK = 5.0  # seconds between requests to the controller and reads of the jobs' heartbeats
GRACE = 15.0  # seconds until the last files of an ended job must be visible
SETTLE = 10.0  # seconds that jobs which are done or cancelled may take to disappear
AGAIN = 30.0  # seconds after which a refused array is submitted again
REFUSALS = 900.0  # seconds that the controller may be unreachable while we have no job
# Reasons to wait that need no message to the user: they pass by themselves.
USUAL = {
    "None",
    "Priority",
    "Resources",
    "JobArrayTaskLimit",
    "BeginTime",
    "Dependency",
    "Cleaning",
}


class SlurmPool:
    """Slurm jobs, each with an order (a list of trials to train).

    `workers` jobs run at once, at most. With `leave`, an interrupt leaves the jobs to the next
    driver instead of cancelling them.
    """

    def __init__(self, root: Path, workers: int, cluster: SlurmCluster, leave: bool = False):
        self.root, self.workers, self.cluster, self.leave = root, workers, cluster, leave
        self.out: list[Order] = []  # orders with trials that we wait for
        earlier = job_messages.pending_orders(root)
        self.earlier = {id: order for order in earlier for id in order.ids}  # not requested yet
        self.jobs = [order.job for order in earlier]  # all jobs that may still run
        self.news: list[tuple[Task, Message]] = []  # messages that the pool itself makes
        self.back: list[Task] = []  # tasks of lost jobs that had not begun
        self.delivered: list[Path] = []  # answers that the driver has received
        self.printed: set[str] = set()
        # Times (monotonic clock) of the last look, the next submission and the first refusal.
        self.last_look, self.again, self.refused = -LOOK, 0.0, 0.0
        if earlier:
            self._print_once(f"{len(earlier)} jobs of an earlier driver continue")

    def __enter__(self) -> SlurmPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self._delete_delivered()
        pending = {order.folder: order for order in (*self.out, *self.earlier.values())}.values()
        if pending and self.leave and kind is KeyboardInterrupt:
            self._print_once(f"{len(pending)} jobs stay in Slurm for the next driver")
            return
        for order in pending:
            job_messages.withdraw(order.folder)
        self.cluster.cancel([order.job for order in pending if order.job])
        self._wait_for_jobs_to_end()
        job_messages.clean_up(self.root)
        if pending:
            self._print_once(f"cancelled {len(pending)} jobs")

    @property
    def busy(self) -> bool:
        return bool(self.out or self.news or self.back)

    def hand_out(self, queue: list[Task]) -> None:
        """Adopts tasks that are answered or in a job; submits the rest as an array.

        Submits only while fewer than `workers` jobs are out.
        """
        queue[:0], self.back = self.back, []
        self._adopt(queue)
        free = self.workers - len(self.out)
        if not queue or free <= 0 or time.monotonic() < self.again:
            return
        engine = queue[0].recipe.engine
        packs = job_size.pack(queue, self.workers)
        orders = [job_messages.write_order(self.root, pack) for pack in packs]
        self.out += orders  # before the submission, so that an interrupt withdraws them
        try:
            self._submit(orders, engine, free)
        except SubmissionRefused as error:
            queue[:0] = [task for order in orders for task in order.tasks.values()]
            self._drop(orders)
            self._handle_refusal(str(error))

    def _submit(self, orders: Sequence[Order], engine: Engine, parallel: int) -> None:
        jobs = self.cluster.submit([order.folder for order in orders], engine, parallel)
        self.jobs += jobs
        self.refused = 0.0
        for order, job in zip(orders, jobs, strict=True):
            job_messages.write_job_id(order, job)

    def request_stop(self, ids: Collection[str]) -> None:
        """Asks for the end of trials that are in training."""
        for order in self.out:
            if own := [id for id in ids if id in order.tasks]:
                job_messages.write_stops(order, own)

    def messages(self) -> list[tuple[Task, Message]]:
        """New answers of jobs; every `LOOK` seconds also their progress and losses."""
        self._delete_delivered()
        if not self.news:
            time.sleep(WAIT)
        messages, self.news = self.news + self._read_answers(), []
        if time.monotonic() - self.last_look >= LOOK:
            self.last_look = time.monotonic()
            messages += self._look()
        self._drop([order for order in self.out if not order.tasks])
        return messages

    def _adopt(self, queue: list[Task]) -> None:
        """Takes off the queue the tasks that an earlier driver's jobs have answered or hold."""
        files = job_messages.list_answers(self.root) if queue else set()
        for task in queue[:]:
            path = job_messages.answer_path(self.root, task.id)
            message = job_messages.read_json(path) if path.name in files else None
            if message and "trial" in message:
                self.news.append((task, message))
                self.delivered.append(path)
            elif order := self.earlier.pop(task.id, None):
                order.tasks[task.id] = task
                self.out += [order] if order not in self.out else []
            else:
                continue
            queue.remove(task)

    def _read_answers(self) -> list[tuple[Task, Message]]:
        messages, files = [], job_messages.list_answers(self.root) if self.out else set()
        for order in self.out:
            for task in [task for task in order.tasks.values() if f"{task.id}.json" in files]:
                path = job_messages.answer_path(self.root, task.id)
                message = job_messages.read_json(path)
                if not message:
                    continue
                if "trial" in message:
                    self.delivered.append(path)
                else:
                    path.unlink()  # a loss: of this try only
                if "trial" in message or message["order"] == order.folder.name:
                    messages.append((order.tasks.pop(task.id), message))
        return messages

    def _look(self) -> list[tuple[Task, Message]]:
        """Progress and losses, from the controller's states and the jobs' heartbeats."""
        states = self.cluster.states() if self.out else None
        if states is None:
            return []
        self._print_reasons([states[order.job] for order in self.out if order.job in states])
        self._running_jobs(states)
        return [
            message
            for order in self.out
            if order.tasks
            for message in self._judge(order, states.get(order.job, GONE), time.monotonic())
        ]

    def _judge(self, order: Order, state: State, now: float) -> list[tuple[Task, Message]]:
        """The progress of a job, or its loss: it ended without all answers, or it is silent."""
        heartbeat = job_messages.read_json(order.folder / "beat.json") or {}
        changed, order.heartbeat = heartbeat != order.heartbeat, heartbeat
        if state.name != "RUNNING" or changed or not order.last_change:
            order.last_change = now
        if state.ended:
            order.ended = now if order.ended is None else order.ended
            if now - order.ended < GRACE:
                return []
            return self._lose(order, f"its job {order.job} ended as {state.name}", state)
        order.ended = None
        silence = now - order.last_change
        if silence > min(task.recipe.engine.patience for task in order.tasks.values()):
            self.cluster.cancel([order.job])
            reason = f"its job {order.job} sent no message for {silence:.0f} s"
            return self._lose(order, reason, state)
        shares = heartbeat.get("shares", {}) if changed else {}
        progress: list[tuple[Task, Message]] = [
            (task, {"progress": shares[id]}) for id, task in order.tasks.items() if id in shares
        ]
        return progress + job_messages.new_reports(order)

    def _lose(self, order: Order, reason: str, state: State) -> list[tuple[Task, Message]]:
        """Reports the trials that the job had begun as lost; the others go back to the queue.

        If it had begun none, all are lost: another job would not begin them either.
        """
        begun = order.heartbeat.get("shares") or order.tasks
        logs = (order.heartbeat.get("log", ""), self.cluster.log(order.job))
        log = "\n".join(filter(None, logs))
        lost_tasks = [task for id, task in order.tasks.items() if id in begun]
        lost: Message = {
            "lost": reason,
            "status": state.status,
            "memory": state.name == "OUT_OF_MEMORY" or bool(OUT_OF_MEMORY.search(log)),
            "log": log,
            "stack": stacks.count_models(lost_tasks),
        }
        self.back += [task for id, task in order.tasks.items() if id not in begun]
        order.tasks.clear()
        return [(task, lost) for task in lost_tasks]

    def _drop(self, orders: Sequence[Order]) -> None:
        """Removes orders that we wait for no longer."""
        for order in orders:
            job_messages.withdraw(order.folder)
            unrequested = [id for id in order.ids if self.earlier.pop(id, None)]
            if unrequested:
                self.cluster.cancel([order.job])
        self.out = [order for order in self.out if order not in orders]

    def _delete_delivered(self) -> None:
        """Deletes the answers whose trials are recorded by now."""
        for path in self.delivered:
            path.unlink(missing_ok=True)
        self.delivered.clear()

    def _wait_for_jobs_to_end(self) -> None:
        """Waits up to `SETTLE` seconds: a job takes that long to see that its order is gone."""
        end = time.monotonic() + SETTLE
        while self._running_jobs(self.cluster.states()) and time.monotonic() < end:
            time.sleep(0.2)

    def _running_jobs(self, states: dict[str, State] | None) -> list[str]:
        """Our jobs that are not known to have ended."""
        self.jobs = [job for job in self.jobs if states is None or not states.get(job, GONE).ended]
        return self.jobs

    def _handle_refusal(self, reason: str) -> None:
        """Schedules another submission if the refusal may pass, else raises UserError.

        It may pass while jobs of ours are out (a limit on jobs), or the controller is unreachable.
        """
        now = time.monotonic()
        self.refused = self.refused or now
        unreachable = re.search(r"contact|timed out|temporar", reason, re.I)
        if not self.out and not (unreachable and now - self.refused < REFUSALS):
            raise UserError(f"Slurm must accept the jobs, but refused them: {reason}")
        self.again = now + AGAIN
        self._print_once(f"Slurm accepts no more jobs for now: {reason}")

    def _print_reasons(self, states: Sequence[State]) -> None:
        for reason in {state.reason for state in states if state.name == "PENDING"} - USUAL:
            self._print_once(f"jobs are pending: {reason}")

    def _print_once(self, text: str) -> None:
        if text not in self.printed:
            self.printed.add(text)
            print(f"slurm: {text}", file=sys.stderr)


def open_pool(queue: Sequence[Task], workers: str | int, growing: bool, stem: Path) -> SlurmPool:
    """Opens a pool with its files in `sweeps/NAME.slurm`.

    "auto" workers: `engine.slurm.max_jobs`; the cluster's own limits apply.
    """
    root, engine = stem.absolute().with_name(stem.name + ".slurm"), queue[0].recipe.engine
    cluster.require_slurm(root)
    if not engine.checkpoint_every and not queue[0].recipe.foreign:
        print(
            "slurm: `engine.checkpoint_every` is 0, so a trial whose job is preempted, timed out or"
            " lost restarts from its first step",
            file=sys.stderr,
        )
    size = workers if isinstance(workers, int) else engine.slurm.max_jobs
    return SlurmPool(root, size, SlurmCluster(root, stem.name), engine.slurm.leave)
