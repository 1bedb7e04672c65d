"""The search space: one cell (setting) per combination of the axes that are not searched.

A cell holds the grid of the searched axes, which is extended where the best point lies at its edge.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune import data
from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.recipe import SHORT_NAMES, Recipe
from scaletune.records import write_atomically
from scaletune.sweeping.search.run_pruner import decision_shares
from scaletune.sweeping.sizes import Sizes, point_sizes, require_known

Array = NDArray[np.float64]
Point = tuple[float, ...]  # one value of each searched axis
# search.kind -> the axes that it searches, in this order; all other axes make cells
SEARCHED_AXES = {
    "basin": ("lr", "batch_tokens"),
    "joint": ("lr", "batch_tokens"),
    "optuna": ("lr", "batch_tokens", "weight_decay"),
    "grid": ("lr", "batch_tokens", "weight_decay"),
    "pbt": ("lr",),
    "pareto": (),  # all axes of numbers, sizes too
}


@dataclass
class Cell:
    """The grid of one setting."""

    name: str
    """The setting's values, for example "width 64, tokens 8192"; empty if there is one setting."""
    base: Recipe
    """The recipe without the searched values."""
    paths: list[str]
    """Dotted names of the searched axes."""
    axes: list[list[float]]
    """Ascending values of each searched axis. Extended where the optimum lies at an end."""
    max_steps: int
    """How many steps each end of an axis may be extended by (`search.extend`)."""
    n_params: float = 1.0
    tokens: float = 1.0
    flops: float = 1.0
    """FLOPs of one point."""
    rungs: list[int] = field(default_factory=list)
    """Token budgets of a pruner's rungs, ascending."""
    shares: list[float] = field(default_factory=list)
    """Shares of the token budget at which a pruner decides inside runs, ascending."""
    extended: dict[tuple[int, bool], int] = field(default_factory=dict)
    """(axis, upper end) -> steps that it is extended by so far."""
    notes: list[str] = field(default_factory=list)
    """Messages for the user."""
    results: dict[str, Any] = field(default_factory=dict)
    """What the search found besides its trials, as plain values."""

    @property
    def points(self) -> list[Point]:
        return list(itertools.product(*self.axes))

    @property
    def logs(self) -> Array:
        """[points, axes]: the natural logarithms of the points."""
        return np.log(np.array(self.points, float))

    def recipe(self, point: Point, tokens: int | None = None) -> Recipe:
        """The recipe of a point, on a rung if `tokens` is given."""
        rung = {} if tokens is None else {"tokens": tokens}
        return recipes.with_settings(self.base, dict(zip(self.paths, point, strict=True)) | rung)

    def add_note(self, text: str) -> None:
        """Adds a message for the user."""
        self.notes.append(f"{self.name}: {text}" if self.name else text)

    def fraction(self, trained: int) -> str:
        """`4 of 6 learning rates`, or points if more axes than lr are searched."""
        unit = "learning rates" if self.paths == [SHORT_NAMES["lr"]] else "points"
        return f"{trained} of {len(self.points)} {unit}"

    def ends(self, best: Point) -> list[tuple[int, bool]]:
        """(axis, upper end) wherever `best` is the first or the last value of an axis."""
        axes = [(i, values) for i, values in enumerate(self.axes) if len(values) > 1]
        return [
            (i, upper) for i, values in axes for upper in (False, True) if best[i] == values[-upper]
        ]

    def grow(self, best: Point) -> bool:
        """Extends every axis that has `best` at an end by one step; whether any was extended."""
        return any([self.extend_axis(i, upper) for i, upper in self.ends(best)])

    def note_used_budget(self, seen: Mapping[Point, float]) -> None:
        """Tells the user that the budget ended the search, and whether the best point is an end."""
        best = lowest(seen)
        names = sorted({self.paths[i].split(".")[-1] for i, _ in self.ends(best)}) if best else []
        edge = f"; the best point is at the end of the range of `{'`, `'.join(names)}`"
        self.add_note(
            f"stopped after {self.fraction(len(seen))}: `search.budget` is used up"
            + (edge if names else "")
        )

    def note_stopped(self, seen: Mapping[Point, float]) -> None:
        """Tells the user how many points the pruner has stopped inside their runs."""
        if self.shares:
            stopped = sum(math.isinf(loss) for loss in seen.values())
            self.add_note(f"the pruner stopped {stopped} of {len(seen)} points early")

    def extend_axis(self, i: int, upper: bool) -> bool:
        """Extends an axis by one step at one end; False, and one message, if that is impossible."""
        values, steps = self.axes[i], self.extended.get((i, upper), 0)
        if steps > self.max_steps:
            return False  # the message was given before
        self.extended[i, upper] = steps + 1
        wider = _next_step(values, upper)
        name, largest = self.paths[i].split(".")[-1], "largest" if upper else "smallest"
        where = f"the best `{name}` so far, {values[-upper]:g}, is the {largest} of its range"
        if steps == self.max_steps or wider is None or not self._is_valid(i, wider):
            self.extended[i, upper] = self.max_steps + 1
            limit = f"it was extended `search.extend = {self.max_steps}` times, the most allowed"
            beyond = f"no {'larger' if upper else 'smaller'} value is valid"
            self.add_note(f"{where}; {limit if steps == self.max_steps else beyond}")
            return False
        self.axes[i] = [*values, wider] if upper else [wider, *values]
        self.add_note(f"{where}; the range is extended to {wider:g}")
        return True

    def _is_valid(self, i: int, value: float) -> bool:
        """Whether all points with this value of axis `i` can be trained."""
        axes = [[value] if k == i else values for k, values in enumerate(self.axes)]
        try:
            for point in itertools.product(*axes):
                recipe = self.recipe(point, max(self.rungs, default=None))
                if not recipe.foreign:
                    data.check_recipe(recipe, data.load(recipe.data))
        except UserError:
            return False
        return True


