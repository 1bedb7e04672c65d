"""A recipe from what public functions accept: a file or a `Recipe`, with overrides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from scaletune.recipe.points import with_settings
from scaletune.recipe.study import Recipe
from scaletune.recipe.toml_file import load, parse_setting


def resolve_recipe(
    source: str | Path | Recipe, settings: Sequence[str] = (), function: str = ""
) -> Recipe:
    """The recipe of a file, or the given one, with overrides such as "model.depth=4".

    `function` is the name of a function that trains, in place of what the `trainer` table says.
    """
    others = {"trainer.command": [], "trainer.external": False}
    own = others | {"trainer.function": function} if function else {}
    if not isinstance(source, Recipe):
        return load(source, settings, own)
    overrides = dict(map(parse_setting, settings)) | own
    return with_settings(source, overrides) if overrides else source
