"""The connection to a Ray cluster: its nodes, what a worker reserves, and how many workers fit."""

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

LOOK = 2.0  # seconds between requests for the list of nodes
CONNECT = 5.0  # seconds for an address to answer; Ray itself gives up only after a minute
STORE = 100 << 20  # bytes of the object store of our own instance: its messages are small


def _ray() -> Any:
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray reads it when an instance starts
    try:
        import ray
        import ray.exceptions
    except ImportError:
        raise UserError("engine.kind 'ray' needs Ray: pip install 'scaletune[ray]'") from None
    return ray


class RayCluster:
    """A connection to Ray.

    Uses the connection that the process has; otherwise starts an instance of its own or connects
    to the cluster at `engine.ray.address`.
    """

    def __init__(self, engine: Engine, workers: str | int, processes: int):
        self.ray, self.settings = _ray(), engine.ray
        self.requested_gpus = engine.requested_gpus
        self.last_look, self.resources = 0.0, dict[str, dict[str, float]]()
        self.own_instance = self.waiting = False
        with ExitStack() as undo:
            if not self.ray.is_initialized():
                self._connect(_count_cores(workers, processes * self.settings.cpus), undo)
            # Ray prints what happens to nodes on standard output, whatever its log settings are
            undo.enter_context(redirect_stdout(sys.stderr))
            self.need = self._reservation(processes)
            self.capacity()
            self.leave = undo.pop_all().close

    def _connect(self, cores: int, undo: ExitStack) -> None:
        """Connects, and restores the handler of SIGTERM that Ray replaces."""
        options: dict[str, Any] = {
            "address": self.settings.address,
            "log_to_driver": False,
            "logging_level": "ERROR",
        }
        handler = signal.getsignal(signal.SIGTERM)
        try:
            if self.settings.address == "local":
                self.own_instance = True
                options |= _own_instance_options(cores, undo)
            else:
                _require_reachable(self.settings.address)
            undo.callback(self.ray.shutdown)
            self.ray.init(**options)
        except (OSError, RuntimeError, ValueError, self.ray.exceptions.RayError) as error:
            raise UserError(_describe_failure(self.settings.address, error)) from None
        finally:
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGTERM, handler)

    def _reservation(self, processes: int) -> dict[str, float]:
        """What a worker reserves, all on one node."""
        any_gpu = any(node.get("GPU") for node in self.nodes().values())
        gpus = self.settings.gpus if self.settings.gpus != "auto" else float(any_gpu)
        total = gpus * processes if self.requested_gpus is None else float(self.requested_gpus)
        return {
            "CPU": self.settings.cpus * processes,
            "GPU": total,
            "memory": self.settings.memory,
        }

    def worker(self, actor: type) -> Any:
        """The class as a Ray actor with a worker's reservation.

        Ray does not restart it: only the driver knows which tasks it had.
        """
        return self.ray.remote(
            num_cpus=self.need["CPU"],
            num_gpus=self.need["GPU"],
            memory=self.need["memory"] or None,
            max_restarts=0,
        )(actor)

    def nodes(self) -> dict[str, dict[str, float]]:
        """{id: resources} of the nodes that are up, at most `LOOK` seconds old."""
        if not self.resources or time.monotonic() - self.last_look > LOOK:
            self.resources = {
                node["NodeID"]: node["Resources"] for node in self.ray.nodes() if node["Alive"]
            }
            self.last_look = time.monotonic()
        return self.resources

    def capacity(self) -> int:
        """The number of workers that fit on the nodes, whoever else uses them; at least one.

        The one that does not fit yet waits for a node to join, or makes an autoscaler add one.
        """
        need = {name: share for name, share in self.need.items() if share}
        capacity = sum(
            int(min(node.get(name, 0) / share for name, share in need.items()))
            for node in self.nodes().values()
        )
        if not capacity and not self.waiting:
            self.waiting = True
            size = ", ".join(f"{share:g} {name}" for name, share in need.items())
            if self.own_instance:
                raise UserError(
                    f"a worker reserves {size}, but this machine has less: lower `engine.ray`"
                )
            print(
                f"ray: a worker reserves {size}, but no node of {self.settings.address} has that:"
                " waiting for a node to join",
                file=sys.stderr,
            )
        return max(1, capacity)


def _own_instance_options(cores: int, undo: ExitStack) -> dict[str, Any]:
    """Options of `ray.init` for an instance of our own, with its files in a temporary folder."""
    # In /tmp, because the path of a socket must be short.
    folder = tempfile.TemporaryDirectory(
        prefix="scaletune-", dir="/tmp", ignore_cleanup_errors=True
    )
    return {
        "num_cpus": cores,
        "object_store_memory": STORE,
        "include_dashboard": False,
        "_temp_dir": undo.enter_context(folder),
    }


def _count_cores(workers: str | int, per_worker: int) -> int:
    """The cores of our own instance: those of the machine, and enough for the workers."""
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(cores, per_worker * (workers if isinstance(workers, int) else 1))


def _require_reachable(address: str) -> None:
    """OSError when nothing listens at HOST:PORT."""
    host, _, port = address.rpartition(":")
    if host:
        socket.create_connection((host, int(port)), timeout=CONNECT).close()


def _describe_failure(address: str, error: Exception) -> str:
    text = str(error) or type(error).__name__
    reason = text.splitlines()[0].split(". ")[0]  # Ray's messages are a paragraph long
    if address == "local":
        return f"a Ray instance must start on this machine, but {reason}"
    return (
        "`engine.ray.address` must be a running Ray cluster that has our token"
        f" (RAY_AUTH_MODE=token, ~/.ray/auth_token), but got {address!r}: {reason}"
    )
