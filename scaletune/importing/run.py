"""A run as any tracker leaves it: settings and histories by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Setting = float | str | None


@dataclass
class Run:
    """`config`: setting -> value, nested ones under dotted names; `history`: metric -> [(step, value)]."""

    name: str
    config: dict[str, Setting] = field(default_factory=dict)
    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)

    def put(self, settings: Mapping[str, Any], prefix: str = "") -> None:
        """Add settings; a table's under `table.key`."""
        for key, value in settings.items():
            if isinstance(value, Mapping):
                self.put(value, f"{prefix}{key}.")
            elif isinstance(value, (int, float, str)):
                self.config[f"{prefix}{key}"] = value

    def row(self) -> dict[str, Any]:
        """One line: the settings, the last value of each metric, and `steps`, the last step any of them has."""
        last = {key: values[-1][1] for key, values in self.history.items()}
        steps = max((step for values in self.history.values() for step, _ in values), default=0)
        return {"id": self.name, **self.config, **last} | (
            {"steps": steps} if steps and "steps" not in self.config else {}
        )


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
