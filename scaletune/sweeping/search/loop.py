"""Runs a search: it yields waves of points, and the driver trains them and returns their losses.

The points of a search depend on the recipe and on the losses of its earlier points, in the order it
requested them; they do not depend on the number of workers or their speed. An interrupted search
therefore repeats its steps from the record, and points that an earlier sweep has trained are not
trained again.
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

from scaletune.recipe import Recipe, Search, points, with_settings
from scaletune.records import Store, Trial, frame, write_atomically
from scaletune.sweeping.driver import train_all
from scaletune.sweeping.search.lr_basin import Proposal, propose
from scaletune.sweeping.search.space import Cell, Point, Waves, build_cells, lowest, write_notes
from scaletune.sweeping.sizes import point_sizes
from scaletune.sweeping.task import Task, tasks

if TYPE_CHECKING:
    import pandas as pd

    from scaletune.sweeping.trainers.start import Train


def run_search(
    recipe: Recipe,
    stem: Path,
    *,
    adopt: bool = False,
    beside: Sequence[Task] = (),
    train: Train | None = None,
) -> tuple[list[Task], pd.DataFrame]:
    """Runs the search of a recipe.

    Prints messages, for example why a range was extended, and writes them to `NAME.search.txt`.

    Args:
        recipe: A recipe whose `search.kind` is not "grid".
        stem: Path of the sweep's files without suffix.
        adopt: Accept the trials of an existing `.jsonl` record.
        beside: Other tasks to train, which keep workers busy while a wave waits for its last trial.
        train: The user's function that trains, where it cannot be imported by its name.

    Returns:
        The tasks of the search in the order it requested them, and their trials.
    """
    if recipe.search.kind == "pbt":
        from scaletune.sweeping.search.pbt import run_populations

        return run_populations(recipe, stem, adopt=adopt)
    cells = build_cells(recipe)
    tasks("main", points(recipe))  # refuses points that cannot be trained before the search starts
    with contextlib.closing(Store(stem, adopt=adopt)) as store:
        known = {trial.id: trial for trial in store.trials() if trial.status != "failed"}
    loop = SearchLoop(cells, _start_searches(cells, recipe), known)
    first = [*loop.start(), *beside]
    train_all(first, stem, recipe.engine.workers, then=loop.add_trial, train=train)
    loop.finish()
    write_notes(cells, stem)
    if results := [cell.results for cell in cells if cell.results]:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        write_atomically(stem.with_name(stem.name + ".search.json"), text)
    with contextlib.closing(Store(stem)) as store:
        trials = [trial for trial in store.trials() if trial.id in loop.requested]
    return list(loop.requested.values()), frame(trials)


def _start_searches(cells: list[Cell], recipe: Recipe) -> list[ActiveSearch]:
    """One search per cell; kind "joint": one search over all cells."""
    search = recipe.search
    if search.kind == "joint":
        from scaletune.sweeping.search.joint_design import search_jointly

        return [ActiveSearch(search_jointly(cells, search, _target_scale(cells, recipe)))]
    if search.kind == "optuna":
        from scaletune.sweeping.search.optuna_samplers import search_with_optuna

        return [ActiveSearch(search_with_optuna(cell, search)) for cell in cells]
    if search.kind == "pareto":
        from scaletune.sweeping.search.pareto import search_frontier

        return [ActiveSearch(search_frontier(cell, search)) for cell in cells]
    return [ActiveSearch(search_basin(cell, search)) for cell in cells]


def _target_scale(cells: list[Cell], recipe: Recipe) -> tuple[float, float]:
    """(n_params, tokens) that the law is for: the held-out setting, else the cell of most FLOPs."""
    if not recipe.holdout:
        largest = max(cells, key=lambda cell: cell.flops)
        return largest.n_params, largest.tokens
    held_out = with_settings(recipe.model_copy(update={"axes": {}}), recipe.holdout.set)
    sizes = point_sizes(held_out)
    return sizes.n_params, sizes.tokens


@dataclass
class ActiveSearch:
    """A search that is not finished, and the tasks of its current wave."""

    waves: Waves
    wave: list[Task] = field(default_factory=list)


class SearchLoop:
    """Drives all searches of a recipe.

    `known` holds the trials by id that are recorded; `requested` the tasks by id that the searches
    requested, in this order.
    """

    def __init__(
        self, cells: Sequence[Cell], searches: Sequence[ActiveSearch], known: dict[str, Trial]
    ):
        self.cells, self.searches, self.known = cells, searches, known
        self.requested: dict[str, Task] = {}
        self.printed = [0] * len(cells)  # messages printed so far, per cell

    def start(self) -> list[Task]:
        """The tasks to train first."""
        return [task for search in self.searches for task in self._advance(search, None)]

    def add_trial(self, trial: Trial) -> list[Task]:
        """The tasks to train after this trial; none after a failed one, which stops its search."""
        if trial.status == "failed":
            return []
        self.known[trial.id] = trial
        waiting = [
            search for search in self.searches if any(task.id == trial.id for task in search.wave)
        ]
        return [
            task
            for search in waiting
            if self._missing(search) == []
            for task in self._advance(search, self._losses(search))
        ]

    def _missing(self, search: ActiveSearch) -> list[Task]:
        """The tasks of the current wave that are not trained yet."""
        return list({task.id: task for task in search.wave if task.id not in self.known}.values())

    def _losses(self, search: ActiveSearch) -> list[float]:
        losses = [self.known[task.id].loss for task in search.wave]
        return [math.nan if loss is None else loss for loss in losses]

    def _advance(self, search: ActiveSearch, losses: list[float] | None) -> list[Task]:
        """Continues a search until a wave has something to train, or the search ends."""
        while True:
            try:
                # None starts a generator
                wave = search.waves.send(losses)  # type: ignore[arg-type]
            except StopIteration:
                search.wave = []
                return []
            finally:
                self._print_notes()
            recipes = [cell.recipe(point, rung) for cell, point, rung in wave]
            search.wave = tasks("main", recipes)
            self.requested |= {t.id: t for t in search.wave if t.id not in self.requested}
            if missing := self._missing(search):
                return missing
            losses = self._losses(search)

    def _print_notes(self) -> None:
        for i, cell in enumerate(self.cells):
            for note in cell.notes[self.printed[i] :]:
                print(f"search: {note}", file=sys.stderr)
            self.printed[i] = len(cell.notes)

    def finish(self) -> None:
        """Adds a message for each search that a failed trial has stopped."""
        for search in self.searches:
            for task in self._missing(search):
                self.cells[0].notes.append(
                    f"trial {task.id} failed, so its search stopped: the next run retries it"
                )
        self._print_notes()


def search_basin(cell: Cell, search: Search) -> Waves:
    """Searches one cell by expected improvement.

    Stops when `budget` points are trained, or when the expected improvement is below `noise`. The
    last points are neighbours of the best point in lr, so that it has one on each side: a fit of
    the loss basin needs them.
    """
    seen: dict[Point, float] = {}
    most = search.budget or math.inf
    while len(seen) < most:
        wave, stop = _next_wave(cell, search, seen)
        if wave:
            seen |= zip(wave, (yield [(cell, point, None) for point in wave]), strict=True)
        elif not _extend(cell, seen):
            cell.add_note(f"stopped after {cell.fraction(len(seen))}: {stop or 'all are trained'}")
            return
    cell.note_used_budget(seen)


def _next_wave(
    cell: Cell, search: Search, seen: dict[Point, float]
) -> tuple[dict[Point, float], str]:
    """({point to train next: expected loss}, why the search stops; empty if it continues)."""
    wave: dict[Point, float] = {}
    most = min(search.budget or math.inf, len(cell.points))
    while len(seen) + len(wave) < most and len(wave) < search.wave:
        proposal = _propose(cell, search, seen | wave)
        if proposal.gain < search.noise:
            if not wave and (neighbour := _missing_neighbour(cell, seen)):
                wave[neighbour] = proposal.expected
                continue
            return wave, f"expected improvement below {100 * search.noise:.2g} % of the loss"
        if proposal.outside > 0.5 and not wave and _extend(cell, seen):
            most = min(search.budget or math.inf, len(cell.points))
            continue
        wave[cell.points[proposal.index]] = proposal.expected
    return wave, ""


def _propose(cell: Cell, search: Search, losses: dict[Point, float]) -> Proposal:
    index = {point: i for i, point in enumerate(cell.points)}
    seen = [index[point] for point in losses]
    return propose(cell.logs, seen, [*losses.values()], seed=search.seed)


def _missing_neighbour(cell: Cell, seen: dict[Point, float]) -> Point | None:
    """The best point's nearest neighbour in lr, on a side where none is trained."""
    best = lowest(seen)
    if best is None:
        return None
    values, trained = cell.axes[0], {point[0] for point in seen if point[1:] == best[1:]}
    at = values.index(best[0])
    sides = [values[at + 1 :], values[:at][::-1]]  # nearest first
    return next(((side[0], *best[1:]) for side in sides if side and not trained & set(side)), None)


def _extend(cell: Cell, seen: dict[Point, float]) -> bool:
    """Extends the ranges that have the best point at an end; whether any was extended."""
    best = lowest(seen)
    return best is not None and cell.grow(best)