# A search is a generator. It yields a wave, a list of (cell, point, rung) to train, and receives
# the losses in the same order; NaN: diverged, infinity: stopped early by a pruner.
Waves = Generator[list[tuple[Cell, Point, int | None]], list[float], None]


def lowest(seen: Mapping[Point, float]) -> Point | None:
    """The point with the lowest loss; None when none has been trained to its end."""
    finite = [point for point, loss in seen.items() if math.isfinite(loss)]
    return min(finite, key=lambda point: seen[point], default=None)


def _next_step(values: Sequence[float], upper: bool) -> float | None:
    """The end's own factor applied once more; None where the result is not a valid value."""
    end, inner = (values[-1], values[-2]) if upper else (values[0], values[1])
    wider = float(f"{end * end / inner:.12g}") if inner > 0 and end > 0 else 0.0
    if isinstance(end, int):
        return int(wider) if wider == int(wider) > 0 else None
    return wider if wider > 0 else None


def build_cells(recipe: Recipe) -> list[Cell]:
    """The cells of a recipe with `search`.

    Raises:
        UserError: There is no grid to search in, or the pruner has nothing to decide by.
    """
    return [
        cell
        for settings in recipe.cells or [{}]
        for cell in _cells(recipe, recipes.cell_axes(settings, recipe.axes))
    ]


def _cells(recipe: Recipe, recipe_axes: Mapping[str, Sequence[Any]]) -> list[Cell]:
    """The cells of some axes."""
    search = recipe.search
    axes = {SHORT_NAMES.get(path, path): list(values) for path, values in recipe_axes.items()}
    searched = [SHORT_NAMES[name] for name in SEARCHED_AXES[search.kind]] or [
        path for path in axes if path != "seed" and _are_numbers(axes[path])
    ]
    paths = [path for path in searched if path in axes]
    if SHORT_NAMES["lr"] not in paths:
        raise UserError(
            f"`axes.lr` must be given with search.kind {search.kind!r}: it is the grid to search in"
        )
    for path in paths:
        _require_grid(path, axes[path])
    on_rungs = search.kind == "optuna" and len(axes.get(SHORT_NAMES["tokens"], [])) > 1
    prunes = search.pruner != "none"
    rungs = sorted(axes.pop(SHORT_NAMES["tokens"])) if prunes and on_rungs else []
    shares = decision_shares(recipe) if prunes and not rungs else []
    if search.sampler == "cmaes" and sum(len(axes[path]) > 1 for path in paths) < 2:
        raise UserError(
            "sampler 'cmaes' needs two or more searched axes (it adapts their covariance), but got"
            " one: use 'tpe' or 'gp'"
        )
    bare = recipe.model_copy(update={"axes": {}, "cells": []})
    outer = [path for path in axes if path not in paths]
    grid = {path: sorted(axes[path]) for path in paths}
    return [
        replace(
            _build_cell(bare, dict(zip(outer, values, strict=True)), grid, rungs), shares=shares
        )
        for values in itertools.product(*(axes[path] for path in outer))
    ]


def _are_numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _require_grid(path: str, values: Sequence[Any]) -> None:
    positive = all(isinstance(value, (int, float)) and value > 0 for value in values)
    if not positive or len(set(values)) < len(values):
        raise UserError(
            f"a searched axis must have distinct positive values, but `{path}` has {list(values)}"
        )


def _build_cell(
    bare: Recipe, settings: dict[str, Any], grid: Mapping[str, list[float]], rungs: list[int]
) -> Cell:
    # templates of the user's trainer may name own settings that are searched
    own = {path: values[0] for path, values in grid.items() if path.startswith(("my.", "model."))}
    base = recipes.with_settings(bare, settings | own)
    sizes = point_sizes(base)
    _require_sizes(bare.search.kind, sizes, base)
    return Cell(
        ", ".join(f"{path.split('.')[-1]} {value}" for path, value in settings.items()),
        base,
        list(grid),
        list(grid.values()),
        bare.search.extend,
        sizes.n_params,
        sizes.tokens,
        sizes.flops,
        rungs,
    )


def _require_sizes(kind: str, sizes: Sizes, recipe: Recipe) -> None:
    """UserError if a search needs sizes that a user's trainer tells only after the training."""
    needs = {"joint": ("n_params", "tokens", "flops"), "pareto": ("flops",)}.get(kind, ())
    require_known(sizes, f"search.kind {kind!r}", recipe, needs)


def write_notes(cells: Sequence[Cell], stem: Path) -> None:
    """Writes the cells' messages to `NAME.search.txt`."""
    text = "".join(f"{note}\n" for cell in cells for note in cell.notes)
    write_atomically(stem.with_name(stem.name + ".search.txt"), text)
