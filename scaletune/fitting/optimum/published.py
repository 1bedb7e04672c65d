"""The spread of the exponents of the optimal lr between published laws.

A fit that does not measure an exponent keeps it at 0, and its intervals at another value of the
column carry this spread, as root mean squares about 0: published exponents have both signs, and
the optimal lr of muP hardly depends on the size (arXiv:2203.03466).

| effect on lr | published exponents |
|---|---|
| n_params at fixed tokens | -0.71 Step Law, -0.23 Björck, -0.81 joint MoE, 0 muP |
| tokens at fixed n_params | +0.31 Step Law, -0.32 Björck, -0.3 to -0.7 its horizon rule |
| both in proportion | -0.41 Step Law, -0.55 Björck, -0.36 Porian, 2 (-0.125) DeepSeek |
| both in proportion | 2 (-0.057) Moonlight, 2 (-0.153) Ling, 0 MiniCPM (muP, arXiv:2404.06395) |
| batch_tokens | 0.5 square-root rule, 1 linear below the noise scale and 0 above it, McCandlish |
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from scaletune import laws

COLUMNS = ("n_params", "tokens", "batch_tokens")
MUP = 0.0
"""Exponent of n_params in muP, where the best lr stays."""

Array = NDArray[np.float64]


def published_exponents() -> dict[str, list[float]]:
    """Exponents of lr in each column, and "along" for n_params and tokens in proportion."""

    def of(law_id: str, *names: str) -> list[float]:
        return [laws.law(law_id).coefficients[name] for name in names]

    step_n, step_d = of("steplaw_lr_bs", "a_N", "a_D")
    bjorck_n, bjorck_d = (-value for value in of("bjorck_lr", "a", "b"))
    by_compute = ("deepseek_lr_bs", "moonlight_lr_bs", "ling_moe_lr_bs")
    return {
        "n_params": [step_n, bjorck_n, *of("jointmoe_lr", "a"), MUP],
        "tokens": [
            *(step_d, bjorck_d),
            *(-value for value in laws.law("bjorck_horizon_rule").intervals["b"]),
        ],
        "along": [
            *(step_n + step_d, bjorck_n + bjorck_d),
            *of("porian_lr_bs", "a"),
            *(2 * of(name, "a")[0] for name in by_compute),
            MUP,
        ],
        "batch_tokens": [0.5, 1.0, 0.0],
    }


def published_covariance() -> Array:
    """(3, 3) covariance of the exponents of COLUMNS about 0.

    n_params and tokens are correlated, because laws agree better on their sum.
    """
    square = {
        name: float(np.mean(np.square(values))) for name, values in published_exponents().items()
    }
    covariance = np.diag([square[name] for name in COLUMNS])
    covariance[0, 1] = covariance[1, 0] = (
        square["along"] - square["n_params"] - square["tokens"]
    ) / 2
    return covariance


def describe_spread(columns: list[str]) -> str:
    """The sd and range of the published exponents of these columns, for a sentence."""
    exponents = published_exponents()
    return " and ".join(
        f"±{math.sqrt(np.mean(np.square(exponents[name]))):.2f} in `{name}`"
        f" ({min(exponents[name]):.2g} to {max(exponents[name]):.2g})"
        for name in columns
    )
