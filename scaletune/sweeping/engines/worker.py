"""A worker process: reads orders as JSON lines from standard input, trains, and writes the results.

Started as `python -m scaletune.sweeping.engines.worker`.
"""

from __future__ import annotations

import gc
import json
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from typing import IO, TYPE_CHECKING, Any

from scaletune import recipe as recipes
from scaletune import training
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Trial

if TYPE_CHECKING:
    from accelerate import Accelerator

PROGRESS_EVERY = 0.5  # seconds between progress messages


def serve(orders: Iterable[str], output: IO[str]) -> None:
    """Trains each order (one trial, or several as one model) and writes a line for each message."""
    acc = training.accelerator()
    # Imported objects are excluded from garbage collection: after a trial it takes 2 ms, not 100.
    gc.freeze()
    last_progress = 0.0

    def send(message: dict[str, Any]) -> None:
        output.write(json.dumps(message) + "\n")
        output.flush()

    def progress(share: float) -> None:
        nonlocal last_progress
        if time.monotonic() - last_progress > PROGRESS_EVERY:
            last_progress = time.monotonic()
            send({"progress": share})

    for line in orders:
        order = json.loads(line)
        points = [recipes.validate_recipe(each["recipe"], "point") for each in order]
        sweeps = [each["sweep"] for each in order]
        try:
            if population := order[0].get("population"):
                lineages = _train_population(points[0], sweeps[0], population, acc, progress)
                send({"trials": [_result(trial, curve) for trial, curve in lineages]})
                continue
            for trial, curve in _train(points, sweeps, acc, progress):
                send(_result(trial, curve))
        except UserError as error:
            send({"refused": str(error)})


def _result(trial: Trial, curve: Sequence[float]) -> dict[str, Any]:
    """The message of a trained trial; NaN losses are left out of the curve."""
    return {"trial": asdict(trial), "curve": [x for x in curve if x == x]}


def _train_population(
    point: Recipe,
    sweep: str,
    population: dict[str, Any],
    acc: Accelerator,
    progress: Callable[[float], None],
) -> list[tuple[Trial, list[float]]]:
    from scaletune.training import pbt

    settings = pbt.PBTSettings(population["every"], population["factor"], population["seed"])
    members = [recipes.with_settings(point, {"lr": lr}) for lr in population["lr"]]
    return pbt.train_population(members, sweep, settings, acc, progress)


def _train(
    points: Sequence[Recipe],
    sweeps: Sequence[str],
    acc: Accelerator,
    progress: Callable[[float], None],
) -> Iterable[tuple[Trial, list[float]]]:
    if len(points) > 1:
        return training.train_stack(points, sweeps, acc, progress)
    if points[0].engine.processes > 1:
        return [training.launch_trial(points[0], sweeps[0], progress)]
    return [training.run_trial(points[0], sweeps[0], acc, progress)]


def main() -> None:
    """Runs the worker until its input ends, even in the middle of a trial."""
    orders: queue.Queue[str | None] = queue.Queue()

    def listen() -> None:
        for line in sys.stdin:
            orders.put(line)
        os._exit(0)  # the driver is gone, so nobody would read the result

    threading.Thread(target=listen, daemon=True).start()
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the messages
    serve(iter(orders.get, None), output)


if __name__ == "__main__":
    main()
