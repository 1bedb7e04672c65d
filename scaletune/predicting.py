"""The optimum at a target scale, from a published law or from a fit of ours: the point, its interval, the near-optimal band."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from scaletune.records import Fit


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """What a law says at one scale. A quantity the law does not give is None."""

    law: str
    lr: float | None = None  # peak; for a fit on muP proxies: at base width
    batch_tokens: float | None = None  # tokens per optimizer step
    loss: float | None = None  # nats per token
    interval: dict[str, list[float] | None] = field(default_factory=dict)  # quantity -> [lo, hi]; how sure the law is of its optimum
    band: dict[str, list[float] | None] = field(default_factory=dict)  # quantity -> [lo, hi]; where the loss is within 0.25 % of the optimum's
    warnings: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def from_fit(fit: Fit, *, n_params: float, tokens: float, batch_tokens: float | None = None) -> Prediction:
    """The fitted law at (n_params, tokens)."""
    raise NotImplementedError


def from_law(law_id: str, *, n_params: float, tokens: float, batch_tokens: float | None = None) -> Prediction:
    """A published law at (n_params, tokens)."""
    raise NotImplementedError
