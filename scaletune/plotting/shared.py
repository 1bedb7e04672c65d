"""What all pictures share: colors, curves and points as data, tick labels, saving.

No global style and no pyplot: figures are created directly.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scaletune.units import human

COLORS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")  # color-blind safe
DPI = 130
CROWDED = 40  # a logarithmic axis that spans more than this factor is labeled at decades only

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Curve:
    """A line with an optional shaded interval: y against x, both positive."""

    label: str
    """Name in the legend."""

    x: Array
    """(n,) horizontal coordinates."""

    y: Array
    """(n,) vertical coordinates."""

    low: Array | None = None
    """(n,) lower end of the interval."""

    high: Array | None = None
    """(n,) upper end of the interval."""

    near: Array | None = None
    """(n, 2) near-optimal band."""


@dataclass(frozen=True)
class Points:
    """Measured values with optional intervals."""

    label: str
    """Name in the legend."""

    x: list[float]
    """Horizontal coordinates."""

    y: list[float]
    """Vertical coordinates."""

    low: list[float] = field(default_factory=list)
    """Lower ends of the intervals; empty for none."""

    high: list[float] = field(default_factory=list)
    """Upper ends of the intervals; empty for none."""


def tokens_label(tokens: float) -> str:
    """Formats a token budget: 102400 -> '102k tokens'."""
    return f"{human(tokens)} tokens"


def plain_ticks(ax: Axes) -> None:
    """Labels a logarithmic y axis with plain numbers, also between decades if they are few."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    ax.yaxis.set_minor_formatter((lambda value, _: f"{value:.3g}") if high < CROWDED * low else "")


def save(figure: Figure, path: Path) -> Path:
    """Writes a PNG, creates its folder, and returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path
