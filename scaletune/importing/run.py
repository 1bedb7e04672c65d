"""`ImportedRun`: one run as a tracker stores it, with its settings and its metrics by step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Setting = float | str | None


@dataclass
class ImportedRun:
    """One training run read from the files of a tracker."""

    name: str
    """Name or id of the run."""

    config: dict[str, Setting] = field(default_factory=dict)
    """Settings by name; nested ones have dotted names."""

    history: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """(step, value) pairs of each metric, in order."""

    def add_settings(self, settings: Mapping[str, Any], prefix: str = "") -> None:
        """Adds settings; those of a nested table as `table.key`."""
        for key, value in settings.items():
            if isinstance(value, Mapping):
                self.add_settings(value, f"{prefix}{key}.")
            elif isinstance(value, (int, float, str)):
                self.config[f"{prefix}{key}"] = value

    def row(self) -> dict[str, Any]:
        """The run as a table row: its settings, the last value of each metric, and `steps`.

        `steps` is the last step of any metric, unless it is a setting.
        """
        last = {key: values[-1][1] for key, values in self.history.items()}
        steps = max((step for values in self.history.values() for step, _ in values), default=0)
        row = {"id": self.name, **self.config, **last}
        return row | {"steps": steps} if steps and "steps" not in self.config else row


def to_number(value: Any) -> float | None:
    """The value as a float; None if it is not a number."""
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None
