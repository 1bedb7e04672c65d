"""Builds the module of a recipe point with `model.build`.

The user's function draws from torch's random generator, seeded with the trial's seed; the state of
the generator is restored afterwards.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from scaletune.errors import UserError
from scaletune.models.own import hf
from scaletune.models.own.arguments import build_arguments, own_config, signature_of
from scaletune.models.own.source import describe, importable, load_function
from scaletune.recipe import Recipe, with_settings
from scaletune.zoo import HF_PREFIX


@dataclass(frozen=True)
class OwnSize:
    """What a module is built at, in place of the recipe's values."""

    width: int | None = None
    depth: int | None = None
    seed: int | None = None


def import_folders(recipe: Recipe) -> list[str]:
    """Folders that `model.build` is searched in: the recipe's and the working folders."""
    folders = [*recipe.trainer.import_from, recipe.trainer.folder, os.getcwd()]
    return list(dict.fromkeys(os.path.abspath(folder) for folder in folders if folder))


def build_module(
    recipe: Recipe,
    vocab_size: int,
    size: OwnSize | None = None,
    *,
    text: bool = True,
    meta: bool = False,
) -> nn.Module:
    """The user's module at a point, as his constructor initialises it.

    Args:
        recipe: A recipe point with `model.build`.
        vocab_size: Number of tokens or classes; 1 for a regression.
        size: Another width, depth or seed than the recipe's.
        text: Whether the inputs are tokens.
        meta: Build on the meta device, without memory; on the CPU where the code does not allow it.

    Raises:
        UserError: The function does not exist, misses an argument, fails, or returns no module.
    """
    point = _resized(recipe, size or OwnSize())
    build = own_config(point).build
    with importable(folders := import_folders(point)):
        try:
            module = _call(_maker(point, vocab_size, text, folders), point.seed, meta)
        except UserError:
            raise
        except Exception as error:  # whatever the user's code raises
            raise UserError(
                f"`{build}` must build a module at width {point.model.width}, but it raised"
                f" {describe(error)}"
            ) from error
    if not isinstance(module, nn.Module):
        raise UserError(
            f"`{build}` must return an nn.Module, but it returned {type(module).__name__}"
        )
    if not any(p.requires_grad for p in module.parameters()):
        raise UserError(f"`{build}` must return a module with parameters to train, but it has none")
    return module


def _resized(recipe: Recipe, size: OwnSize) -> Recipe:
    values = {"width": size.width, "depth": size.depth, "seed": size.seed}
    changed = {name: v for name, v in values.items() if v is not None}
    return with_settings(recipe, changed) if changed else recipe


def _maker(point: Recipe, vocab_size: int, text: bool, folders: list[str]) -> Any:
    """A function without arguments that builds the module."""
    if own_config(point).build.startswith(HF_PREFIX):
        config = hf.resized_config(hf.read_config(point, folders), point, vocab_size, text)
        return lambda: hf.build_hf(config, text)
    function = load_function(own_config(point).build, folders)
    values = build_arguments(function, point, vocab_size, point.seed)
    return lambda: function(**values)


def _call(maker: Any, seed: int, meta: bool) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if meta:
            try:
                with torch.device("meta"):
                    return maker()
            except Exception:  # code that reads values: they exist on the CPU only
                torch.manual_seed(seed)
        return maker()


def built_size(recipe: Recipe) -> tuple[int, int]:
    """(width, depth) of the module: a depth that the recipe does not state is the function's own
    default, or that of the Hugging Face config.
    """
    model = own_config(recipe)
    if "depth" in model.model_fields_set or not model.build:
        return model.width, model.depth
    with importable(folders := import_folders(recipe)):
        if model.build.startswith(HF_PREFIX):
            return model.width, hf.config_depth(hf.read_config(recipe, folders))
        parameters = signature_of(load_function(model.build, folders))
    depth = parameters["depth"].default if "depth" in parameters else model.depth
    return model.width, depth if isinstance(depth, int) and depth > 0 else model.depth
