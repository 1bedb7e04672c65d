"""The Ray engine: the workers of the local engine, each in an actor of Ray core.

With `engine.ray.address = "local"` (the default) the sweep starts its own Ray instance and stops it
at the end. To use a cluster, install the same scaletune and Ray on every machine and share one
token. Then, in this order:

    ray get-auth-token --generate      # once; copy ~/.ray/auth_token (0600) to each machine
    export RAY_AUTH_MODE=token         # on each machine, for every command below
    export RAY_USAGE_STATS_ENABLED=0   # otherwise Ray sends usage statistics to its makers
    ray start --head --port=6379 --include-dashboard=false      # on the first machine
    ray start --address=FIRST:6379     # on each other machine, now or while a sweep runs
    scaletune sweep RECIPE.toml --engine ray --set engine.ray.address=FIRST:6379   # on any machine

Ray listens on the network interface, not only on loopback: without a token, whoever reaches its
ports can run code as you. Without RAY_AUTH_MODE, `ray start` asks for a token only where a token
file exists. `ray stop` removes a machine; it stops all Ray processes there.

Files are not copied. `data.source`, `engine.runs` and the folder of `sweeps/` must be on a file
system that all machines share under the same path. A trial whose machine is lost then continues
from its checkpoint on another machine. Only the driver writes records.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.sweeping import stacks
from scaletune.sweeping.engines import local
from scaletune.sweeping.engines.pool import Message
from scaletune.sweeping.engines.ray.cluster import RayCluster
from scaletune.sweeping.out_of_memory import OUT_OF_MEMORY
from scaletune.sweeping.task import Task

WAIT = 1.0  # seconds that the driver waits for an actor before it checks for silent ones
SILENCE = 30.0  # seconds beyond a worker's patience that its actor may be silent
CLOSE = 5.0  # seconds that an actor has to end its worker
STARTS = 5  # consecutive actors that may die before they have started
LAST = 3  # lines of Ray's message about such an actor in our error
TAIL = 1 << 12  # bytes of a worker's log that its actor sends along, in case the actor dies


class Actor:
    """Runs on a node: a local pool with one worker.

    Orders and answers are JSON text, so no object of this package is pickled.
    """

    def __init__(self, gpus: int, folder: str):
        with contextlib.suppress(OSError):  # relative paths are relative to the driver's folder
            os.chdir(folder)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not reserved is not ours
        self.pool = local.LocalPool(1, gpus, gpus)

    def describe(self) -> str:
        """The actor's node, host, process id and version of scaletune, as JSON."""
        import ray

        return json.dumps(
            {
                "node": ray.get_runtime_context().get_node_id(),
                "host": platform.node(),
                "version": version("scaletune"),
                "pid": os.getpid(),
            }
        )

    def order(self, orders: str) -> str:
        """Starts the training of tasks; returns the first messages."""
        self.pool.workers[0].send([_task(order) for order in json.loads(orders)])
        return self.receive()

    def receive(self) -> str:
        """Waits up to one second; returns [[id, message], ...] and the end of the worker's log."""
        messages = [[task.id, message] for task, message in self.pool.messages()]
        return json.dumps({"messages": messages, "log": self.pool.workers[0].read_log()[-TAIL:]})

    def request_stop(self, ids: str) -> None:
        """Asks the worker to stop trials; `ids` is JSON."""
        self.pool.request_stop(json.loads(ids))

    def close(self) -> None:
        """Ends the worker."""
        self.pool.__exit__()


def _task(order: Mapping[str, Any]) -> Task:
    recipe = recipes.validate_recipe(order["recipe"], "point")
    return Task(order["sweep"], recipe, order["id"], 0.0)


@dataclass
class Slot:
    """An actor as the driver sees it."""

    actor: Any
    call: Any
    """The remote call that has not returned yet; None while the actor is idle."""
    node: str = ""
    """The node's id; empty until the actor has started."""
    host: str = ""
    tasks: dict[str, Task] = field(default_factory=dict)
    """The tasks without a result yet, by id."""
    log: str = ""
    last_answer: float = field(default_factory=lambda: time.monotonic())

    @property
    def seconds_silent(self) -> float:
        """Seconds since the last answer, by the monotonic clock."""
        return time.monotonic() - self.last_answer

    @property
    def silent(self) -> bool:
        """Whether the actor has been silent for longer than its worker may be."""
        patience = (task.recipe.engine.patience for task in self.tasks.values())
        return self.seconds_silent > min(patience, default=float("inf")) + SILENCE


