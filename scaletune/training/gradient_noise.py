"""The gradient-noise scale: how large a batch pays off (arXiv:1812.06162, App. A.1)."""

from __future__ import annotations

import math
from dataclasses import dataclass

DECAY = 0.95  # of the averages a measurement


@dataclass
class Noise:
    """Moving averages of unbiased estimates of |G|**2 and tr(Sigma): their ratio is biased, so each is averaged before it is taken.

    G: the gradient of the expected loss; Sigma: the covariance of a single row's gradient.
    """

    squared_gradient: float = 0.0  # |G|**2, not yet divided by `weight`
    variance: float = 0.0  # tr(Sigma) a row, likewise
    weight: float = 0.0  # what the averages have seen: 1 - DECAY**measurements

    def add(self, small: float, big: float, small_rows: int, big_rows: int) -> None:
        """Take in one step: the mean squared norm of the gradients of batches of `small_rows`, and that of their mean's, `big_rows`.

        |G|**2 = (B big - b small) / (B - b),  tr(Sigma) = (small - big) / (1/b - 1/B)   (eqs. A.2 and A.3)
        Gradients that are not finite, of a step that diverges, are left out.
        """
        if not (math.isfinite(small) and math.isfinite(big)):
            return
        found = (
            (big_rows * big - small_rows * small) / (big_rows - small_rows),
            (small - big) / (1 / small_rows - 1 / big_rows),
        )
        self.squared_gradient = DECAY * self.squared_gradient + (1 - DECAY) * found[0]
        self.variance = DECAY * self.variance + (1 - DECAY) * found[1]
        self.weight = DECAY * self.weight + 1 - DECAY

    def metrics(self, seq_len: int) -> dict[str, float | None]:
        """{"squared_gradient", "variance" (a row), "critical_batch_tokens": B_simple = tr(Sigma) / |G|**2 rows, times `seq_len`}.

        No critical batch where noise hides the gradient: an estimate of |G|**2 that is not above 0.
        """
        if not self.weight:
            return {}
        signal, variance = self.squared_gradient / self.weight, self.variance / self.weight
        critical = seq_len * variance / signal if signal > 0 and variance > 0 else None
        return {"squared_gradient": signal, "variance": variance, "critical_batch_tokens": critical}
