"""`Prediction`: the optimum at one scale with its interval and near-optimal band."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

POINTS = {"lr": "peak", "batch_tokens": "tokens per step", "loss": "nats per token"}
"""The quantities that every prediction may hold, and their units."""
QUANTITIES = tuple(POINTS)


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law predicts at one scale. A quantity that the law does not give is None."""

    law: str
    """Id of the published law, or the law of the fit."""
    lr: float | None = None
    """Peak learning rate. For a fit to muP proxies: at the base width."""
    batch_tokens: float | None = None
    """Batch size in tokens per optimizer step."""
    loss: float | None = None
    """Held-out loss in nats per token."""
    weight_decay: float | None = None
    """Weight decay. Only a joint law whose runs varied it gives one."""
    interval: dict[str, list[float] | None] = field(default_factory=dict)
    """Quantity -> [low, high], the interval of the optimum at the level of the fit (95 %)."""
    band: dict[str, list[float] | None] = field(default_factory=dict)
    """Quantity -> [low, high], the values whose loss is within 0.25 % of the best loss."""
    warnings: list[str] = field(default_factory=list)
    """Sentences on what makes the prediction uncertain."""
    values: dict[str, float | None] = field(default_factory=dict)
    """Other quantities that the law gives."""
    units: dict[str, str] = field(default_factory=dict)
    """The unit of each entry of `values`."""

    def to_dict(self) -> dict[str, Any]:
        """Plain values; `weight_decay`, `values` and `units` only where a law gives them."""
        return {
            name: value
            for name, value in asdict(self).items()
            if value or name not in ("weight_decay", "values", "units")
        }
