"""Writes the target as a scaletune recipe (TOML), and the plan as plan.json.

`scaletune count`, `check` and `sweep` read the recipe. Its `[evidence]` holds the interval and the
assumptions; plan.json has the settings of each tensor, independent of any stack.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletune.records import write_atomically
from scaletune.transferring.target import Transfer


def _value(value: Any) -> str:
    """A TOML value: strings, numbers, booleans and lists are as in JSON; tables are inline."""
    if not isinstance(value, Mapping):
        return json.dumps(value, ensure_ascii=False)
    pairs = (f"{json.dumps(key)} = {_value(v)}" for key, v in value.items() if v is not None)
    return "{ " + ", ".join(pairs) + " }"


def _pairs(content: Mapping[str, Any]) -> list[str]:
    return [f"{key} = {_value(value)}" for key, value in content.items() if value is not None]


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


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """Writes target.toml and plan.json."""
    e = transfer.evidence
    head = (
        f"# Written by scaletune {e['scaletune']} from fit {e['fit']} (law {e['law']});"
        " [evidence] has the interval and the assumptions.\n"
    )
    content = {"name": transfer.target.name, **transfer.target.point(), "evidence": e}
    write_atomically(folder / "target.toml", head + toml(content))
    write_atomically(folder / "plan.json", json.dumps(transfer.to_dict(), indent=1) + "\n")
    return [folder / "target.toml", folder / "plan.json"]
