"""Validates plain values as a `Recipe`; an error is one sentence on the first problem."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from scaletune.errors import UserError, nearest
from scaletune.recipe.short_names import SHORT_NAMES
from scaletune.recipe.study import Recipe
from scaletune.sections import Section
from scaletune.zoo import FAMILIES


def _table(annotation: Any) -> type[Section] | None:
    """The section in an annotation X, X | None or list[X]."""
    parts = (annotation, *get_args(annotation))
    sections = (part for part in parts if isinstance(part, type) and issubclass(part, Section))
    return next(sections, None)


def _known_keys(location: Iterable[Any]) -> Iterable[str]:
    """The keys of the table at a pydantic location."""
    section: type[Section] | None = Recipe
    for part in location:
        if isinstance(part, str) and part[1:-1] in FAMILIES and part.startswith("["):
            section = FAMILIES[part[1:-1]]
        elif section and isinstance(part, str):
            field = section.model_fields.get(part)
            section = _table(field.annotation) if field else None
    return section.model_fields if section else ()


def _path(error: Mapping[str, Any]) -> str:
    """The dotted path of a pydantic error, without the names of union members."""
    return ".".join(str(part) for part in error["loc"] if "[" not in str(part))


def _rule(error: Mapping[str, Any]) -> str:
    if error["type"] == "too_short":
        return f"a list of at least {error['ctx']['min_length']}"
    return error["msg"].removeprefix("Input should be ")


def _quoted_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """One sentence on the first pydantic error, a misspelt key first.

    It gives the rule, the value, and the nearest valid name.
    """
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    path, value = _path(error), error.get("input")
    if error["type"] == "extra_forbidden":
        key = path.split(".")[-1]
        if key in SHORT_NAMES:
            return f"unknown key `{path}` (nearest: {SHORT_NAMES[key]!r})"
        return f"unknown key `{path}`{nearest(key, _known_keys(error['loc'][:-1]))}"
    if error["type"] == "union_tag_invalid":
        family = error["input"]["family"]
        hint = nearest(str(family), FAMILIES)
        return f"`{path}.family` must be a known family, but got {family!r}{hint}"
    if error["type"] == "missing":
        return f"`{path}` must be given"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    rules = " or ".join(_rule(other) for other in errors if _path(other) == path)
    needs_number = "number" in rules or "integer" in rules
    hint = "; write the number without quotes" if _quoted_number(value) and needs_number else ""
    return f"`{path}` must be {rules}, but got {value!r}{hint}"


def validate_recipe(content: Mapping[str, Any], name: str) -> Recipe:
    """A Recipe from plain values; UserError with one sentence on the first problem."""
    try:
        return Recipe.model_validate({"name": name, **content})
    except ValidationError as error:
        raise UserError(_sentence(error.errors())) from None
