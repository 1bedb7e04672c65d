"""The points of a recipe, and what identifies each."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterable, Mapping
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.recipe.study import POINT, Compare, Recipe
from scaletune.recipe.validation import SHORT, validated
from scaletune.records import digest
from scaletune.sections import Section

READ = (  # how the data are found and read: a trial's identity has the digest of what was read
    "source", "format", "epochs", "dtype", "tokenizer", "column", "separator", "subset", "limit", "cache", "power_law",
)  # fmt: skip


def at(path: str) -> str:
    """A short column name, a field of the recipe or a dotted path -> the dotted path; UserError with the nearest name."""
    if path in SHORT or path in Recipe.model_fields or "." in path:
        return SHORT.get(path, path)
    raise UserError(
        f"unknown setting `{path}`{nearest(path, SHORT)}; a dotted path such as `optimizer.beta2` names any setting"
    )


def put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set `content[a][b] = value` for the path `a.b`; what follows `axes.` is one name, quoted as in a file or not."""
    *tables, key = ["axes", path[5:].strip("\"'")] if path.startswith("axes.") else path.split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise UserError(f"`{path}` cannot be set: `{table}` is not a table")
    content[key] = value


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with `{short name or dotted path: value}` put in, validated again: the sections that are touched, and what ties sections together."""
    content: dict[str, Any] = dict(recipe)
    if "model.family" in settings:  # another family has other options
        content["model"] = recipe.model.model_dump(exclude_defaults=True)
    for path, value in settings.items():
        table, dot, _ = at(path).partition(".")
        if dot and table in content and content[table] is getattr(recipe, table, None):
            content[table] = _plain(content[table])
        put(
            content, at(path), copy.deepcopy(value)
        )  # a later setting may reach into a table given here
    return validated(content, recipe.name)


def _plain(value: Any) -> Any:
    """A table of its own to put settings into."""
    return value.model_dump() if isinstance(value, Section) else copy.deepcopy(value)


def points(recipe: Recipe) -> list[Recipe]:
    """One recipe without axes for each combination of the axes, in each cell if there are any; each validated by itself."""
    bare = recipe.model_copy(update={"axes": {}, "cells": []})
    return [
        with_settings(bare, settings)
        for cell in recipe.cells or [{}]
        for settings in _combinations(_ragged(cell, recipe.axes))
    ]


def _ragged(cell: Mapping[str, Any], axes: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The axes of one cell: its own, and the sweep's; UserError when one of its settings is an axis of the sweep or has no value."""
    swept = {at(name) for name in axes}
    for name, value in cell.items():
        if at(name) in swept:
            raise UserError(f"`{name}` must be set by `axes` or by a cell, but got both")
        if value == []:
            raise UserError(f"a setting of a cell must have a value, but got {name}=[]")
    return {
        name: value if isinstance(value, list) else [value] for name, value in cell.items()
    } | dict(axes)


def _combinations(axes: Mapping[str, list[Any]]) -> Iterable[dict[str, Any]]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def compared(recipe: Recipe, other: Compare) -> Recipe:
    """The sweep of one comparison: its settings put in, its axes in place of the recipe's."""
    return with_settings(recipe, {"axes": {**recipe.axes, **other.axes}, **other.set})


def identity(recipe: Recipe, data_digest: str) -> str:
    """A trial's id: the digest of what its point sets other than the defaults, with what the data holds in place of where it lies.

    So an option that is added later, at a default that changes nothing, leaves every recorded trial's id what it was.
    """
    point = recipe.model_dump(include=set(POINT), exclude_defaults=True)
    kinds = {
        "family": recipe.model.family,
        "optimizer": recipe.optimizer.family,
        "schedule": recipe.schedule.kind,
    }
    data = {key: value for key, value in point.get("data", {}).items() if key not in READ} | {
        "digest": data_digest
    }
    return digest({**point, "data": data, "kinds": kinds})
