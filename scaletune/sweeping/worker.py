"""A worker of the local engine: `python -m scaletune.sweeping.worker` reads orders, trains, answers."""

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
from scaletune import training

SAY_EVERY = 0.5  # seconds between a worker's progress messages


def serve(orders: Iterable[str], answers: IO[str]) -> None:
    """A worker's life: read an order, train, answer."""
    acc = training.accelerator()
    gc.freeze()  # what is imported stays: garbage is collected after each trial, in 2 ms instead of 100
    said = 0.0

    def say(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    def progress(share: float) -> None:
        nonlocal said
        if time.monotonic() - said > SAY_EVERY:
            said = time.monotonic()
            say({"progress": share})

    for line in orders:
        order = json.loads(line)
        point = recipes.validated(order["recipe"], "point")
        if point.engine.processes > 1:
            trial, curve = training.launched(point, order["sweep"], progress)
        else:
            trial, curve = training.trial(point, order["sweep"], acc, progress)
        say({"trial": asdict(trial), "curve": [x for x in curve if x == x]})


def main() -> None:
    """Be a worker. Leaves when its input ends, in the middle of a trial too."""
    orders: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            orders.put(line)
        os._exit(0)  # the driver is gone: no one would read the result

    threading.Thread(target=listen, daemon=True).start()
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints goes to the log, never between the answers
    serve(iter(orders.get, None), answers)


if __name__ == "__main__":
    main()
