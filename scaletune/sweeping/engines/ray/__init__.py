"""The Ray engine: the local engine's workers, one an actor of Ray core, wherever a cluster has room.

With `engine.ray.address = "local"` (the default) an instance of Ray's is started with the sweep and ends with it. To use a cluster, give
every machine the same scaletune and Ray, and one token; then, in this order,

    ray get-auth-token --generate          # once; writes ~/.ray/auth_token: copy it to each machine, readable by you alone
    export RAY_AUTH_MODE=token             # on each machine, for every command below
    export RAY_USAGE_STATS_ENABLED=0       # else Ray reports its use to its makers
    ray start --head --port=6379 --include-dashboard=false      # on the first
    ray start --address=FIRST:6379                              # on each other, now or while a sweep runs
    scaletune sweep RECIPE.toml --engine ray --set engine.ray.address=FIRST:6379       # on any of them

Ray listens on the network's interface, never on loopback alone: without a token whoever reaches its ports runs code as you. `ray start`
without RAY_AUTH_MODE asks for a token only where a token file already is. A machine leaves with `ray stop`, which stops all Ray there.

Files are not copied: `data.source`, `engine.runs` and the folder that has `sweeps/` must lie on a folder that all machines share under one
path (checkpoints: a trial whose machine is lost goes on from its own on another). The records are written by the driver alone.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.sweeping import stacks
from scaletune.sweeping.engines import local
from scaletune.sweeping.engines.pool import Message
from scaletune.sweeping.engines.ray.cluster import Cluster
from scaletune.sweeping.out_of_memory import SAID
from scaletune.sweeping.task import Task

WAIT = 1.0  # seconds until the driver looks up though no actor speaks
SILENCE = 30.0  # seconds beyond a worker's patience that its actor may say nothing
CLOSE = 5.0  # seconds that an actor has to end its worker
STARTS = 5  # actors in a row that may die before they have started
LAST = 3  # lines of what Ray says of that
TAIL = 1 << 12  # bytes of a worker's log that its actor repeats, in case it dies


class Actor:
    """On a node: the local engine with one worker. Orders and answers are JSON text, so nothing of ours is pickled."""

    def __init__(self, processes: int, gpus: int, folder: str):
        with contextlib.suppress(OSError):  # of the driver, which relative paths are relative to
            os.chdir(folder)
        if not gpus:
            os.environ["CUDA_VISIBLE_DEVICES"] = ""  # a GPU that was not reserved is someone else's
        self.pool = local.Pool(1, processes, gpus)

    def about(self) -> str:
        """Where it is, and what it runs."""
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
        """Have these trained; what is heard first."""
        tasks = [
            Task(order["sweep"], recipes.validated(order["recipe"], "point"), order["id"], 0.0)
            for order in json.loads(orders)
        ]
        self.pool.workers[0].order(tasks)
        return self.hear()

    def hear(self) -> str:
        """Wait a second at most: [[id, message], ...] and the end of the worker's log."""
        messages = [[task.id, message] for task, message in self.pool.messages()]
        return json.dumps({"messages": messages, "log": self.pool.workers[0].said()[-TAIL:]})

    def close(self) -> None:
        """End the worker."""
        self.pool.__exit__()


@dataclass
class Slot:
    """The driver's end of an actor."""

    actor: Any
    asked: Any  # what it is to answer next; None: idle
    node: str = ""  # its id; empty until the actor has started
    host: str = ""
    tasks: dict[str, Task] = field(default_factory=dict)  # those that it has not answered yet
    log: str = ""
    spoke: float = field(default_factory=lambda: time.monotonic())

    @property
    def silent(self) -> bool:
        """Whether it has said nothing for longer than its worker might."""
        patience = min(
            (task.recipe.engine.patience for task in self.tasks.values()), default=float("inf")
        )
        return time.monotonic() - self.spoke > patience + SILENCE


