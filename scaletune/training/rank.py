"""One process of a `RankGroup`: reads trials as JSON lines, trains its share, writes the results.

Started as `python -m scaletune.training.rank` with the variables of torch's `env://` rendezvous.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import asdict
from typing import IO, Any

from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.training.processes import accelerator
from scaletune.training.rank_group import STOP
from scaletune.training.run_control import RunControl
from scaletune.training.trials import run_trial

PROGRESS_EVERY = 0.25  # seconds between progress messages


def serve(orders: Iterable[str], output: IO[str], stopping: threading.Event) -> None:
    """Trains each trial together with the other ranks, and writes a line for each message.

    Rank 0 sends progress, held-out losses and the trial; the others only that they have finished.

    Args:
        orders: One JSON text per trial.
        output: Where messages go.
        stopping: Set when the current trial is to stop.
    """

    def send(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    last_progress = 0.0

    def progress(share: float) -> None:
        nonlocal last_progress
        if acc.is_main_process and time.monotonic() - last_progress > PROGRESS_EVERY:
            last_progress = time.monotonic()
            send({"progress": share})

    def report(id: str, tokens: float, loss: float) -> None:
        if acc.is_main_process:
            send({"report": [id, tokens, loss]})

    control = RunControl(report, lambda id: stopping.is_set())
    try:
        acc = accelerator()
        gc.freeze()  # excludes imported objects from garbage collection
        for line in orders:
            order = json.loads(line)
            point = recipes.validate_recipe(order["recipe"], "point")
            trial, curve = run_trial(point, order["sweep"], acc, progress, control)
            send(
                {"trial": asdict(trial), "curve": curve} if acc.is_main_process else {"done": True}
            )
    except UserError as error:
        send({"refused": str(error)})  # the group ends, because the other ranks may wait for us


def main() -> None:
    """Runs the rank until its input ends, even in the middle of a trial."""
    orders: queue.Queue[str | None] = queue.Queue()
    stopping = threading.Event()

    def listen() -> None:
        for line in sys.stdin:
            if json.loads(line) == STOP:
                stopping.set()
            else:
                stopping.clear()
                orders.put(line)
        os._exit(0)  # the owner is gone

    threading.Thread(target=listen, daemon=True).start()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the messages
    serve(iter(orders.get, None), output, stopping)


if __name__ == "__main__":
    main()
