"""A function of the user that trains: by its name where other processes can import it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.recipe import Recipe, validate_recipe
from scaletune.recipe.resolve import resolve_recipe
from scaletune.sweeping.engines.forked_worker import function_name, import_path, is_importable

if TYPE_CHECKING:
    from scaletune.sweeping.trainers.start import Train


def resolve_own(
    source: str | Path | Recipe, settings: Sequence[str], train: Train | None
) -> tuple[Recipe, Train | None]:
    """The recipe with a function as its trainer, and the function if it must be forked.

    Raises:
        UserError: `train` is not a function.
    """
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
