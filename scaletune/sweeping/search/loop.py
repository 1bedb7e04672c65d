"""Sweeps that choose their points: searches ask in waves, the driver trains what is not on record and tells them the losses.

What a search asks for depends on the recipe and on the losses it was told, in the order it asked, and on nothing else: not on how many
workers there are or who was faster. So a killed driver's rerun goes through the record to where it was, and a trial of an earlier
sweep that a search comes upon is not trained again.
"""

from __future__ import annotations

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune import counting, data, sweeping
from scaletune.recipe import Recipe, Search, points, with_settings
from scaletune.records import Store, Trial, frame, write_atomically
from scaletune.sweeping.search.lr_basin import propose
from scaletune.sweeping.search.space import Cell, Point, Waves, cells, lowest, write_notes

if TYPE_CHECKING:
    import pandas as pd

    from scaletune.sweeping import Task


def search(
    recipe: Recipe, stem: Path, *, adopt: bool = False, beside: Sequence[Task] = ()
) -> tuple[list[Task], pd.DataFrame]:
    """Carry the recipe's search out: what it asked for, in order, and the trials of that. Says on stderr and in `NAME.search.txt` where it grew a range.

    `beside`: tasks to train as well, which keep workers busy while a wave waits for its last trial.
    """
    if recipe.search.kind == "pbt":
        from scaletune.sweeping.search.pbt import bred

        return bred(recipe, stem, adopt=adopt)
    found = cells(recipe)
    sweeping.tasks(
        "main", points(recipe)
    )  # all that may be asked for must be sound before anything is trained
    with contextlib.closing(Store(stem, adopt=adopt)) as store:
        known = {trial.id: trial for trial in store.trials() if trial.status != "failed"}
    asker = Asker(found, _lines(found, recipe), known)
    sweeping.train_all([*asker.start(), *beside], stem, recipe.engine.workers, then=asker.told)
    asker.finish()
    write_notes(found, stem)
    if learnt := [cell.found for cell in found if cell.found]:
        write_atomically(
            stem.with_name(stem.name + ".search.json"),
            json.dumps(learnt, indent=1, allow_nan=False) + "\n",
        )
    with contextlib.closing(Store(stem)) as store:
        return list(asker.asked.values()), frame(
            trial for trial in store.trials() if trial.id in asker.asked
        )


def _lines(found: list[Cell], recipe: Recipe) -> list[Line]:
    """One search a cell, or one of all of them."""
    asked = recipe.search
    if asked.kind == "joint":
        from scaletune.sweeping.search.joint_design import joint

        return [Line(joint(found, asked, _target(found, recipe)))]
    if asked.kind == "optuna":
        from scaletune.sweeping.search.optuna_samplers import sampled

        return [Line(sampled(cell, asked)) for cell in found]
    if asked.kind == "pareto":
        from scaletune.sweeping.search.pareto import pareto

        return [Line(pareto(cell, asked)) for cell in found]
    return [Line(basin(cell, asked)) for cell in found]


def _target(found: list[Cell], recipe: Recipe) -> tuple[float, float]:
    """(n_params, tokens) that the law is to answer for: the held-out cell's, else the dearest cell's."""
    if not recipe.holdout:
        dearest = max(found, key=lambda cell: cell.flops)
        return dearest.n_params, dearest.tokens
    held = with_settings(recipe.model_copy(update={"axes": {}}), recipe.holdout.set)
    return counting.params(held.model, data.load(held.data).vocab_size)[
        "n_params"
    ], held.budget.tokens


@dataclass
class Line:
    """A search under way, and the wave it waits for."""

    waves: Waves
    wave: list[Task] = field(default_factory=list)


