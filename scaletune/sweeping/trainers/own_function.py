"""A function of the user that trains: by its name where other processes can import it."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from scaletune.errors import UserError
from scaletune.recipe import Recipe, validate_recipe
from scaletune.recipe.resolve import resolve_recipe
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
    recipe = resolve_recipe(source, settings, trained_by(train))
    if not is_importable(train):
        return recipe, train
    env = {"PYTHONPATH": import_path()} | recipe.trainer.env
    trainer = recipe.trainer.model_copy(update={"env": env})
    return validate_recipe({**dict(recipe), "trainer": trainer}, recipe.name), None


def trained_by(train: Train) -> dict[str, Any]:
    """The settings that make a function the trainer, in place of what the `trainer` table says."""
    return {
        "trainer.command": [],
        "trainer.external": False,
        "trainer.function": function_name(train),
    }


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
    recipe = resolve_recipe(source, settings, {"model.build": name})
    if not is_importable(build):
        return recipe, build
    folders = [*recipe.trainer.import_from, *import_path().split(os.pathsep)]
    trainer = recipe.trainer.model_copy(update={"import_from": list(dict.fromkeys(folders))})
    return validate_recipe({**dict(recipe), "trainer": trainer}, recipe.name), None
