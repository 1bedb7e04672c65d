"""A recipe from what public functions accept: a file or a `Recipe`, with overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scaletune.recipe.points import with_settings
from scaletune.recipe.study import Recipe
from scaletune.recipe.toml_file import load, parse_setting


def resolve_recipe(
    source: str | Path | Recipe,
    settings: Sequence[str] = (),
    values: Mapping[str, Any] | None = None,
) -> Recipe:
    """The recipe of a file, or the given one, with overrides such as "model.depth=4".

    `values` are further overrides, dotted path -> value.
    """
    if not isinstance(source, Recipe):
        return load(source, settings, values)
    overrides = dict(map(parse_setting, settings)) | dict(values or {})
    return with_settings(source, overrides) if overrides else source
