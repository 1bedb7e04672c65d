"""Loss basins of records: loss against learning rate, one curve per model size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaletune.fitting.own_records import own_rows
from scaletune.fitting.own_settings import mixed_settings
from scaletune.plotting.shared import COLORS, Curve

WIDEST = 24  # characters of a setting in a legend


def basin_curves(trials: pd.DataFrame) -> list[Curve]:
    """Mean loss over seeds against lr, one curve per size, with the range over seeds.

    A size is a width; where there is none, or where one width has several sizes, `n_params`. Own
    settings such as `my.dropout` that differ between runs of one size have curves of their own.
    """
    done = trials[trials["loss"].notna()]
    size = "width" if "width" in done and _names_size(done) else "n_params"
    names = [size, *mixed_settings(done, [size, "lr"])]
    curves = []
    for values, rows in done.groupby(names, dropna=False):
        loss = rows.groupby("lr")["loss"]
        x = np.array(sorted(rows["lr"].unique()), float)
        mean, low, high = (np.array(f(), float) for f in (loss.mean, loss.min, loss.max))
        first, *others = values
        label = f"{size.replace('n_params', 'parameters')} {first:g}"
        label += "".join(f", {n} {_short(v)}" for n, v in zip(names[1:], others, strict=True))
        curves.append(Curve(label, x, mean, low, high))
    return curves


def _names_size(trials: pd.DataFrame) -> bool:
    """Whether all runs of a width have one size."""
    if "n_params" not in trials:
        return True
    return bool((trials.groupby("width")["n_params"].nunique() <= 1).all())


def _short(value: Any) -> str:
    text = f"{value:g}" if isinstance(value, float | int) else str(value)
    return text if len(text) <= WIDEST else f"...{text[-WIDEST:]}"


def draw_basins(
    curves: Sequence[Curve],
    ax: Axes,
    title: str = "",
    x_label: str = "learning rate (peak, at base width)",
) -> Axes:
    """Draws loss against lr and marks the lowest point of each curve."""
    for curve, color in zip(curves, COLORS * 9, strict=False):
        ax.plot(curve.x, curve.y, "-o", color=color, ms=3, lw=1.4, label=curve.label)
        if curve.low is not None and curve.high is not None:
            ax.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, lw=0)
        best = int(curve.y.argmin())
        ax.plot(curve.x[best], curve.y[best], "*", color=color, ms=13, mec="black", mew=0.6)
    ax.set_xscale("log", base=2)
    ax.set(xlabel=x_label, title=title)
    ax.grid(alpha=0.25)
    return ax


def basins_figure(panels: dict[str, pd.DataFrame]) -> Figure:
    """Loss against lr, one panel per title (for example SP and muP), with one loss axis."""
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    curves = {name: basin_curves(trials) for name, trials in panels.items()}
    own = any(own_rows(trials).any() for trials in panels.values())
    labels = {"x_label": "learning rate"} if own else {}
    for ax, (name, drawn) in zip(axes, curves.items(), strict=True):
        draw_basins(drawn, ax, name, **labels)
    axes[0].set_ylabel("held-out loss" if own else "held-out loss, nats per token")
    lowest = [curve.y.min() for drawn in curves.values() for curve in drawn]
    if lowest:  # empty if all trials diverged
        axes[0].set_ylim(min(lowest) - 0.05, min(min(lowest) * 1.6, axes[0].get_ylim()[1]))
    for ax in reversed(axes):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
            break
    return figure
