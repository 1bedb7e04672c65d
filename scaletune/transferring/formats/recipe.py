"""Writes the target as a scaletune recipe (TOML), and the plan as plan.json.

`scaletune count`, `check` and `sweep` read the recipe. Its `[evidence]` holds the interval and the
assumptions; plan.json has the settings of each tensor, independent of any stack.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletune.recipe import Recipe
from scaletune.records import write_atomically
from scaletune.transferring.own_target import knows_tensors
from scaletune.transferring.target import Transfer

BARE = re.compile(r"[A-Za-z0-9_-]+")
"""A key that TOML reads without quotes."""


def _value(value: Any) -> str:
    """A TOML value: strings, numbers, booleans and lists are as in JSON; tables are inline."""
    if not isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    pairs = (f"{json.dumps(key)} = {_value(v)}" for key, v in value.items() if v is not None)
    return "{ " + ", ".join(pairs) + " }"


def _pairs(content: Mapping[str, Any]) -> list[str]:
    return [
        f"{key if BARE.fullmatch(key) else json.dumps(key, ensure_ascii=False)} = {_value(value)}"
        for key, value in content.items()
        if value is not None
    ]


def toml(content: Mapping[str, Any]) -> str:
    """Formats a recipe's plain values as TOML.

    Top-level values come first, then one table per section. None is left out.
    """
    tables = {key: value for key, value in content.items() if isinstance(value, Mapping)}
    lines = _pairs({key: value for key, value in content.items() if key not in tables})
    for name, table in tables.items():
        if table:
            lines += ["", f"[{name}]", *_pairs(table)]
    return "\n".join(lines) + "\n"


def whole_point(recipe: Recipe) -> dict[str, Any]:
    """A point as plain values; of the user's own trainer also how it is started and read."""
    point = recipe.point()
    trainer = recipe.trainer.model_dump(exclude_defaults=True)
    if not trainer:
        return point
    engine = recipe.engine.model_dump(exclude_defaults=True)
    return point | {"trainer": trainer} | ({"engine": engine} if engine else {})


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes target.toml, and plan.json if the tensors are known."""
    e = transfer.evidence
    head = (
        f"# Written by scaletune {e['scaletune']} from fit {e['fit']} (law {e['law']});"
        " [evidence] has the interval and the assumptions.\n"
    )
    content = {"name": transfer.target.name, **whole_point(transfer.target), "evidence": e}
    write_atomically(folder / "target.toml", head + toml(content))
    if not knows_tensors(transfer.target):
        return [folder / "target.toml"]
    write_atomically(folder / "plan.json", json.dumps(transfer.to_dict(), indent=1) + "\n")
    return [folder / "target.toml", folder / "plan.json"]
