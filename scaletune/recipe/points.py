"""The points of a recipe, settings that override them, and the identity of a trial."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.recipe.short_names import SHORT_NAMES
from scaletune.recipe.study import POINT_SECTIONS, Compare, Recipe
from scaletune.recipe.validation import validate_recipe
from scaletune.records import digest
from scaletune.sections import Section
from scaletune.zoo import OwnConfig

DATA_SOURCE_KEYS = (
    *("source", "format", "epochs", "dtype", "tokenizer", "column"),
    *("separator", "subset", "limit", "cache", "power_law"),
)
"""Keys of `data` that say how data are found and read. The identity of a trial contains the digest
of the data in their place."""


PLACES = ("source", "tokenizer", "cache")
"""Keys of `data` that may be paths."""


def dotted_path(name: str) -> str:
    """The dotted path of a column name, recipe key or path; UserError with the nearest name."""
    if name in SHORT_NAMES or name in Recipe.model_fields or "." in name:
        return SHORT_NAMES.get(name, name)
    raise UserError(
        f"unknown setting `{name}`{nearest(name, SHORT_NAMES)}; any setting can be named by its"
        " dotted path, such as `optimizer.beta2`"
    )


def set_path(content: dict[str, Any], path: str, value: Any) -> None:
    """Sets `content[a][b] = value` for the path `a.b`.

    What follows `axes.` is one name, with or without the quotes of a file.
    """
    *tables, key = ["axes", path[5:].strip("\"'")] if path.startswith("axes.") else path.split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise UserError(f"`{path}` cannot be set, because `{table}` is not a table")
    content[key] = value


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with settings replaced, validated again.

    Args:
        recipe: The recipe.
        settings: Column name or dotted path -> value. A later setting may reach into a table that
            an earlier one gives.

    Returns:
        The new recipe. Another `model.family` resets the options of the model to its defaults.

    Raises:
        UserError: A setting is unknown, or the result is not valid.
    """
    content: dict[str, Any] = dict(recipe)
    if "model.family" in settings:
        content["model"] = recipe.model.model_dump(exclude_defaults=True)
    for name, value in settings.items():
        path = dotted_path(name)
        table, dot, _ = path.partition(".")
        if dot and table in content and content[table] is getattr(recipe, table, None):
            content[table] = _plain_copy(content[table])
        set_path(content, path, copy.deepcopy(value))
    return validate_recipe(content, recipe.name)


def _plain_copy(value: Any) -> Any:
    """A copy of a table that settings can be written to."""
    return (
        value.model_dump(exclude_unset=True) if isinstance(value, Section) else copy.deepcopy(value)
    )


def points(recipe: Recipe) -> list[Recipe]:
    """One validated recipe without axes for each combination of the axes, in each cell if any."""
    bare = recipe.model_copy(update={"axes": {}, "cells": []})
    return [
        with_settings(bare, settings)
        for cell in recipe.cells or [{}]
        for settings in _combinations(cell_axes(cell, recipe.axes))
    ]


def cell_axes(cell: Mapping[str, Any], axes: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The axes of one cell and of the sweep; UserError when both set a key, or a list is empty."""
    swept = {dotted_path(name) for name in axes}
    for name, value in cell.items():
        if dotted_path(name) in swept:
            raise UserError(f"`{name}` must be set by `axes` or by a cell, but got both")
        if value == []:
            raise UserError(f"a setting of a cell must have a value, but got {name}=[]")
    own = {name: value if isinstance(value, list) else [value] for name, value in cell.items()}
    return own | dict(axes)


def _combinations(axes: Mapping[str, list[Any]]) -> Iterable[dict[str, Any]]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def comparison_recipe(recipe: Recipe, other: Compare) -> Recipe:
    """The sweep of one comparison: the recipe with its settings and axes."""
    return with_settings(recipe, {"axes": {**recipe.axes, **other.axes}, **other.set})


def trial_id(recipe: Recipe, data_digest: str) -> str:
    """A trial's id: the digest of the settings of its point that differ from the defaults.

    The digest of the data replaces the keys that say where they are. A new option whose default
    changes nothing therefore leaves the ids of recorded trials unchanged. Of a foreign trainer:
    what the recipe states, and the template of its command or the name of its function.
    """
    if recipe.foreign:
        point = recipe.point()
        # where data are is no part of the identity
        places = {key: Path(v).name for key, v in point.get("data", {}).items() if key in PLACES}
        return digest(point | ({"data": point["data"] | places} if places else {}))
    point = recipe.model_dump(include=set(POINT_SECTIONS), exclude_defaults=True)
    kinds = {
        "family": recipe.model.family,
        "optimizer": recipe.optimizer.family,
        "schedule": recipe.schedule.kind,
    }
    kept = {key: v for key, v in point.get("data", {}).items() if key not in DATA_SOURCE_KEYS}
    own = {name: v for name, v in recipe.point().items() if name in ("my", "trainer")}
    if isinstance(recipe.model, OwnConfig):
        own["model"] = recipe.model.model_dump(exclude_unset=True)  # no depth: the function's own
        kinds |= {"init": "own"} if recipe.keeps_own_init else {}
    return digest({**point, "data": kept | {"digest": data_digest}, "kinds": kinds, **own})
