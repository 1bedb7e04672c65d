"""The gradient noise scale, which predicts the critical batch size (arXiv:1812.06162, App. A.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.95
"""Decay of the moving averages per measurement."""


@dataclass
class GradientNoise:
    """Moving averages of unbiased estimates of |G|**2 and tr(Sigma).

    G is the gradient of the expected loss, Sigma the covariance of the gradient of one row. The
    ratio of two single estimates is biased, so each is averaged before their ratio is taken.
    """

    squared_gradient: float = 0.0
    """Average of |G|**2, not yet divided by `weight`."""

    variance: float = 0.0
    """Average of tr(Sigma) per row, not yet divided by `weight`."""

    weight: float = 0.0
    """Bias correction of the averages: 1 - DECAY**measurements."""

    def add(self, small: float, big: float, small_rows: int, big_rows: int) -> None:
        """Adds a measurement.

        |G|**2 = (B big - b small) / (B - b),  tr(Sigma) = (small - big) / (1/b - 1/B)
        (eqs. A.2 and A.3). Gradients that are not finite are ignored.

        Args:
            small: Mean squared norm of the gradients of the batches of b = `small_rows` rows.
            big: Squared norm of their mean, the gradient of B = `big_rows` rows.
            small_rows: Rows of a small batch.
            big_rows: Rows of all of them.
        """
        if not (math.isfinite(small) and math.isfinite(big)):
            return
        squared_gradient = (big_rows * big - small_rows * small) / (big_rows - small_rows)
        variance = (small - big) / (1 / small_rows - 1 / big_rows)
        self.squared_gradient = DECAY * self.squared_gradient + (1 - DECAY) * squared_gradient
        self.variance = DECAY * self.variance + (1 - DECAY) * variance
        self.weight = DECAY * self.weight + 1 - DECAY

    def metrics(self, seq_len: int) -> dict[str, float | None]:
        """The estimates, or {} without a measurement.

        Returns:
            "squared_gradient": |G|**2; "variance": tr(Sigma) per row; "critical_batch_tokens":
            B_simple = tr(Sigma) / |G|**2 rows times `seq_len`, or None if noise hides the gradient
            (an estimate is not positive).
        """
        if not self.weight:
            return {}
        signal, variance = self.squared_gradient / self.weight, self.variance / self.weight
        critical = seq_len * variance / signal if signal > 0 and variance > 0 else None
        return {"squared_gradient": signal, "variance": variance, "critical_batch_tokens": critical}
