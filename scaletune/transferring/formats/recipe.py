"""Our own recipe: the target as a TOML file that `scaletune count`, `check` and `sweep` read, evidence and neutral plan beside it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from scaletune.records import write_atomically
from scaletune.transferring import Transfer


def _value(value: Any) -> str:
    """A TOML value. JSON's strings, numbers, booleans and lists are TOML's; tables are written inline."""
    if isinstance(value, Mapping):
        return (
            "{ "
            + ", ".join(
                f"{json.dumps(key)} = {_value(v)}" for key, v in value.items() if v is not None
            )
            + " }"
        )
    return json.dumps(value, ensure_ascii=False)


def toml(content: Mapping[str, Any]) -> str:
    """A recipe's plain values as TOML: top-level values first, then a table for each section; None is left out."""
    top = [
        f"{key} = {_value(value)}"
        for key, value in content.items()
        if value is not None and not isinstance(value, Mapping)
    ]
    lines = list(top)
    for name, table in content.items():
        if isinstance(table, Mapping) and table:
            lines += [
                "",
                f"[{name}]",
                *(f"{key} = {_value(value)}" for key, value in table.items() if value is not None),
            ]
    return "\n".join(lines) + "\n"


def emit(transfer: Transfer, folder: Path) -> list[Path]:
    """`target.toml` and `plan.json`."""
    e = transfer.evidence
    head = f"# Transferred by scaletune {e['scaletune']} from fit {e['fit']} (law {e['law']}); see [evidence] for the interval and what is assumed.\n"
    point = transfer.target.point() | {"evidence": e}
    content = {"name": transfer.target.name} | point
    write_atomically(folder / "target.toml", head + toml(content))
    write_atomically(folder / "plan.json", json.dumps(transfer.neutral(), indent=1) + "\n")
    return [folder / "target.toml", folder / "plan.json"]