class Asker:
    """What all searches have asked for, and what is known of that."""

    def __init__(self, found: Sequence[Cell], lines: Sequence[Line], known: dict[str, Trial]):
        self.cells, self.lines, self.known = found, lines, known
        self.asked: dict[str, Task] = {}  # by id, in the order asked
        self.said = [0] * len(found)

    def start(self) -> list[Task]:
        """What to train first."""
        return [task for line in self.lines for task in self._step(line, None)]

    def told(self, trial: Trial) -> list[Task]:
        """What to train after this one; nothing after one that failed, for which its search waits."""
        if trial.status == "failed":
            return []
        self.known[trial.id] = trial
        waiting = [line for line in self.lines if any(task.id == trial.id for task in line.wave)]
        return [
            task
            for line in waiting
            if self._missing(line) == []
            for task in self._step(line, self._losses(line))
        ]

    def _missing(self, line: Line) -> list[Task]:
        return list({task.id: task for task in line.wave if task.id not in self.known}.values())

    def _losses(self, line: Line) -> list[float]:
        return [
            math.nan if (loss := self.known[task.id].loss) is None else loss for task in line.wave
        ]

    def _step(self, line: Line, losses: list[float] | None) -> list[Task]:
        """Go on until a wave has something to train, or the search ends."""
        while True:
            try:
                wanted = line.waves.send(losses)  # type: ignore[arg-type]  # a generator's first is None
            except StopIteration:
                line.wave = []
                return []
            finally:
                self._say()
            line.wave = sweeping.tasks(
                "main", [cell.recipe(point, rung) for cell, point, rung in wanted]
            )
            self.asked |= {task.id: task for task in line.wave if task.id not in self.asked}
            if missing := self._missing(line):
                return missing
            losses = self._losses(line)

    def _say(self) -> None:
        for i, cell in enumerate(self.cells):
            for note in cell.notes[self.said[i] :]:
                print(f"search: {note}", file=sys.stderr)
            self.said[i] = len(cell.notes)

    def finish(self) -> None:
        """Say which searches a failed trial has stopped."""
        for line in self.lines:
            for task in self._missing(line):
                self.cells[0].notes.append(
                    f"trial {task.id} failed: its search waits for it, and the next run tries again"
                )
        self._say()


def basin(cell: Cell, asked: Search) -> Waves:
    """One cell: the points that most lower its lowest loss, until `budget`, or until nothing above the noise is to be won.

    Then, for those who fit a basin to the record, a point on each side of the best in lr, where there is none.
    """
    seen: dict[Point, float] = {}
    most = asked.budget or math.inf
    while len(seen) < most:
        wave, lies, stop = list[Point](), list[float](), ""
        while (
            not stop
            and len(seen) + len(wave) < min(most, len(cell.points))
            and len(wave) < asked.wave
        ):
            index = {point: i for i, point in enumerate(cell.points)}
            known = [*seen, *wave]
            found = propose(
                cell.logs, [index[p] for p in known], [*seen.values(), *lies], seed=asked.seed
            )
            if found.gain < asked.noise and not wave and (beside := _beside(cell, seen)):
                wave, lies = [beside], [found.expected]
            elif found.gain < asked.noise:
                stop = f"no more than {found.gain:.2g} of the loss is to be won"
            elif found.outside > 0.5 and not wave and _grown(cell, seen):
                continue
            else:
                wave.append(cell.points[found.index])
                lies.append(found.expected)
        if wave:
            seen |= zip(wave, (yield [(cell, point, None) for point in wave]), strict=True)
        elif not _grown(cell, seen):
            cell.say(f"{len(seen)} of {len(cell.points)} points: {stop or 'all are trained'}")
            return
    cell.spent(seen)


def _beside(cell: Cell, seen: dict[Point, float]) -> Point | None:
    """The best point's neighbour in lr on a side of it where nothing is trained."""
    best = lowest(seen)
    if best is None:
        return None
    values, looked = cell.axes[0], {point[0] for point in seen if point[1:] == best[1:]}
    at = values.index(best[0])
    sides = [values[at + 1 :], values[:at][::-1]]  # nearest first
    return next(((side[0], *best[1:]) for side in sides if side and not looked & set(side)), None)


def _grown(cell: Cell, seen: dict[Point, float]) -> bool:
    best = lowest(seen)
    return best is not None and cell.grow(best)
