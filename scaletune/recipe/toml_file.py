"""Reads recipe files (TOML) and applies `--set` overrides."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from scaletune import huggingface
from scaletune.errors import UserError
from scaletune.recipe.data import NAMED_SOURCES
from scaletune.recipe.placeholder_values import require_stated
from scaletune.recipe.points import (
    comparison_recipe,
    dotted_path,
    points,
    set_path,
    with_settings,
)
from scaletune.recipe.study import Recipe
from scaletune.recipe.validation import validate_recipe

PATHS = (
    *(".data.source", ".data.tokenizer", ".model.hf", ".hardware.calibration"),
    ".trainer.folder",
)
"""Keys that may hold a path relative to the recipe file."""


def parse_setting(text: str) -> tuple[str, Any]:
    """`a.b=c` of the command line -> (path, value). The value is TOML; a bare word is a string."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"`--set` must look like a.b=c, but got {text!r}")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value


def load(
    path: str | Path, settings: Iterable[str] = (), values: Mapping[str, Any] | None = None
) -> Recipe:
    """Reads a recipe file.

    Args:
        path: Path of the recipe file. Files that it names are relative to it.
        settings: Overrides `a.b=c`.
        values: Further overrides, dotted path -> value.

    Returns:
        The recipe. Every combination of its axes and comparisons is valid.

    Raises:
        UserError: The file is missing, is not TOML, or breaks a rule.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the recipe file must exist, but got `{path}`")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        hint = ": put a regular expression into single quotes" if "Unescaped" in str(error) else ""
        raise UserError(f"`{path}` must be TOML, but {error}{hint}") from None
    for setting in settings:
        name, value = parse_setting(setting)
        set_path(content, dotted_path(name), value)
    for name, value in (values or {}).items():
        set_path(content, name, value)
    try:
        content = _read_architecture(_resolve_paths(content, path.parent))
        content = _note_folder(content, path.parent)
        recipe = validate_recipe(content, path.stem)
        require_stated(recipe, is_target=not (recipe.axes or recipe.cells))
        for sweep in (recipe, *(comparison_recipe(recipe, other) for other in recipe.compare)):
            points(sweep)  # every combination must be valid before anything is trained
        with_settings(recipe, recipe.holdout.set if recipe.holdout else {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe


def _read_architecture(content: dict[str, Any]) -> dict[str, Any]:
    """Replaces `model.hf`, a Hugging Face config.json, by the model that it describes.

    Other keys of `model` replace those of the config, except its vocabulary.
    """
    model, data = content.get("model"), content.get("data", {})
    if not isinstance(model, dict) or "hf" not in model:
        return content
    if not isinstance(model["hf"], str):
        raise UserError(f"`model.hf` must be the path of a config.json, but got {model['hf']!r}")
    table, vocab_size, notes = huggingface.read(model["hf"])
    own = {key: value for key, value in model.items() if key != "hf"}
    notes += [
        f"`model.{key}` {value!r} is set in the target and replaces the config's"
        for key, value in own.items()
    ]
    evidence = {"architecture": notes} | content.get("evidence", {})
    return content | {
        "model": table | own,
        "data": {"vocab_size": vocab_size} | data,
        "evidence": evidence,
    }


def _note_folder(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Where `model.build` is searched first: the folder of the recipe file."""
    model, trainer = content.get("model"), content.get("trainer", {})
    if not (isinstance(model, dict) and "build" in model and isinstance(trainer, dict)):
        return content
    return content | {"trainer": {"import_from": [str(folder.absolute())], **trainer}}


def _resolve_paths(content: Any, folder: Path, where: str = "") -> Any:
    """Makes paths that a recipe names relative to its folder, if they exist there.

    Axes and comparisons included; other paths stay relative to the working folder.
    """
    if isinstance(content, dict):
        return {
            key: _resolve_paths(value, folder, f"{where}.{key}") for key, value in content.items()
        }
    if isinstance(content, list):
        return [_resolve_paths(value, folder, where) for value in content]
    is_path = where.endswith(PATHS) and isinstance(content, str)
    if is_path and content not in (*NAMED_SOURCES, "bytes") and (folder / content).exists():
        return str(folder / content)
    return content
