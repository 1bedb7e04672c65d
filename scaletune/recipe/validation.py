"""Plain values -> `Recipe`, or one sentence on the first thing that is wrong."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from pydantic import ValidationError

from scaletune.errors import UserError, nearest
from scaletune.recipe.study import Recipe
from scaletune.sections import Section
from scaletune.zoo import FAMILIES

SHORT = {  # a contract column -> where a recipe keeps it
    "width": "model.width", "depth": "model.depth", "lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "tokens": "budget.tokens", "batch_tokens": "budget.batch_tokens", "seq_len": "data.seq_len", "seed": "seed",
    "form": "parametrization.form",
}  # fmt: skip


def _table(annotation: Any) -> type[Section] | None:
    """The section that a field holds as X, X | None or list[X]."""
    return next(
        (
            part
            for part in (annotation, *get_args(annotation))
            if isinstance(part, type) and issubclass(part, Section)
        ),
        None,
    )


def _known(location: Iterable[Any]) -> Iterable[str]:
    """The keys of the table at a pydantic location."""
    section: type[Section] | None = Recipe
    for part in location:
        if isinstance(part, str) and part[1:-1] in FAMILIES and part.startswith("["):
            section = FAMILIES[part[1:-1]]
        elif section and isinstance(part, str):
            section = (
                _table(section.model_fields[part].annotation)
                if part in section.model_fields
                else None
            )
    return section.model_fields if section else ()


def _where(error: Mapping[str, Any]) -> str:
    """The dotted path of a pydantic error, without the names of a union's members."""
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
    """One line on the first pydantic error, a misspelt key before all: the rule, the value, the nearest valid name."""
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    path, got = _where(error), error.get("input")
    if error["type"] == "extra_forbidden":
        key = path.split(".")[-1]
        return f"unknown key `{path}`" + (
            f" (nearest: {SHORT[key]!r})"
            if key in SHORT
            else nearest(key, _known(error["loc"][:-1]))
        )
    if error["type"] == "union_tag_invalid":
        family = error["input"]["family"]
        return f"`{path}.family` must be one we know, but got {family!r}{nearest(str(family), FAMILIES)}"
    if error["type"] == "missing":
        return f"`{path}` must be given"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    rules = " or ".join(_rule(other) for other in errors if _where(other) == path)
    hint = (
        "; write the number without quotes"
        if _quoted_number(got) and ("number" in rules or "integer" in rules)
        else ""
    )
    return f"`{path}` must be {rules}, but got {got!r}{hint}"


def validated(content: Mapping[str, Any], name: str) -> Recipe:
    """A Recipe from plain values; UserError with one sentence on the first thing that is wrong."""
    try:
        return Recipe.model_validate({"name": name, **content})
    except ValidationError as error:
        raise UserError(_sentence(error.errors())) from None
