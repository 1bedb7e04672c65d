"""The keyword arguments with which `model.build` is called: those that its signature names."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

from scaletune.errors import UserError, nearest
from scaletune.recipe import Recipe
from scaletune.zoo import OwnConfig

RECIPE = "recipe"
"""A parameter of this name gets the whole `Recipe`."""
NOT_PASSED = ("family", "build", "n_params", "n_params_total")
"""Keys of `[model]` that are about the function, not for it."""


def own_config(recipe: Recipe) -> OwnConfig:
    """The `[model]` table of a recipe with `model.build`."""
    assert isinstance(recipe.model, OwnConfig)
    return recipe.model


def build_arguments(
    function: Callable[..., Any], recipe: Recipe, vocab_size: int, seed: int
) -> dict[str, Any]:
    """What the function is called with, out of `[model]`, `[my]` and what the data give.

    `**kwargs` gets the keys of `[model]`, and `recipe` the whole recipe. A parameter that nothing
    gives keeps its default.

    Raises:
        UserError: A parameter without default has no value, a name has two values, or the recipe
            states a key that the function does not take.
    """
    model = model_keys(recipe)
    given = _given(recipe, vocab_size, seed)
    parameters = signature_of(function)
    takes_all = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    named = {n: p for n, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)}
    known: dict[str, Any] = {RECIPE: recipe, **given, **recipe.my, **model}
    if "depth" in named and named["depth"].default is inspect.Parameter.empty:
        known.setdefault("depth", recipe.model.depth)
    _check_names(recipe, named)
    if known[RECIPE] is not recipe or RECIPE not in named:
        _check_read(recipe, named, takes_all)
    for name, parameter in named.items():
        if name not in known and parameter.default is inspect.Parameter.empty:
            raise UserError(
                f"`{own_config(recipe).build}` needs a value for its parameter `{name}`"
                f"{nearest(name, known)}: give `model.{name}` or `my.{name}`, or a default"
            )
    values = {name: known[name] for name in named if name in known}
    return (model if takes_all else {}) | values


def _given(recipe: Recipe, vocab_size: int, seed: int) -> dict[str, Any]:
    """What comes from the data. Of a foreign trainer's data, only what the recipe states."""
    values = {"vocab_size": vocab_size, "seq_len": recipe.data.seq_len}
    if recipe.foreign:
        values = {name: v for name, v in values.items() if recipe.states(f"data.{name}")}
    return {**values, "seed": seed}


def stated_vocab_size(recipe: Recipe, default: int) -> int:
    """The vocabulary of a foreign trainer's model: that of `[model]`, `[my]` or `[data]`."""
    extra = own_config(recipe).model_extra or {}
    for value in (extra.get("vocab_size"), recipe.my.get("vocab_size"), recipe.data.vocab_size):
        if isinstance(value, int):
            return value
    return default


def model_keys(recipe: Recipe) -> dict[str, Any]:
    """The keys of `[model]` that the function may take: `depth` only if the recipe states it."""
    keys = own_config(recipe).model_dump(exclude_unset=True, exclude=set(NOT_PASSED))
    return {"width": recipe.model.width, **keys}


def signature_of(function: Callable[..., Any]) -> Mapping[str, inspect.Parameter]:
    """The parameters of the user's function or class."""
    try:
        return inspect.signature(function).parameters
    except (TypeError, ValueError):
        raise UserError(
            f"`model.build` must name a function with a signature, but got {function!r}"
        ) from None


def _check_names(recipe: Recipe, named: Mapping[str, inspect.Parameter]) -> None:
    """UserError if a parameter could mean two things."""
    model = model_keys(recipe)
    for name in named.keys() & recipe.my.keys():
        if name in model or name == "seed":
            raise UserError(
                f"the parameter `{name}` of `{own_config(recipe).build}` must have one value, but"
                f" the recipe gives it twice: rename `my.{name}`"
            )


def _check_read(recipe: Recipe, named: Mapping[str, inspect.Parameter], takes_all: bool) -> None:
    """UserError if the function takes no width, or a stated key that it does not take.

    A foreign trainer may read the other keys itself.
    """
    build, model = own_config(recipe).build, {} if takes_all else model_keys(recipe)
    if "width" in model and "width" not in named:
        raise UserError(
            f"`{build}` must have a parameter `width`, which a sweep and the parametrization vary,"
            f" but it has {', '.join(named) or 'none'}"
        )
    if recipe.foreign:
        return
    for table, keys in (("model", model), ("my", recipe.my)):
        for name in keys:
            if name not in named:
                raise UserError(
                    f"`{build}` has no parameter `{name}`{nearest(name, named)}, so"
                    f" `{table}.{name}` would change nothing: add the parameter, or remove the key"
                )
