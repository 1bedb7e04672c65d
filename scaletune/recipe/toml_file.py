"""Recipe files."""

from __future__ import annotations

import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from scaletune import huggingface
from scaletune.errors import UserError
from scaletune.recipe.data import NAMED
from scaletune.recipe.points import at, compared, points, put, with_settings
from scaletune.recipe.study import Recipe
from scaletune.recipe.validation import validated


def parse_setting(text: str) -> tuple[str, Any]:
    """`a.b=c` of the command line -> (path, value); the value is TOML, and a bare word is a string."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"`--set` must look like a.b=c, but got {text!r}")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value


def load(path: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and put `a.b=c` settings over it. Files it names are relative to it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the recipe file must exist, but got `{path}`")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` must be TOML, but {error}") from None
    for setting in settings:
        where, value = parse_setting(setting)
        put(content, at(where), value)
    try:
        recipe = validated(_architecture(_beside(content, path.parent)), path.stem)
        for asked in (recipe, *(compared(recipe, other) for other in recipe.compare)):
            points(asked)  # every combination must be valid before anything is trained
        with_settings(recipe, recipe.holdout.set if recipe.holdout else {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe


def _architecture(content: dict[str, Any]) -> dict[str, Any]:
    """`model.hf`, a config.json of Hugging Face, as the model it describes; keys beside it go over its own, but for its vocabulary's."""
    model, data = content.get("model"), content.get("data", {})
    if not isinstance(model, dict) or "hf" not in model:
        return content
    if not isinstance(model["hf"], str):
        raise UserError(f"`model.hf` must be the path of a config.json, but got {model['hf']!r}")
    read, vocab_size, said = huggingface.read(model["hf"])
    own = {key: value for key, value in model.items() if key != "hf"}
    said += [
        f"`model.{key}` {value!r} is the target's own, over the config's"
        for key, value in own.items()
    ]
    evidence = {"architecture": said} | content.get("evidence", {})
    return content | {
        "model": read | own,
        "data": {"vocab_size": vocab_size} | data,
        "evidence": evidence,
    }


def _beside(content: Any, folder: Path, where: str = "") -> Any:
    """Files and folders of data that a recipe names, in its axes and comparisons too, are relative to it, else to the working folder."""
    if isinstance(content, dict):
        return {key: _beside(value, folder, f"{where}.{key}") for key, value in content.items()}
    if isinstance(content, list):
        return [_beside(value, folder, where) for value in content]
    named = (
        where.endswith((".data.source", ".data.tokenizer", ".model.hf", ".hardware.calibration"))
        and isinstance(content, str)
        and content not in (*NAMED, "bytes")
    )
    return str(folder / content) if named and (folder / content).exists() else content
