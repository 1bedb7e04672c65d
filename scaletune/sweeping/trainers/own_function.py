"""A function of the user that trains: by its name where other processes can import it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.recipe import Recipe, load, validate_recipe, with_settings
from scaletune.recipe.resolve import resolve_recipe
from scaletune.recipe.toml_file import parse_setting
from scaletune.sweeping.engines.forked_worker import function_name, import_path, is_importable

if TYPE_CHECKING:
    from scaletune.sweeping.trainers.start import Train


def resolve_own(
    source: str | Path | Recipe,
    settings: Sequence[str],
    train: Train | None,
    build: Callable[..., object] | None = None,
) -> tuple[Recipe, Train | None]:
    """The recipe with a function that trains or builds the model.

    Returns:
        The recipe, and the function if workers must be forked to have it.

    Raises:
        UserError: `train` or `build` is not a function, or both are given.
    """
    if build is not None:
        if train is not None:
            raise UserError("a sweep must have either `train` or `build`, but got both")
        return resolve_build(source, settings, build)
    if train is None:
        return resolve_recipe(source, settings), None
    if not callable(train):
        raise UserError(
            "`train` must be a function that takes a trial and returns its loss, but got"
            f" {type(train).__name__}"
        )
    recipe = resolve_recipe(source, settings, function_name(train))
    if not is_importable(train):
        return recipe, train
    env = {"PYTHONPATH": import_path()} | recipe.trainer.env
    trainer = recipe.trainer.model_copy(update={"env": env})
    return validate_recipe({**dict(recipe), "trainer": trainer}, recipe.name), None


def resolve_build(
    source: str | Path | Recipe, settings: Sequence[str], build: Callable[..., object]
) -> tuple[Recipe, Train | None]:
    """The recipe with a function that builds the model, and the function if workers must be forked.

    Raises:
        UserError: `build` is not a function, or is one inside another function.
    """
    name = function_name(build) if callable(build) else ""
    if not name or "<" in name:
        raise UserError(
            "`build` must be a function at the top level of a module, script or notebook, but got"
            f" {name or type(build).__name__}"
        )
    importable = is_importable(build)
    own = {"model.build": name}
    if isinstance(source, Recipe):
        recipe = with_settings(source, dict(map(parse_setting, settings)) | own)
    else:
        recipe = load(source, settings, own)
    if not importable:
        return recipe, build
    folders = [*recipe.trainer.import_from, *import_path().split(os.pathsep)]
    trainer = recipe.trainer.model_copy(update={"import_from": list(dict.fromkeys(folders))})
    return validate_recipe({**dict(recipe), "trainer": trainer}, recipe.name), None
