"""The Slurm engine: orders go out as job arrays through submitit, and come back as JSON files in `sweeps/NAME.slurm`.

`sweeps/`, `runs/`, the data and the Python that runs must be on file systems that the login node and the compute nodes share, under the
same paths. A job that is preempted or runs out of time goes back to the queue by itself and on from its trials' checkpoints; one that is
killed or loses its node is lost, and the driver sends its trials again. A driver that is killed leaves its jobs: the next one finds what
they have answered, waits for those that still wait or run, and submits nothing twice.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from scaletune.errors import UserError
from scaletune.recipe import Engine
from scaletune.sweeping import stacks
from scaletune.sweeping.engines.pool import Message
from scaletune.sweeping.engines.slurm import cluster, job_messages, job_size
from scaletune.sweeping.engines.slurm.cluster import GONE, Cluster, Refused, State
from scaletune.sweeping.engines.slurm.job_messages import Order
from scaletune.sweeping.out_of_memory import SAID
from scaletune.sweeping.task import Task

WAIT = 1.0  # seconds between looks for answers
LOOK = 5.0  # between questions to the controller, and looks at beats
GRACE = 15.0  # that the last files of a job that has ended may take to be seen
SETTLE = 10.0  # that jobs which are done or cancelled may take to be gone
AGAIN = 30.0  # after which a refused array is submitted again
REFUSALS = 900.0  # that the controller may be away with no job of ours out
USUAL = {
    "None",
    "Priority",
    "Resources",
    "JobArrayTaskLimit",
    "BeginTime",
    "Dependency",
    "Cleaning",
}  # reasons to wait that pass


class Pool:
    """Orders in Slurm's hands. `workers`: jobs that run at once, at most; `leave`: an interrupt leaves them to the next driver."""

    def __init__(self, root: Path, workers: int, reached: Cluster, leave: bool = False):
        self.root, self.workers, self.cluster, self.leave = root, workers, reached, leave
        self.out: list[Order] = []  # with trials that are waited for
        earlier = job_messages.left(root)
        self.found = {
            id: order for order in earlier for id in order.ids
        }  # an earlier driver's, not asked for yet
        self.jobs = [order.job for order in earlier]  # all that may still run
        self.news: list[tuple[Task, Message]] = []
        self.back: list[Task] = []  # of lost orders, not begun
        self.told: list[Path] = []  # answers that the driver has heard
        self.said: set[str] = set()
        self.looked, self.again, self.refused = -LOOK, 0.0, 0.0  # by a clock that no one sets
        if earlier:
            self._say(f"{len(earlier)} jobs of an earlier driver are taken over")

    def __enter__(self) -> Pool:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is None:
            self._forget()
        left = list({order.folder: order for order in (*self.out, *self.found.values())}.values())
        if left and self.leave and kind is KeyboardInterrupt:
            self._say(f"{len(left)} jobs stay in Slurm's hands: the next driver takes them over")
            return
        for order in left:
            job_messages.withdraw(order.folder)
        self.cluster.cancel([order.job for order in left if order.job])
        self._settle()
        job_messages.clear(self.root)
        if left:
            self._say(f"{len(left)} jobs are cancelled")

    @property
    def busy(self) -> bool:
        return bool(self.out or self.news or self.back)

    def hand_out(self, queue: list[Task]) -> None:
        """Take over what is answered or under way; submit the rest as an array as soon as it would not exceed `workers`."""
        queue[:0], self.back = self.back, []
        self._take_over(queue)
        free = self.workers - len(self.out)
        if not queue or free <= 0 or time.monotonic() < self.again:
            return
        engine = queue[0].recipe.engine
        made = [
            job_messages.written(self.root, pack) for pack in job_size.pack(queue, self.workers)
        ]
        self.out += made  # before they are submitted: an interrupt takes them back
        try:
            self._submit(made, engine, free)
        except Refused as error:
            queue[:0] = [task for order in made for task in order.tasks.values()]
            self._drop(made)
            self._bear(str(error))

    def _submit(self, made: Sequence[Order], engine: Engine, parallel: int) -> None:
        jobs = self.cluster.submit([order.folder for order in made], engine, parallel)
        self.jobs += jobs
        self.refused = 0.0
        for order, job in zip(made, jobs, strict=True):
            job_messages.submitted(order, job)

    def messages(self) -> list[tuple[Task, Message]]:
        """What jobs have answered; every `LOOK` seconds also what Slurm says of them, and their beats."""
        self._forget()
        if not self.news:
            time.sleep(WAIT)
        heard, self.news = self.news + self._answers(), []
        if time.monotonic() - self.looked >= LOOK:
            self.looked = time.monotonic()
            heard += self._look()
        self._drop([order for order in self.out if not order.tasks])
        return heard

    def _take_over(self, queue: list[Task]) -> None:
        there = job_messages.answers(self.root) if queue else set()
        for task in queue[:]:
            path = job_messages.answer_path(self.root, task.id)
            message = job_messages.read(path) if path.name in there else None
            if message and "trial" in message:
                self.news.append((task, message))
                self.told.append(path)
            elif order := self.found.pop(task.id, None):
                order.tasks[task.id] = task
                self.out += [order] if order not in self.out else []
            else:
                continue
            queue.remove(task)

    def _answers(self) -> list[tuple[Task, Message]]:
        heard, there = [], job_messages.answers(self.root) if self.out else set()
        for order in self.out:
            for task in [task for task in order.tasks.values() if f"{task.id}.json" in there]:
                path = job_messages.answer_path(self.root, task.id)
                message = job_messages.read(path)
                if not message:
                    continue
                if "trial" in message:
                    self.told.append(path)
                else:
                    path.unlink()  # of this try alone
                if "trial" in message or message["order"] == order.folder.name:
                    heard.append((order.tasks.pop(task.id), message))
        return heard

    def _look(self) -> list[tuple[Task, Message]]:
        states = self.cluster.states() if self.out else None
        if states is None:
            return []
        self._say_reasons([states[order.job] for order in self.out if order.job in states])
        self._running(states)
        return [
            said
            for order in self.out
            if order.tasks
            for said in self._judge(order, states.get(order.job, GONE), time.monotonic())
        ]

    def _judge(self, order: Order, state: State, now: float) -> list[tuple[Task, Message]]:
        """Progress, or a loss: of a job that has ended and not answered all, or that runs and says nothing."""
        beat = job_messages.read(order.folder / "beat.json") or {}
        changed, order.beat = beat != order.beat, beat
        if state.name != "RUNNING" or changed or not order.spoke:
            order.spoke = now
        if state.ended:
            order.ended = now if order.ended is None else order.ended
            return (
                self._lost(order, f"its job {order.job} ended as {state.name}", state)
                if now - order.ended >= GRACE
                else []
            )
        order.ended = None
        if now - order.spoke > min(task.recipe.engine.patience for task in order.tasks.values()):
            self.cluster.cancel([order.job])
            return self._lost(
                order, f"its job {order.job} said nothing for {now - order.spoke:.0f} s", state
            )
        shares = beat.get("shares", {}) if changed else {}
        return [
            (task, {"progress": shares[id]}) for id, task in order.tasks.items() if id in shares
        ]

    def _lost(self, order: Order, why: str, state: State) -> list[tuple[Task, Message]]:
        """What it had begun is lost; what it had not goes back to the queue. Where it began nothing, all is lost: no job of its would."""
        begun = order.beat.get("shares") or order.tasks
        log = "\n".join(filter(None, (order.beat.get("log", ""), self.cluster.log(order.job))))
        memory = state.name == "OUT_OF_MEMORY" or bool(SAID.search(log))
        gone = [task for id, task in order.tasks.items() if id in begun]
        lost: Message = {
            "lost": why,
            "status": state.status,
            "memory": memory,
            "log": log,
            "stack": stacks.models(gone),
        }
        self.back += [task for id, task in order.tasks.items() if id not in begun]
        heard = [(task, lost) for task in gone]
        order.tasks.clear()
        return heard

    def _drop(self, done: Sequence[Order]) -> None:
        """Forget orders that nothing is waited for of."""
        for order in done:
            job_messages.withdraw(order.folder)
            unasked = [id for id in order.ids if self.found.pop(id, None)]
            if unasked:
                self.cluster.cancel([order.job])
        self.out = [order for order in self.out if order not in done]

    def _forget(self) -> None:
        """Of answers that are on record."""
        for path in self.told:
            path.unlink(missing_ok=True)
        self.told.clear()

    def _settle(self) -> None:
        """Wait until no job is left, as long as that takes one to see that its order is gone."""
        end = time.monotonic() + SETTLE
        while self._running(self.cluster.states()) and time.monotonic() < end:
            time.sleep(0.2)

    def _running(self, states: dict[str, State] | None) -> list[str]:
        """Jobs of ours that are not known to have ended."""
        self.jobs = [job for job in self.jobs if states is None or not states.get(job, GONE).ended]
        return self.jobs

    def _bear(self, why: str) -> None:
        """A refusal may pass: while jobs of ours are out (a limit on jobs), or the controller is not to be reached."""
        now = time.monotonic()
        self.refused = self.refused or now
        passing = (
            re.search(r"contact|timed out|temporar", why, re.I) and now - self.refused < REFUSALS
        )
        if not self.out and not passing:
            raise UserError(f"Slurm must take the jobs, but said: {why}")
        self.again = now + AGAIN
        self._say(f"no more jobs are taken for now: {why}")

    def _say_reasons(self, states: Sequence[State]) -> None:
        for reason in {state.reason for state in states if state.name == "PENDING"} - USUAL:
            self._say(f"jobs wait: {reason}")

    def _say(self, what: str) -> None:
        """Once."""
        if what not in self.said:
            self.said.add(what)
            print(f"slurm: {what}", file=sys.stderr)


def opened(queue: Sequence[Task], workers: str | int, growing: bool, stem: Path) -> Pool:
    """Jobs in `sweeps/NAME.slurm`. "auto" workers: as many as `max_jobs`, the cluster's own limits hold."""
    root, engine = stem.absolute().with_name(stem.name + ".slurm"), queue[0].recipe.engine
    cluster.require(root)
    if not engine.checkpoint_every:
        print(
            "slurm: with `engine.checkpoint_every = 0` a trial whose job is preempted, timed out or lost begins anew",
            file=sys.stderr,
        )
    return Pool(
        root,
        workers if isinstance(workers, int) else engine.slurm.max_jobs,
        Cluster(root, stem.name),
        engine.slurm.leave,
    )
