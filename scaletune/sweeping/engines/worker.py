"""A worker of the local engine: `python -m scaletune.sweeping.engines.worker` reads orders, trains, answers."""

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

SAY_EVERY = 0.5  # seconds between a worker's progress messages


def serve(orders: Iterable[str], answers: IO[str]) -> None:
    """A worker's life: read orders, one or several that train as one model, train, answer each."""
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
        asked = json.loads(line)
        points, sweeps = (
            [recipes.validated(order["recipe"], "point") for order in asked],
            [order["sweep"] for order in asked],
        )
        try:
            if asked[0].get("population"):
                found = _bred(points[0], sweeps[0], asked[0]["population"], acc, progress)
                say({"trials": [_told(trial, curve) for trial, curve in found]})
                continue
            for trial, curve in _trained(points, sweeps, acc, progress):
                say(_told(trial, curve))
        except UserError as error:
            say({"refused": str(error)})


def _told(trial: Trial, curve: Sequence[float]) -> dict[str, Any]:
    return {"trial": asdict(trial), "curve": [x for x in curve if x == x]}


def _bred(
    point: Recipe,
    sweep: str,
    population: dict[str, Any],
    acc: Accelerator,
    progress: Callable[[float], None],
) -> list[tuple[Trial, list[float]]]:
    from scaletune.training.pbt import Breeding
    from scaletune.training.pbt import population as train

    how = Breeding(population["every"], population["factor"], population["seed"])
    return train(
        [recipes.with_settings(point, {"lr": lr}) for lr in population["lr"]],
        sweep,
        how,
        acc,
        progress,
    )


def _trained(
    points: Sequence[Recipe],
    sweeps: Sequence[str],
    acc: Accelerator,
    progress: Callable[[float], None],
) -> Iterable[tuple[Trial, list[float]]]:
    if len(points) > 1:
        return training.stacked(points, sweeps, acc, progress)
    launched = points[0].engine.processes > 1
    return [
        training.launched(points[0], sweeps[0], progress)
        if launched
        else training.trial(points[0], sweeps[0], acc, progress)
    ]


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
