"""A group of processes that train one trial after another, and share the batch of each.

The processes (ranks) start with the first trial and stay: starting them takes seconds, mostly the
import of torch. Group and ranks exchange JSON lines over standard input and output
(`training.rank`). A rank ends when its input ends, so a killed owner leaves no ranks.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import subprocess
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.distributed import TCPStore

from scaletune import environment
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Trial
from scaletune.training.processes import require_gpus
from scaletune.training.run_control import UNCONTROLLED, RunControl

HOST = "127.0.0.1"
STOP = "stop"  # the line, as JSON, that stops the trial in training
LOOK = 0.1  # seconds between looks whether the trial is to stop
ENDING = 5.0  # seconds that a rank whose output has ended may take to exit

Line = tuple[int, bytes]
"""The number of a rank and a line of its output; an empty line when its output has ended."""


class RankDied(RuntimeError):
    """A rank ended without an answer. What it printed is on standard error."""

    def __init__(self, text: str, status: int):
        super().__init__(text)
        self.status = status
        """The exit status of the rank; negative: the signal that killed it."""


class RankGroup:
    """`engine.processes` processes on this machine, each with its own GPU if there are GPUs."""

    def __init__(self) -> None:
        self.ranks: list[subprocess.Popen[bytes]] = []
        self.lines: queue.Queue[Line] = queue.Queue()
        self.store: TCPStore | None = None

    def __enter__(self) -> RankGroup:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def run_trial(
        self,
        recipe: Recipe,
        sweep: str,
        progress: Callable[[float], None] = lambda share: None,
        control: RunControl = UNCONTROLLED,
        id: str = "",
    ) -> tuple[Trial, list[float]]:
        """As `training.run_trial`, over the ranks. They start if none wait for a trial.

        Args:
            recipe: As of `training.run_trial`.
            sweep: Likewise.
            progress: Likewise.
            control: Likewise.
            id: The trial's id, by which `control` stops it.

        Raises:
            UserError: A rank raised it.
            RankDied: A rank ended. The others are killed; the next trial gets new ranks.
        """
        self._require_ranks(recipe.engine.processes)
        try:
            self._send({"recipe": recipe.dump(), "sweep": sweep})
            return self._wait(progress, control, id)
        except BaseException:
            self.close()  # the other ranks wait for one that has left the trial
            raise

    def _send(self, content: Any) -> None:
        """Writes a line to each rank."""
        for rank in self.ranks:
            assert rank.stdin
            with contextlib.suppress(BrokenPipeError):  # shows as the end of its output
                rank.stdin.write(json.dumps(content).encode() + b"\n")
                rank.stdin.flush()

    def close(self) -> None:
        """Kills the ranks."""
        for rank in self.ranks:
            rank.kill()
        for rank in self.ranks:
            rank.wait()
            assert rank.stdin
            with contextlib.suppress(BrokenPipeError):
                rank.stdin.close()
        self.ranks, self.lines, self.store = [], queue.Queue(), None

    def _require_ranks(self, processes: int) -> None:
        """Starts the ranks unless as many wait for a trial."""
        alive = all(rank.poll() is None for rank in self.ranks)
        if alive and len(self.ranks) == processes:
            return
        self.close()
        if torch.cuda.is_available():
            require_gpus(processes)
        # This process keeps the store, so a free port is found without a race between groups.
        self.store = TCPStore(HOST, 0, is_master=True, wait_for_workers=False)
        for rank in range(processes):
            self._start(rank, processes, self.store.port)

    def _start(self, number: int, processes: int, port: int) -> None:
        variables = {
            "RANK": number,
            "LOCAL_RANK": number,
            "WORLD_SIZE": processes,
            "LOCAL_WORLD_SIZE": processes,
            "MASTER_ADDR": HOST,
            "MASTER_PORT": port,
            "TORCHELASTIC_USE_AGENT_STORE": True,  # the ranks are clients of our store
            "TORCHELASTIC_RESTART_COUNT": 0,
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
        }
        rank = subprocess.Popen(
            [sys.executable, "-m", "scaletune.training.rank"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment.trial_environment(os.environ)
            | {name: str(value) for name, value in variables.items()},
        )
        self.ranks.append(rank)
        reader = threading.Thread(target=_read, args=(number, rank, self.lines), daemon=True)
        reader.start()

    def _wait(
        self, progress: Callable[[float], None], control: RunControl, id: str
    ) -> tuple[Trial, list[float]]:
        """The answer of rank 0, when all ranks have finished."""
        answers: dict[int, dict[str, Any]] = {}
        stops = False
        while len(answers) < len(self.ranks):
            if not stops and control.stop_requested(id):
                stops = True
                self._send(STOP)
            try:
                number, line = self.lines.get(timeout=LOOK)
            except queue.Empty:
                continue
            if not line:
                raise self._died(number)
            message = json.loads(line)
            if "progress" in message:
                progress(message["progress"])
            elif "report" in message:
                control.report(*message["report"])
            elif "refused" in message:
                raise UserError(message["refused"])
            else:
                answers[number] = message
        return Trial(**answers[0]["trial"]), answers[0]["curve"]

    def _died(self, number: int) -> RankDied:
        """The error of a rank whose output has ended.

        Other ranks may have ended because of it, with a traceback. A killed one is the cause.
        """
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.ranks[number].wait(ENDING)
        statuses = {i: rank.poll() for i, rank in enumerate(self.ranks)}
        number = min(statuses, key=lambda i: ((statuses[i] or 0) >= 0, i != number))
        text = f"process {number} of the {len(self.ranks)} of a trial ended with exit status"
        return RankDied(f"{text} {statuses[number]}", statuses[number] or 1)


def _read(number: int, rank: subprocess.Popen[bytes], lines: queue.Queue[Line]) -> None:
    """Puts the lines of a rank's output into the queue."""
    assert rank.stdout
    with rank.stdout as output:
        for line in output:
            if line.endswith(b"\n"):
                lines.put((number, line))
    lines.put((number, b""))
