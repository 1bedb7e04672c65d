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

from scaletune.recipe import Recipe, SearchSection, points, with_settings
from scaletune.records import Store, Trial, frame, write_atomically
from scaletune.sweeping.driver import train_all
from scaletune.sweeping.search.lr_basin import Proposal, propose
from scaletune.sweeping.search.run_pruner import RunPruner
from scaletune.sweeping.search.space import (
    Cell,
    Point,
    Waves,
    build_cells,
    lowest,
    write_notes,
)
from scaletune.sweeping.sizes import point_sizes, require_known
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
        recipe: A recipe with `search.decides`.
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
    with contextlib.closing(Store(stem, adopt=adopt)) as store:
        known = {trial.id: trial for trial in store.trials() if trial.status != "failed"}
    loop = build_loop(recipe, known)
    cells = loop.cells
    if not loop.prunes:  # trials that were stopped early are trained to their end
        loop.known = {id: trial for id, trial in known.items() if trial.status != "stopped"}
    train_all(
        [*loop.start(), *beside],
        stem,
        recipe.engine.workers,
        then=loop.add_trial,
        watch=loop.watch if loop.prunes else None,
        finish_stopped=not loop.prunes,
        train=train,
    )
    loop.finish()
    write_notes(cells, stem)
    if results := [cell.results for cell in cells if cell.results]:
        text = json.dumps(results, indent=1, allow_nan=False) + "\n"
        write_atomically(stem.with_name(stem.name + ".search.json"), text)
    with contextlib.closing(Store(stem)) as store:
        trials = [trial for trial in store.trials() if trial.id in loop.requested]
    return list(loop.requested.values()), frame(trials)


def build_loop(recipe: Recipe, known: dict[str, Trial], *, quiet: bool = False) -> SearchLoop:
    """The searches of a recipe, before their first step.

    Args:
        recipe: A recipe with `search.decides`.
        known: The recorded trials by id.
        quiet: Whether the messages of the searches are not printed.

    Raises:
        UserError: A point cannot be trained, or there is no grid to search in.
    """
    cells = build_cells(recipe)
    tasks("main", points(recipe))  # refuses points that cannot be trained before the search starts
    return SearchLoop(cells, _start_searches(cells, recipe), known, quiet)


def _start_searches(cells: list[Cell], recipe: Recipe) -> list[ActiveSearch]:
    """One search per cell; kind "joint": one search over all cells."""
    search = recipe.search
    if search.kind == "joint":
        from scaletune.sweeping.search.joint_design import search_jointly

        return [ActiveSearch(search_jointly(cells, search, _target_scale(cells, recipe)))]
    if search.kind in ("optuna", "grid"):
        return [_start_pruned_search(cell, search) for cell in cells]
    if search.kind == "pareto":
        from scaletune.sweeping.search.pareto import search_frontier

        return [ActiveSearch(search_frontier(cell, search)) for cell in cells]
    return [ActiveSearch(search_basin(cell, search)) for cell in cells]


def _start_pruned_search(cell: Cell, search: SearchSection) -> ActiveSearch:
    """A search whose pruner may stop trials inside their runs."""
    from scaletune.sweeping.search import optuna_samplers as samplers

    pruner = RunPruner(samplers.create_study(search, cell), search, cell.shares, cell.tokens)
    if search.kind == "grid":
        return ActiveSearch(samplers.search_grid(cell, pruner), pruner=pruner)
    return ActiveSearch(samplers.search_with_optuna(cell, search, pruner), pruner=pruner)


def _target_scale(cells: list[Cell], recipe: Recipe) -> tuple[float, float]:
    """(n_params, tokens) that the law is for: the held-out setting, else the cell of most FLOPs."""
    if not recipe.holdout:
        largest = max(cells, key=lambda cell: cell.flops)
        return largest.n_params, largest.tokens
    held_out = with_settings(recipe.model_copy(update={"axes": {}}), recipe.holdout.set)
    sizes = point_sizes(held_out)
    require_known(sizes, "search.kind 'joint'", held_out, ("n_params", "tokens"))
    return sizes.n_params, sizes.tokens


