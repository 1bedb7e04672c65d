"""Fits of the optimum: law, settings and held-out settings against model size, and the loss basin.

`law_curve`, `cell_points` and `basin_contour` give arrays; `draw_law` and `draw_contour` draw them.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from scaletune.fitting.table import levels
from scaletune.plotting.shared import COLORS, Array, Curve, Points, plain_ticks, tokens_label
from scaletune.predicting import from_fit
from scaletune.records import Fit
from scaletune.surface.basin import basin_excess
from scaletune.units import human

AXIS = {
    "lr": "optimal learning rate",
    "batch_tokens": "optimal batch size, tokens",
    "loss": "loss at the optimum, nats per token",
}
LEVELS = (0.25, 0.5, 1.0, 2.0, 4.0)  # % above the minimum loss at which contours are drawn


def law_curve(
    fit: Fit, tokens: float, quantity: str = "lr", n_params: Sequence[float] = ()
) -> Curve:
    """The law's lr, batch size or loss at one token budget against n_params, with its interval.

    The curve extends from the smallest proxy to the largest of the proxies and `n_params`.
    """
    low, high = fit.ranges["n_params"]
    x = np.geomspace(low * 0.8, max([high, *n_params]) * 1.3, 60)
    predictions = [from_fit(fit, n_params=float(n), tokens=tokens) for n in x]
    y = np.array([getattr(p, quantity) for p in predictions], float)
    bounds = np.array([p.interval[quantity] or (math.nan, math.nan) for p in predictions], float)
    has_band = predictions[0].band[quantity]
    near = np.array([p.band[quantity] for p in predictions], float) if has_band else None
    return Curve(tokens_label(tokens), x, y, bounds[:, 0], bounds[:, 1], near)


def horizons_of(cells: Sequence[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """Groups cells by token budget; budgets that differ by rounding only are one group."""
    if not cells:
        return {}
    numbers = levels(np.array([cell["tokens"] for cell in cells])).tolist()
    groups: dict[int, list[dict[str, Any]]] = {}
    for number, cell in sorted(zip(numbers, cells, strict=True), key=lambda pair: pair[0]):
        groups.setdefault(int(number), []).append(cell)
    return {min(cell["tokens"] for cell in group): group for group in groups.values()}


def cell_points(cells: Sequence[dict[str, Any]], quantity: str = "lr") -> list[Points]:
    """Measured optima (or minimum losses), one set per token budget, +- 1.96 standard errors."""
    sets = []
    for tokens, group in horizons_of(cells).items():
        rows = [cell for cell in group if cell["status"] == "ok"]
        y = [row["floor" if quantity == "loss" else quantity] for row in rows]
        errors = {"lr": "se", "batch_tokens": "batch_se"}
        half = [
            1.96 * (row[errors[quantity]] if quantity in errors else row["floor_se"] / row["floor"])
            for row in rows
        ]
        low, high = (
            [v * math.exp(sign * h) for v, h in zip(y, half, strict=True)] for sign in (-1, 1)
        )
        sets.append(Points(tokens_label(tokens), [row["n_params"] for row in rows], y, low, high))
    return sets


def _draw_points(
    points: Points, ax: Axes, color: str, marker: str = "o", size: float = 5, shift: float = 1.0
) -> None:
    """Draws points with error bars; `shift` multiplies x so that token budgets do not overlap."""
    y = np.array(points.y)
    error = np.array([y - points.low, np.array(points.high) - y]) if points.low else None
    edge = "black" if size > 5 else color
    style: dict[str, Any] = {"fmt": marker, "color": color, "ms": size, "ecolor": edge}
    style |= {"capsize": 2, "mec": "black", "mew": 0.5, "lw": 1, "zorder": 3}
    ax.errorbar(np.array(points.x) * shift, y, error, label=points.label, **style)


def draw_law(
    curves: Sequence[Curve],
    points: Sequence[Points],
    held: Sequence[tuple[str, float, Points]],
    ax: Axes,
    quantity: str = "lr",
) -> Axes:
    """Draws the law at each token budget, the fitted settings, and the held-out settings.

    The last curve also gets its interval and its near-optimal band.
    """
    for i, curve in enumerate(curves):
        color = COLORS[i % len(COLORS)] if i < len(points) else "black"
        repeated = i >= len(COLORS)  # a color that was used before
        ax.plot(curve.x, curve.y, "--" if i >= len(points) else "-", color=color, lw=1.3)
        if i < len(points):
            shift = 1 + (0.08 if len(points) < 4 else 0.01) * (i - len(points) / 2)
            _draw_points(points[i], ax, color, "s" if repeated else "o", shift=shift)
    last = curves[-1]
    shade: dict[str, Any] = {"lw": 0}
    if last.low is not None and last.high is not None:
        label = f"interval at {last.label}"
        ax.fill_between(
            last.x, last.low, last.high, color="black", alpha=0.08, label=label, **shade
        )
    if last.near is not None:
        low, high = last.near.T
        label = f"near-optimal at {last.label}"
        ax.fill_between(last.x, low, high, color="gold", alpha=0.3, label=label, **shade)
    for marker, size, marked in held:
        color, shift = ("white", 1.0) if marker == "D" else ("gold", 1.12)
        _draw_points(marked, ax, color, marker, size, shift)
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_ticks(ax)
    ax.tick_params(which="both", labelsize=8)
    ax.grid(alpha=0.25, which="both")
    ax.set(xlabel="parameters (non-embedding)", ylabel=AXIS[quantity])
    return ax


def _validated(fit: Fit) -> list[dict[str, Any]]:
    """The held-out settings that were predicted and then trained."""
    return fit.held_out["cells"] if fit.held_out.get("kind") == "validation" else []


def held_points(fit: Fit, quantity: str) -> list[tuple[str, float, Points]]:
    """Held-out settings as (marker, size, points): prediction with interval, then measurement."""
    marked = []
    for cell in _validated(fit):
        x, interval = [cell["n_params"]], cell["interval"][quantity]
        predicted = cell.get(f"predicted_{quantity}")
        measured = cell.get(f"measured_{quantity}")
        label = f"held out, {tokens_label(cell['tokens'])}: "
        if predicted is not None and interval:
            low, high = interval
            marked.append(("D", 6.0, Points(label + "predicted", x, [predicted], [low], [high])))
        if measured is not None:
            marked.append(("*", 13.0, Points(label + "measured", x, [measured])))
    return marked


def law_figure(fit: Fit) -> Figure:
    """The fitted laws of lr, loss (and batch size), with settings and held-out settings."""
    held = _validated(fit)
    horizons = [*horizons_of(fit.cells), *sorted({cell["tokens"] for cell in held})]
    joint = fit.law == "joint"
    quantities = (
        ["lr", "batch_tokens", "loss"] if joint else ["lr", "loss"] if fit.loss_law else ["lr"]
    )
    rows, columns = (2, 2) if joint else (1, len(quantities))
    figure = Figure(figsize=(5.2 * columns, 4.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    if joint:
        largest = max(fit.cells, key=lambda cell: cell["n_params"] * cell["tokens"])
        draw_contour(basin_contour(fit, largest), axes[-1])
    sizes = [cell["n_params"] for cell in held]
    for ax, quantity in zip(axes, quantities, strict=False):
        curves = [law_curve(fit, tokens, quantity, sizes) for tokens in horizons]
        draw_law(curves, cell_points(fit.cells, quantity), held_points(fit, quantity), ax, quantity)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    legend: dict[str, Any] = {"fontsize": 8, "frameon": False, "ncols": 4}
    figure.legend(handles, labels, loc="outside lower center", **legend)
    return figure


@dataclass(frozen=True)
class Contour:
    """The loss basin of one setting over lr and batch size (joint surface), with its runs."""

    label: str
    """Model size and token budget of the setting."""

    lr: Array
    """(n,) learning rates of the grid."""

    batch_tokens: Array
    """(m,) batch sizes of the grid, tokens."""

    excess: Array
    """(m, n) loss in % above the minimum loss."""

    runs: Array
    """(R, 3): lr, batch_tokens and loss in % above the minimum loss of each run."""

    own: tuple[float, float]
    """(lr, batch_tokens) of the optimum fitted to this setting."""

    law: tuple[float, float]
    """(lr, batch_tokens) of the optimum that the law predicts for this setting."""


def basin_contour(fit: Fit, cell: dict[str, Any], n: int = 80) -> Contour:
    """The basin of one cell of a joint fit, around the cell's own optimum, over its runs' range."""
    runs = np.array([[float(v) for v in line.split()] for line in cell["runs"]])
    lr, batch = (np.geomspace(runs[:, i].min() / 1.2, runs[:, i].max() * 1.2, n) for i in (0, 1))
    offset = np.zeros((n * n, len(cell["x"])))
    offset[:, :2] = (
        np.stack(np.meshgrid(np.log(lr), np.log(batch)), -1).reshape(-1, 2) - cell["x"][:2]
    )
    excess = 100 * cell["scale"] * basin_excess(offset, np.array(cell["shape"]))[0].reshape(n, n)
    prediction = from_fit(fit, n_params=cell["n_params"], tokens=cell["tokens"])
    assert prediction.lr and prediction.batch_tokens
    label = f"{human(cell['n_params'])} parameters, {tokens_label(cell['tokens'])}"
    runs[:, 2] = 100 * (runs[:, 2] / cell["floor"] - 1)
    own, law = (cell["lr"], cell["batch_tokens"]), (prediction.lr, prediction.batch_tokens)
    return Contour(label, lr, batch, excess, runs, own, law)


def draw_contour(contour: Contour, ax: Axes) -> Axes:
    """Draws contours of equal loss, the runs in the same colors, and both optima."""
    colors: dict[str, Any] = {"cmap": "viridis", "vmin": 0, "vmax": LEVELS[-1]}
    grid = contour.lr, contour.batch_tokens, contour.excess
    lines = ax.contour(*grid, LEVELS, linewidths=1.3, **colors)
    ax.clabel(lines, fmt="%g %%", fontsize=7)
    x, y, excess = contour.runs.T
    shown = np.minimum(excess, LEVELS[-1])
    ax.scatter(x, y, c=shown, s=14, edgecolors="none", alpha=0.8, **colors)
    star: dict[str, Any] = {"color": "gold", "ms": 13, "mec": "black", "mew": 0.6}
    diamond: dict[str, Any] = {"color": "white", "ms": 6, "mec": "black", "mew": 0.8}
    ax.plot(*contour.own, "*", label="optimum of this setting", **star)
    ax.plot(*contour.law, "D", label="optimum by the law", **diamond)
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.3g}")
    ax.tick_params(labelsize=8)
    title = f"% above the minimum loss: {contour.label}"
    ax.set(xlabel="learning rate", ylabel="batch size, tokens", title=title)
    ax.title.set_fontsize(9)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return ax
