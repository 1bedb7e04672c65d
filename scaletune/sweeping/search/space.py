"""Where a search may look: one cell for each combination of the axes that are not searched, with the grid of those that are."""

from __future__ import annotations

import itertools
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from scaletune import counting, data
from scaletune import recipe as recipes
from scaletune.errors import UserError
from scaletune.recipe import SHORT, Recipe
from scaletune.records import write_atomically

Array = NDArray[np.float64]
Point = tuple[float, ...]  # one value of each searched axis
SEARCHED = {  # kind -> the axes it searches, in this order; all others make cells
    "basin": ("lr", "batch_tokens"), "joint": ("lr", "batch_tokens"), "optuna": ("lr", "batch_tokens", "weight_decay"),
    "pbt": ("lr",),
    "pareto": (),  # all of numbers, sizes too
}  # fmt: skip


@dataclass
class Cell:
    """A grid to search. `axes` ascend and grow where the optimum sits on their end; `notes` is what the user should know."""

    name: str
    base: Recipe  # everything but the searched values
    paths: list[str]
    axes: list[list[float]]
    room: int  # steps that each end may grow by
    n_params: float = 1.0
    tokens: float = 1.0
    flops: float = 1.0  # of a point
    rungs: list[int] = field(default_factory=list)  # token horizons that a pruner goes through
    grown: dict[tuple[int, bool], int] = field(
        default_factory=dict
    )  # (axis, upper end) -> steps so far
    notes: list[str] = field(default_factory=list)
    found: dict[str, Any] = field(
        default_factory=dict
    )  # what a search learnt beside its trials, as plain values

    @property
    def points(self) -> list[Point]:
        return list(itertools.product(*self.axes))

    @property
    def logs(self) -> Array:
        """[points, axes]."""
        return np.log(np.array(self.points, float))

    def recipe(self, point: Point, tokens: int | None = None) -> Recipe:
        rung = {} if tokens is None else {"tokens": tokens}
        return recipes.with_settings(self.base, dict(zip(self.paths, point, strict=True)) | rung)

    def say(self, text: str) -> None:
        self.notes.append(f"{self.name}: {text}" if self.name else text)

    def ends(self, best: Point) -> list[tuple[int, bool]]:
        """(axis, upper end) wherever `best` sits on one."""
        axes = [(i, values) for i, values in enumerate(self.axes) if len(values) > 1]
        return [
            (i, upper) for i, values in axes for upper in (False, True) if best[i] == values[-upper]
        ]

    def grow(self, best: Point) -> bool:
        """Lengthen by a step every axis that has `best` at an end; whether there is anything new."""
        return any([self.lengthen(i, upper) for i, upper in self.ends(best)])

    def spent(self, seen: Mapping[Point, float]) -> None:
        """Say that the budget is, and where that leaves the best point."""
        best = lowest(seen)
        on = sorted({self.paths[i].split(".")[-1] for i, _ in self.ends(best)}) if best else []
        edge = f"; the best sits on an end of `{'`, `'.join(on)}`" if on else ""
        self.say(f"{len(seen)} of {len(self.points)} points, as many as `budget` allows{edge}")

    def lengthen(self, i: int, upper: bool) -> bool:
        """By a step at one end; False, and said once, where that cannot be."""
        values, name, steps = (
            self.axes[i],
            self.paths[i].split(".")[-1],
            self.grown.get((i, upper), 0),
        )
        if steps > self.room:
            return False  # has been said
        self.grown[i, upper] = steps + 1
        wider = _beyond(values, upper)
        where = f"the best `{name}` so far, {values[-upper]:g}, is the {'largest' if upper else 'smallest'} of its range"
        if steps == self.room or wider is None or not self._valid(i, wider):
            self.grown[i, upper] = self.room + 1
            self.say(
                where
                + (
                    f", which has grown by all of `extend = {self.room}`"
                    if steps == self.room
                    else ", which cannot grow"
                )
            )
            return False
        self.axes[i] = [*values, wider] if upper else [wider, *values]
        self.say(where + f": the range grows to {wider:g}")
        return True

    def _valid(self, i: int, value: float) -> bool:
        try:
            for point in itertools.product(
                *([value] if k == i else values for k, values in enumerate(self.axes))
            ):
                made = self.recipe(point, max(self.rungs, default=None))
                data.fits(made, data.load(made.data))
        except UserError:
            return False
        return True