@dataclass
class ActiveSearch:
    """A search that is not finished, and the tasks of its current wave."""

    waves: Waves
    wave: list[Task] = field(default_factory=list)
    pruner: RunPruner | None = None
    """Decides which trials of the wave to stop inside their runs."""

    def add_record(self, trial: Trial) -> None:
        """Gives the pruner the losses on the way of a recorded trial."""
        if self.pruner:
            for index, task in enumerate(self.wave):
                if task.id == trial.id:
                    self.pruner.add_record(index, trial)


class SearchLoop:
    """Drives all searches of a recipe.

    `known` holds the trials by id that are recorded; `requested` the tasks by id that the searches
    requested, in this order.
    """

    def __init__(
        self,
        cells: list[Cell],
        searches: Sequence[ActiveSearch],
        known: dict[str, Trial],
        quiet: bool = False,
    ):
        self.cells, self.searches, self.known, self.quiet = cells, searches, known, quiet
        self.requested: dict[str, Task] = {}
        self.printed = [0] * len(cells)  # messages printed so far, per cell

    @property
    def prunes(self) -> bool:
        """Whether a pruner may stop trials inside their runs."""
        return any(cell.shares for cell in self.cells)

    def open_tasks(self) -> list[Task]:
        """The tasks of all current waves that have no result."""
        return [task for search in self.searches for task in self._missing(search)]

    def start(self) -> list[Task]:
        """The tasks to train first."""
        return [task for search in self.searches for task in self._advance(search, None)]

    def add_trial(self, trial: Trial) -> list[Task]:
        """The tasks to train after this trial; none after a failed one, which stops its search."""
        if trial.status == "failed":
            return []
        self.known[trial.id] = trial
        for search in self.searches:
            search.add_record(trial)
        waiting = [
            search for search in self.searches if any(task.id == trial.id for task in search.wave)
        ]
        return [
            task
            for search in waiting
            if self._missing(search) == []
            for task in self._advance(search, self._losses(search))
        ]

    def watch(self, task: Task, tokens: float, loss: float) -> set[str]:
        """The trials to stop after a held-out loss of one of them."""
        return {
            other.id
            for search in self.searches
            if search.pruner
            for index, other in enumerate(search.wave)
            if other.id == task.id and search.pruner.add_loss(index, tokens, loss)
        }

    def _missing(self, search: ActiveSearch) -> list[Task]:
        """The tasks of the current wave that are not trained yet."""
        return list({task.id: task for task in search.wave if task.id not in self.known}.values())

    def _losses(self, search: ActiveSearch) -> list[float]:
        trials = [self.known[task.id] for task in search.wave]
        ends = [math.inf if trial.status == "stopped" else math.nan for trial in trials]
        return [
            end if trial.loss is None else trial.loss
            for trial, end in zip(trials, ends, strict=True)
        ]

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
            for id in {task.id: None for task in search.wave if task.id in self.known}:
                search.add_record(self.known[id])
            if missing := self._missing(search):
                return missing
            losses = self._losses(search)

    def _print_notes(self) -> None:
        for i, cell in enumerate(self.cells):
            for note in [] if self.quiet else cell.notes[self.printed[i] :]:
                print(f"search: {note}", file=sys.stderr)
            self.printed[i] = len(cell.notes)

    def finish(self) -> None:
        """Adds a message for each search that a failed trial has stopped.

        Also one if a pruner had no loss on the way to decide by.
        """
        pruners = [search.pruner for search in self.searches if search.pruner]
        if any(pruner.shares for pruner in pruners) and not any(p.n_losses for p in pruners):
            self.cells[0].notes.append(
                "the pruner could stop no trial, because none reported a loss with `tokens` on the"
                " way: call scaletune.trial.report(tokens=..., loss=...) during the training"
            )
        for task in self.open_tasks():
            self.cells[0].notes.append(
                f"trial {task.id} failed, so its search stopped: the next run retries it"
            )
        self._print_notes()


def search_basin(cell: Cell, search: SearchSection) -> Waves:
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
    cell: Cell, search: SearchSection, seen: dict[Point, float]
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


def _propose(cell: Cell, search: SearchSection, losses: dict[Point, float]) -> Proposal:
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
