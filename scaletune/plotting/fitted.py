"""Fits of the loss law and of relations between columns: data, law and interval.

`loss_panels` and `relation_panels` give arrays, `draw` draws a panel, `figure` puts panels side by
side.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scaletune.fitting.relations import RELATIONS, Relation, fitted_relation, predict_relation
from scaletune.plotting.shared import COLORS, Array, Curve, Points, plain_ticks
from scaletune.predicting import from_fit
from scaletune.records import Fit
from scaletune.units import human

WIDE = 30  # an axis that spans more than this factor is logarithmic
SHOWN = 5  # lines in one picture: sizes, or combinations of the other inputs


@dataclass(frozen=True)
class FitPanel:
    """Lines and points with common axes."""

    x: str
    """Label of the x axis."""

    y: str
    """Label of the y axis."""

    curves: list[Curve] = field(default_factory=list)
    """The law, one curve per group, with its interval."""

    points: list[Points] = field(default_factory=list)
    """The data, one set per group."""

    log_y: bool = True
    """Whether the y axis is logarithmic."""

    title: str = ""
    """Title of the panel."""


def _spread(values: Array, n: int = SHOWN) -> Array:
    """At most n of the distinct values, evenly spaced in their order."""
    distinct = np.unique(values)
    return distinct[np.unique(np.linspace(0, len(distinct) - 1, n).round().astype(int))]


def loss_panels(fit: Fit) -> list[FitPanel]:
    """Loss against tokens for a few sizes, and the residual of every run against its size.

    The curves extend to ten times the tokens of the runs.
    """
    n_params, tokens, loss = np.array(fit.solution["points"], float).T
    beyond = np.geomspace(tokens.min() / 1.2, tokens.max() * 10, 60)
    curves, points = [], []
    for size in _spread(n_params):
        predictions = [from_fit(fit, n_params=float(size), tokens=float(t)) for t in beyond]
        ends = np.array([p.interval["loss"] or (np.nan, np.nan) for p in predictions], float)
        y = np.array([p.loss for p in predictions], float)
        label = f"{human(size)} parameters"
        curves.append(Curve(label, beyond, y, ends[:, 0], ends[:, 1]))
        near = np.abs(np.log(n_params / size)) < np.log(1.1)
        points.append(Points(label, tokens[near].tolist(), loss[near].tolist()))
    law = np.array(
        [from_fit(fit, n_params=n, tokens=t).loss for n, t in zip(n_params, tokens, strict=True)],
        float,
    )
    residuals = Points("runs", n_params.tolist(), (100 * np.log(loss / law)).tolist())
    return [
        FitPanel("tokens", "loss, nats per token", curves, points),
        FitPanel("parameters", "ln loss above the law, %", [], [residuals], False),
    ]


def relation_panels(fit: Fit) -> list[FitPanel]:
    """The output of a relation against one input, one line per combination of the other inputs.

    At most SHOWN combinations are drawn. A fit per group gives one panel per group.
    """
    if not fit.solution:
        keys = [key for key in RELATIONS[fit.law].groups if fit.cells and key in fit.cells[0]]
        shown = [cell for cell in fit.cells if "solution" in cell][:SHOWN]
        panels = [relation_panels(replace(fit, solution=cell["solution"]))[0] for cell in shown]
        titles = [", ".join(f"{key} {cell[key]}" for key in keys) for cell in shown]
        return [replace(panel, title=title) for panel, title in zip(panels, titles, strict=True)]
    relation = fitted_relation(fit, RELATIONS[fit.law])
    columns = {name: np.array(column, float) for name, column in fit.solution["points"].items()}
    y = columns.pop(relation.output.name)
    meaning = relation.output.description.split(",")[0]
    log_y = bool((y > 0).all())
    panel = FitPanel(relation.along, f"{relation.output.name}, {meaning}", log_y=log_y)
    for label, rows in _groups(relation, columns):
        order = rows[np.argsort(columns[relation.along][rows])]
        x = columns[relation.along][order]
        inputs = _along(relation, {name: column[order] for name, column in columns.items()})
        predicted = predict_relation(fit, relation, inputs)
        value, low, high = (np.array(predicted[key], float) for key in ("value", "low", "high"))
        panel.curves.append(Curve(label, inputs[relation.along], value, low, high))
        panel.points.append(Points(label, x.tolist(), y[order].tolist()))
    return [panel]


def _groups(relation: Relation, columns: Mapping[str, Array]) -> list[tuple[str, NDArray[np.int_]]]:
    """(label, rows) per run, or per combination of the inputs that are not on the x axis."""
    others = [c.name for c in relation.inputs if c.name != relation.along and c.name in columns]
    if "run" in columns:
        runs = _spread(columns["run"])
        return [(f"run {run:g}", np.flatnonzero(columns["run"] == run)) for run in runs]
    if not others or relation.id == "seconds_per_step":
        return [(relation.id, np.arange(len(columns[relation.along])))]
    keys = np.stack([columns[name] for name in others], 1)
    distinct = np.unique(keys, axis=0)
    chosen = distinct[np.unique(np.linspace(0, len(distinct) - 1, SHOWN).round().astype(int))]
    labels = [
        ", ".join(f"{name} {value:.3g}" for name, value in zip(others, key, strict=True))
        for key in chosen
    ]
    return [
        (label, np.flatnonzero((keys == key).all(1)))
        for label, key in zip(labels, chosen, strict=True)
    ]


def _along(relation: Relation, columns: Mapping[str, Array], n: int = 60) -> dict[str, Array]:
    """The inputs on a fine grid along the x axis if the others are constant, else unchanged."""
    x = columns[relation.along]
    constant = all(
        np.ptp(column) == 0 for name, column in columns.items() if name != relation.along
    )
    if not constant or relation.prepare or (x <= 0).any():
        return dict(columns)
    margin = (x.max() / x.min()) ** 0.15
    fine = np.geomspace(x.min() / margin, x.max() * margin, n)
    return {
        name: fine if name == relation.along else np.full(n, column[0])
        for name, column in columns.items()
    }


def draw(panel: FitPanel, ax: Axes) -> Axes:
    """Draws curves with intervals and points, one color per group."""
    for i, curve in enumerate(panel.curves):
        color = COLORS[i % len(COLORS)]
        ax.plot(curve.x, curve.y, color=color, lw=1.4, label=curve.label)
        if curve.low is not None and curve.high is not None:
            ax.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.12, lw=0)
    for i, points in enumerate(panel.points):
        ax.plot(points.x, points.y, "o", color=COLORS[i % len(COLORS)], ms=3.5, alpha=0.8)
    ends = [
        *(x for curve in panel.curves for x in curve.x),
        *(x for points in panel.points for x in points.x),
    ]
    ax.set_xscale("log" if min(ends) > 0 and max(ends) > WIDE * min(ends) else "linear")
    ax.set_yscale("log" if panel.log_y else "linear")
    if panel.log_y:
        plain_ticks(ax)
    else:
        ax.axhline(0, color="black", lw=0.8)
    ax.set(xlabel=panel.x, ylabel=panel.y, title=panel.title)
    ax.grid(alpha=0.25)
    if panel.curves:
        ax.legend(fontsize=8, frameon=False)
    return ax


def figure(panels: Sequence[FitPanel]) -> Figure:
    """The panels side by side."""
    page = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    for panel, ax in zip(panels, page.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(panel, ax)
    return page