Waves = Generator[
    list[tuple[Cell, Point, int | None]], list[float], None
]  # asks for (cell, point, rung); is told losses, NaN: diverged


def lowest(seen: Mapping[Point, float]) -> Point | None:
    """The point of the lowest loss; None when all have diverged."""
    finite = [point for point, loss in seen.items() if math.isfinite(loss)]
    return min(finite, key=lambda point: seen[point], default=None)


def _beyond(values: Sequence[float], upper: bool) -> float | None:
    """One step of the end's own factor beyond it; None where there is no such step."""
    end, inner = (values[-1], values[-2]) if upper else (values[0], values[1])
    wider = float(f"{end * end / inner:.12g}") if inner > 0 and end > 0 else 0.0
    if isinstance(end, int):
        return int(wider) if wider == int(wider) > 0 else None
    return wider if wider > 0 else None


def cells(recipe: Recipe) -> list[Cell]:
    """The cells of a recipe's axes; UserError where there is nothing to search in, or no rung to climb."""
    search, axes = (
        recipe.search,
        {SHORT.get(path, path): values for path, values in recipe.axes.items()},
    )
    searched = [SHORT[name] for name in SEARCHED[search.kind]] or [
        path for path in axes if path != "seed" and _numbers(axes[path])
    ]
    paths = [path for path in searched if path in axes]
    if SHORT["lr"] not in paths:
        raise UserError(
            f"a search needs the grid it picks from: `axes.lr` must be given with search.kind {search.kind!r}"
        )
    for path in paths:
        _require_grid(path, axes[path])
    rungs = sorted(axes.pop(SHORT["tokens"], [])) if search.pruner != "none" else []
    if search.pruner != "none" and len(rungs) < 2:
        raise UserError(
            f"pruner {search.pruner!r} climbs the `tokens` axis, a trial of its own each rung: it needs 2 or more, but got {rungs}"
        )
    if search.sampler == "cmaes" and sum(len(axes[path]) > 1 for path in paths) < 2:
        raise UserError(
            "sampler 'cmaes' adapts a covariance: it needs two searched axes or more, but got one"
        )
    bare, outer = (
        recipe.model_copy(update={"axes": {}}),
        [path for path in axes if path not in paths],
    )
    combinations = itertools.product(*(axes[path] for path in outer))
    return [
        _cell(
            bare, dict(zip(outer, values, strict=True)), {p: sorted(axes[p]) for p in paths}, rungs
        )
        for values in combinations
    ]


def _numbers(values: Sequence[Any]) -> bool:
    return all(isinstance(value, (int, float)) and not isinstance(value, bool) for value in values)


def _require_grid(path: str, values: Sequence[Any]) -> None:
    if not all(isinstance(value, (int, float)) and value > 0 for value in values) or len(
        set(values)
    ) < len(values):
        raise UserError(
            f"an axis that is searched must have different values above 0, but `{path}` has {list(values)}"
        )


def _cell(
    bare: Recipe, settings: dict[str, Any], axes: dict[str, list[float]], rungs: list[int]
) -> Cell:
    base = recipes.with_settings(bare, settings)
    corpus = data.load(base.data)
    n_params = counting.params(base.model, corpus.vocab_size)["n_params"]
    flops = (
        counting.flops_per_token(base.model, corpus.vocab_size, base.data.seq_len)
        * base.budget.tokens
    )
    name = ", ".join(f"{path.split('.')[-1]} {value}" for path, value in settings.items())
    return Cell(
        name,
        base,
        list(axes),
        list(axes.values()),
        bare.search.extend,
        n_params,
        base.budget.tokens,
        flops,
        rungs,
    )


def write_notes(found: Sequence[Cell], stem: Path) -> None:
    """What was said of the cells, in `NAME.search.txt`."""
    write_atomically(
        stem.with_name(stem.name + ".search.txt"),
        "".join(f"{note}\n" for cell in found for note in cell.notes),
    )
