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
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.records import Trial

if TYPE_CHECKING:
    from accelerate import Accelerator

    from scaletune.sweeping.trainers.start import Train
    from scaletune.training.run_control import RunControl

PROGRESS_EVERY = 0.5  # seconds between progress messages


class Connection:
    """The messages of this worker to the driver, and the driver's orders and requests to stop."""

    def __init__(self, output: IO[str]):
        self.output = output
        self.last_progress: dict[str, float] = {}
        """Time of the last progress message, by trial id; "" for that of all trials."""
        self.orders: queue.Queue[str | None] = queue.Queue()
        """Orders that are not started yet."""
        self.stops: set[str] = set()
        """Ids of the trials that the driver wants to stop."""

    def send(self, message: dict[str, Any]) -> None:
        self.output.write(json.dumps(message) + "\n")
        self.output.flush()

    def send_progress(self, share: float, id: str = "") -> None:
        """Sends the share of steps done, at most every `PROGRESS_EVERY` seconds.

        Without an id it is that of all trials in training.
        """
        now = time.monotonic()
        if now - self.last_progress.get(id, 0.0) > PROGRESS_EVERY:
            self.last_progress[id] = now
            self.send({"id": id, "progress": share} if id else {"progress": share})

    def send_report(self, id: str, tokens: float, loss: float) -> None:
        """Sends a held-out loss on the way."""
        self.send({"id": id, "report": {"tokens": tokens, "loss": loss}})

    def control(self) -> RunControl:
        """What connects the runs of one order with the driver."""
        from scaletune.training.run_control import RunControl

        return RunControl(
            self.send_report,
            self.stops.__contains__,
            lambda id, share: self.send_progress(share, id),
            FreeRows(self).refill,
        )


class FreeRows:
    """Asks the driver for further trials for the free rows of one stack."""

    def __init__(self, driver: Connection):
        self.driver, self.pending = driver, 0  # rows that the driver knows to be free

    def refill(self, rows: int) -> list[tuple[Recipe, str]]:
        """The points that have come for the free rows, with their sweeps."""
        if rows > self.pending:
            self.driver.send({"free": rows - self.pending})
            self.pending = rows
        try:
            line = self.driver.orders.get_nowait()
        except queue.Empty:
            return []
        order = json.loads(line or "[]")
        self.pending -= len(order)
        return [(recipes.validate_recipe(each["recipe"], "point"), each["sweep"]) for each in order]


def serve(orders: Iterable[str], driver: Connection, train: Train | None = None) -> None:
    """Trains each order (one trial, or several as one model) and sends the results.

    Args:
        orders: One JSON text per order.
        driver: Where messages go.
        train: The user's function, where it cannot be imported by its name.
    """
    loop: OwnLoop | None = None
    for line in orders:
        order = json.loads(line)
        try:
            points = [recipes.validate_recipe(each["recipe"], "point") for each in order]
            if points[0].foreign:
                _run_foreign(points[0], order[0]["id"], driver, train)
                continue
            loop = loop or OwnLoop()
            _train_order(order, points, loop, driver)
        except UserError as error:
            driver.send({"refused": str(error)})


def _run_foreign(point: Recipe, id: str, driver: Connection, train: Train | None) -> None:
    from scaletune.sweeping.trainers.supervisor import run_own_trial

    driver.send(run_own_trial(point, id, driver.send, lambda: id in driver.stops, train))


class OwnLoop:
    """What scaletune's loop trains with here: an Accelerator, and processes for larger trials."""

    def __init__(self) -> None:
        from scaletune import training

        self.acc, self.ranks = training.accelerator(), training.RankGroup()
        # Imported objects are excluded from garbage collection: after a trial it takes 2 ms, not
        # 100.
        gc.freeze()

    def run_over_processes(
        self, point: Recipe, order: dict[str, Any], driver: Connection
    ) -> tuple[Trial, list[float]]:
        """Trains over `engine.processes`; if one is killed, this worker ends by the same signal.

        The driver then sees whether memory ran out.
        """
        from scaletune import training

        try:
            return self.ranks.run_trial(
                point, order["sweep"], driver.send_progress, driver.control(), order["id"]
            )
        except training.RankDied as error:
            print(error, file=sys.stderr, flush=True)
            if error.status < 0:
                os.kill(os.getpid(), -error.status)
            raise


def _train_order(
    order: Sequence[dict[str, Any]],
    points: Sequence[Recipe],
    loop: OwnLoop,
    driver: Connection,
) -> None:
    if population := order[0].get("population"):
        lineages = _train_population(
            points[0], order[0]["sweep"], population, loop.acc, driver.send_progress
        )
        driver.send({"trials": [_result(trial, curve) for trial, curve in lineages]})
        return
    for trial, curve in _train(order, points, loop, driver):
        driver.send(_result(trial, curve))


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
    order: Sequence[dict[str, Any]],
    points: Sequence[Recipe],
    loop: OwnLoop,
    driver: Connection,
) -> Iterable[tuple[Trial, list[float]]]:
    from scaletune import training

    sweeps = [each["sweep"] for each in order]
    if len(points) > 1:
        return training.train_stack(
            points, sweeps, loop.acc, driver.send_progress, driver.control()
        )
    if points[0].engine.processes > 1:
        return [loop.run_over_processes(points[0], order[0], driver)]
    return [
        training.run_trial(points[0], sweeps[0], loop.acc, driver.send_progress, driver.control())
    ]


def main(train: Train | None = None) -> None:
    """Runs the worker until its input ends, even in the middle of a trial."""
    output = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print goes to the log, not between the messages
    driver = Connection(output)

    def listen() -> None:
        for line in sys.stdin:
            if line.startswith("{"):  # an order is a list
                driver.stops |= set(json.loads(line)["stop"])
            else:
                driver.orders.put(line)
        os._exit(0)  # the driver is gone, so nobody would read the result

    threading.Thread(target=listen, daemon=True).start()
    serve(iter(driver.orders.get, None), driver, train)


if __name__ == "__main__":
    main()