class RayPool:
    """Actors, as many as fit on the nodes and the queue can use; lost ones are replaced."""

    def __init__(self, cluster: RayCluster, workers: str | int):
        self.cluster, self.workers = cluster, workers
        self.actors = cluster.worker(Actor)
        self.slots: list[Slot] = []
        self.news: list[tuple[Task, Message]] = []  # messages that the pool itself makes
        self.failed_starts = 0  # consecutive actors that died before they had started

    def __enter__(self) -> RayPool:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            closing = [slot.actor.close.remote() for slot in self.slots if slot.node]
            if closing:
                self.cluster.ray.wait(closing, num_returns=len(closing), timeout=CLOSE)
            for slot in self.slots:
                self.cluster.ray.kill(slot.actor)
        finally:
            self.cluster.leave()

    @property
    def busy(self) -> bool:
        return any(slot.tasks for slot in self.slots)

    def hand_out(self, queue: list[Task]) -> None:
        """Gives each idle actor the next task and those that can train as one model with it."""
        most = self.workers if isinstance(self.workers, int) else self.cluster.capacity()
        busy = sum(bool(slot.tasks) for slot in self.slots)
        while len(self.slots) < min(most, busy + stacks.count_runs(queue)):
            self._start()
        gpu = self.cluster.need["GPU"] > 0
        for slot in [slot for slot in self.slots if slot.call is None]:
            if queue:
                running = sum(stacks.count_runs(other.tasks.values()) for other in self.slots)
                self._order(slot, stacks.take_stack(queue, len(self.slots), running, gpu=gpu))

    def _start(self) -> None:
        gpus = math.ceil(self.cluster.need["GPU"])  # a worker with a share of a GPU sees one GPU
        actor = self.actors.remote(gpus, os.getcwd())
        self.slots.append(Slot(actor, actor.describe.remote()))

    def _order(self, slot: Slot, tasks: Sequence[Task]) -> None:
        orders = [
            {"sweep": task.sweep, "recipe": task.recipe.dump(), "id": task.id} for task in tasks
        ]
        slot.tasks, slot.log = {task.id: task for task in tasks}, ""
        slot.last_answer = time.monotonic()
        slot.call = slot.actor.order.remote(json.dumps(orders))
        self.news += [(task, {"progress": 0.0}) for task in tasks]

    def request_stop(self, ids: Collection[str]) -> None:
        """Asks for the end of trials that are in training."""
        for slot in self.slots:
            if own := [id for id in ids if id in slot.tasks]:
                slot.actor.request_stop.remote(json.dumps(own))

    def messages(self) -> list[tuple[Task, Message]]:
        """Waits up to `WAIT` seconds for messages; removes actors that died or are silent."""
        messages, self.news = self.news, []
        for slot in self._ready_slots(0 if messages else WAIT):
            messages += self._read(slot)
        for slot in [slot for slot in self.slots if slot.silent]:
            silence = f"sent no message for {slot.seconds_silent:.0f} s"
            messages += self._lose(slot, f"its worker's node {slot.host} {silence}", "")
        return messages

    def _ready_slots(self, wait: float) -> list[Slot]:
        """The slots whose call has returned."""
        calls = {slot.call: slot for slot in self.slots if slot.call is not None}
        if not calls:
            time.sleep(wait)
            return []
        if not self.cluster.ray.wait(list(calls), timeout=wait)[0]:
            return []
        ready = self.cluster.ray.wait(list(calls), num_returns=len(calls), timeout=0)[0]
        return [calls[call] for call in ready]

    def _read(self, slot: Slot) -> list[tuple[Task, Message]]:
        try:
            answer = json.loads(self.cluster.ray.get(slot.call))
        except self.cluster.ray.exceptions.RayError as error:
            return self._handle_death(slot, error)
        slot.last_answer, slot.call = time.monotonic(), None
        if not slot.node:
            self._confirm_start(slot, answer)
            return []
        slot.log, messages = answer["log"], []
        for id, message in answer["messages"]:
            if "refused" in message:
                message["refused"] += f" (on {slot.host})"
            ended = {"trial", "lost"} & message.keys()
            messages.append((slot.tasks.pop(id) if ended else slot.tasks[id], message))
        slot.call = slot.actor.receive.remote() if slot.tasks else None
        return messages

    def _confirm_start(self, slot: Slot, answer: Mapping[str, str]) -> None:
        ours = version("scaletune")
        if answer["version"] != ours:
            raise UserError(
                f"every node must have scaletune {ours}, but {answer['host']} has"
                f" {answer['version']}: install the same version on all nodes"
            )
        slot.node, slot.host, self.failed_starts = answer["node"], answer["host"], 0

    def _handle_death(self, slot: Slot, error: Exception) -> list[tuple[Task, Message]]:
        """Reports the tasks of a dead actor as lost; UserError when actors cannot start."""
        text = str(error).strip()
        if not slot.node:
            self.failed_starts += 1
            if getattr(error, "actor_init_failed", True):  # its code ran and raised an exception
                raise UserError(
                    "every node must have the same scaletune and Ray as this machine, but a worker"
                    f" could not start: {text.splitlines()[-1]}"
                ) from None
            if self.failed_starts == STARTS:
                raise UserError(
                    f"workers must start, but {STARTS} in a row died before they had started:"
                    f" {' / '.join(text.splitlines()[-LAST:])}"
                ) from None
        return self._lose(slot, f"its worker died: Ray lost its actor on {slot.host}", text)

    def _lose(self, slot: Slot, reason: str, text: str) -> list[tuple[Task, Message]]:
        """Kills the actor and reports its tasks as lost."""
        self.slots.remove(slot)
        # An actor that was only unreachable must not train the same trial as its replacement.
        self.cluster.ray.kill(slot.actor)
        log = f"{text}\n{slot.log}".strip()
        lost: Message = {
            "lost": reason,
            "status": "unknown",
            "memory": bool(OUT_OF_MEMORY.search(log)),
            "log": log,
            "stack": stacks.count_models(slot.tasks.values()),
        }
        return [(task, lost) for task in slot.tasks.values()]


def open_pool(queue: Sequence[Task], workers: str | int, growing: bool, stem: Path) -> RayPool:
    """Connects to the Ray cluster that the recipes name. Actors start as the queue needs them."""
    processes = max(task.recipe.engine.processes for task in queue)
    return RayPool(RayCluster(queue[0].recipe.engine, workers, processes), workers)
