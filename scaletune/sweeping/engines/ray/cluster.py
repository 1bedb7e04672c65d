"""A Ray cluster as the sweep sees it: how to connect, what a worker reserves, which nodes there are and how many workers fit."""

from __future__ import annotations

import os
import signal
import socket
import sys
import tempfile
import threading
import time
from contextlib import ExitStack, redirect_stdout
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe.engine import Engine

LOOK = 2.0  # seconds between looks at what nodes there are
KNOCK = 5.0  # seconds for an address to answer: Ray itself takes a minute to give up
STORE = 100 << 20  # bytes of an own instance's object store: what passes is small


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # read when an instance starts
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError("engine.kind 'ray' needs Ray: pip install 'scaletune[ray]'") from None
    return ray


class Cluster:
    """A connection to Ray: that which the process has, else one made here, of an instance of its own or of a cluster that is up."""

    def __init__(self, engine: Engine, workers: str | int, processes: int):
        self.ray, self.asked = _ray(), engine.ray
        self.looked, self.seen = 0.0, dict[str, dict[str, float]]()
        self.own = self.waits = False
        with ExitStack() as undo:
            if not self.ray.is_initialized():
                self._connect(_cores(workers, processes * self.asked.cpus), undo)
            undo.enter_context(
                redirect_stdout(sys.stderr)
            )  # where Ray says what became of a node, whatever it is told of its logs
            self.need = self._need(processes)
            self.room()
            self.leave = undo.pop_all().close

    def _connect(self, cores: int, undo: ExitStack) -> None:
        """To an own instance or the cluster asked for. Ray takes SIGTERM for itself: it is given back."""
        options: dict[str, Any] = {
            "address": self.asked.address,
            "log_to_driver": False,
            "logging_level": "ERROR",
        }
        before = signal.getsignal(signal.SIGTERM)
        try:
            if self.asked.address == "local":
                self.own = True
                folder = tempfile.TemporaryDirectory(
                    prefix="scaletune-", dir="/tmp", ignore_cleanup_errors=True
                )  # a socket's path is short
                options |= {
                    "num_cpus": cores,
                    "object_store_memory": STORE,
                    "include_dashboard": False,
                }
                options["_temp_dir"] = undo.enter_context(folder)
            else:
                _knock(self.asked.address)
            undo.callback(self.ray.shutdown)
            self.ray.init(**options)
        except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
            raise UserError(_refused(self.asked.address, error)) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, before)

    def _need(self, processes: int) -> dict[str, float]:
        """What a worker reserves, all on one node."""
        there = any(node.get("GPU") for node in self.nodes().values())
        gpus = self.asked.gpus if self.asked.gpus != "auto" else float(there)
        return {
            "CPU": self.asked.cpus * processes,
            "GPU": gpus * processes,
            "memory": self.asked.memory,
        }

    def worker(self, actor: type) -> Any:
        """The class as one of actors, each with what a worker needs; it is not started again: the driver knows what it was on."""
        need = self.need
        return self.ray.remote(
            num_cpus=need["CPU"],
            num_gpus=need["GPU"],
            memory=need["memory"] or None,
            max_restarts=0,
        )(actor)

    def nodes(self) -> dict[str, dict[str, float]]:
        """{id: resources} of the nodes that are up, looked up now and then."""
        if not self.seen or time.monotonic() - self.looked > LOOK:
            self.seen = {
                node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]
            }
            self.looked = time.monotonic()
        return self.seen

    def room(self) -> int:
        """Workers that fit on the nodes, whoever else is there; one at least, which waits for a node to join (or calls for one)."""
        need = {name: share for name, share in self.need.items() if share}
        room = sum(
            int(min(node.get(name, 0) / share for name, share in need.items()))
            for node in self.nodes().values()
        )
        if not room and not self.waits:
            self.waits = True
            said = f"has room for a worker, which takes {', '.join(f'{share:g} {name}' for name, share in need.items())}"
            if self.own:
                raise UserError(
                    f"this machine must have what a worker reserves, but no node {said}"
                )
            print(
                f"ray: no node of {self.asked.address} {said}: waiting for one to join",
                file=sys.stderr,
            )
        return max(1, room)


def _cores(workers: str | int, each: int) -> int:
    """Of an own instance: as many as there are, and as many as it takes to have the workers asked for."""
    there = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(there, each * (workers if isinstance(workers, int) else 1))


def _knock(address: str) -> None:
    """Whether anyone is there at all."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=KNOCK).close()


def _refused(address: str, error: Exception) -> str:
    said = (
        (str(error) or type(error).__name__).splitlines()[0].split(". ")[0]
    )  # Ray goes on for a paragraph
    if address == "local":
        return f"an instance of Ray must start here, but {said}"
    return (
        f"`engine.ray.address` must be a Ray cluster that is up and has our token (RAY_AUTH_MODE=token, ~/.ray/auth_token), "
        f"but got {address!r}: {said}"
    )