class Pool:
    """Actors, as many as the nodes have room for and the queue has use for; those that die are replaced."""

    def __init__(self, cluster: Cluster, workers: str | int, processes: int):
        self.cluster, self.workers, self.processes = cluster, workers, processes
        self.actors = cluster.worker(Actor)
        self.slots: list[Slot] = []
        self.news: list[tuple[Task, Message]] = []  # that no actor needs to say
        self.stillborn = 0  # actors in a row that died before they had started

    def __enter__(self) -> Pool:
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
        """Give each idle actor the next task, and what may train as one model with it."""
        most = self.workers if isinstance(self.workers, int) else self.cluster.room()
        of_use = min(most, sum(bool(slot.tasks) for slot in self.slots) + stacks.runs(queue))
        while len(self.slots) < of_use:
            self._start()
        for slot in [slot for slot in self.slots if slot.asked is None]:
            if queue:
                out = sum(stacks.runs(other.tasks.values()) for other in self.slots)
                self._order(
                    slot, stacks.take(queue, len(self.slots), out, gpu=self.cluster.need["GPU"] > 0)
                )

    def _start(self) -> None:
        gpus = math.ceil(self.cluster.need["GPU"])  # a share of one is one to see
        actor = self.actors.remote(self.processes, gpus, os.getcwd())
        self.slots.append(Slot(actor, actor.about.remote()))

    def _order(self, slot: Slot, tasks: Sequence[Task]) -> None:
        orders = [
            {"sweep": task.sweep, "recipe": task.recipe.model_dump(), "id": task.id}
            for task in tasks
        ]
        slot.tasks, slot.spoke, slot.log = {task.id: task for task in tasks}, time.monotonic(), ""
        slot.asked = slot.actor.order.remote(json.dumps(orders))
        self.news += [(task, {"progress": 0.0}) for task in tasks]

    def messages(self) -> list[tuple[Task, Message]]:
        """Wait for actors to speak, at most `WAIT`: (task, message). One that died or is silent is replaced."""
        heard, self.news = self.news, []
        for slot in self._spoken(0 if heard else WAIT):
            heard += self._heard(slot)
        for slot in [slot for slot in self.slots if slot.silent]:
            heard += self._lost(
                slot,
                f"its worker's node {slot.host} said nothing for {time.monotonic() - slot.spoke:.0f} s",
                "",
            )
        return heard

    def _spoken(self, wait: float) -> list[Slot]:
        asked = {slot.asked: slot for slot in self.slots if slot.asked is not None}
        if not asked:
            time.sleep(wait)
            return []
        ready = self.cluster.ray.wait(list(asked), timeout=wait)[0]
        return (
            [
                asked[ref]
                for ref in self.cluster.ray.wait(list(asked), num_returns=len(asked), timeout=0)[0]
            ]
            if ready
            else []
        )

    def _heard(self, slot: Slot) -> list[tuple[Task, Message]]:
        try:
            answer = json.loads(self.cluster.ray.get(slot.asked))
        except self.cluster.ray.exceptions.RayError as error:
            return self._dead(slot, error)
        slot.spoke, slot.asked = time.monotonic(), None
        if not slot.node:
            self._started(slot, answer)
            return []
        slot.log, heard = answer["log"], []
        for i, message in answer["messages"]:
            if "refused" in message:
                message["refused"] += f" (on {slot.host})"
            heard.append(
                (
                    slot.tasks.pop(i) if {"trial", "lost"} & message.keys() else slot.tasks[i],
                    message,
                )
            )
        slot.asked = slot.actor.hear.remote() if slot.tasks else None
        return heard

    def _started(self, slot: Slot, answer: Mapping[str, str]) -> None:
        if answer["version"] != version("scaletune"):
            raise UserError(
                f"every node must have scaletune {version('scaletune')}, but {answer['host']} has {answer['version']}"
            )
        slot.node, slot.host, self.stillborn = answer["node"], answer["host"], 0

    def _dead(self, slot: Slot, error: Exception) -> list[tuple[Task, Message]]:
        """The actor is gone, and with it its worker."""
        said = str(error).strip()
        if not slot.node:
            self.stillborn += 1
            if getattr(error, "actor_init_failed", True):  # it ran, and raised
                raise UserError(
                    f"every node must have this scaletune and its Ray, but a worker could not start: {said.splitlines()[-1]}"
                ) from None
            if self.stillborn == STARTS:
                raise UserError(
                    f"a worker must live to start, but {STARTS} in a row died first: {' / '.join(said.splitlines()[-LAST:])}"
                ) from None
        return self._lost(slot, f"its worker died: Ray lost its actor on {slot.host}", said)

    def _lost(self, slot: Slot, why: str, said: str) -> list[tuple[Task, Message]]:
        """Be rid of the actor; what it was on is lost."""
        self.slots.remove(slot)
        self.cluster.ray.kill(
            slot.actor
        )  # that one was out of reach must not mean that two train a trial
        log = f"{said}\n{slot.log}".strip()
        memory, models = bool(SAID.search(log)), stacks.models(slot.tasks.values())
        lost: Message = {
            "lost": why,
            "status": "unknown",
            "memory": memory,
            "log": log,
            "stack": models,
        }
        return [(task, lost) for task in slot.tasks.values()]


def opened(queue: Sequence[Task], workers: str | int, growing: bool, stem: Path) -> Pool:
    """Connected to what the queue's recipes name; actors start as the queue has use for them, so that it may grow."""
    processes = max(task.recipe.engine.processes for task in queue)
    return Pool(Cluster(queue[0].recipe.engine, workers, processes), workers, processes)
