"""Fits of the loss, and of relations between columns: what was measured, the law through it, its interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scaletune.fitting.relations import RELATIONS, Relation, predict_relation, solved_relation
from scaletune.plotting import COLORS, Curve, Points, plain_ticks
from scaletune.predicting import from_fit
from scaletune.records import Fit

WIDE = 30  # from this factor between its ends on an axis is logarithmic
SHOWN = 5  # lines in one picture: sizes, or combinations of the other inputs
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Panel:
    """Lines and points on common axes."""

    x: str
    y: str
    curves: list[Curve] = field(default_factory=list)
    points: list[Points] = field(default_factory=list)
    log_y: bool = True
    title: str = ""


def _spread(values: Array, n: int = SHOWN) -> Array:
    """At most n of the distinct values, evenly over their order."""
    distinct = np.unique(values)
    return distinct[np.unique(np.linspace(0, len(distinct) - 1, n).round().astype(int))]


def loss_panels(fit: Fit) -> list[Panel]:
    """Loss against tokens for a few sizes, ten times beyond the runs; and how far every run lies from the law, against its size."""
    n_params, tokens, loss = np.array(fit.solution["points"], float).T
    beyond = np.geomspace(tokens.min() / 1.2, tokens.max() * 10, 60)
    curves, points = [], []
    for size in _spread(n_params):
        said = [from_fit(fit, n_params=float(size), tokens=float(t)) for t in beyond]
        ends = np.array([p.interval["loss"] or (np.nan, np.nan) for p in said], float)
        curves.append(
            Curve(
                f"{size:.3g} parameters",
                beyond,
                np.array([p.loss for p in said], float),
                ends[:, 0],
                ends[:, 1],
            )
        )
        here = np.abs(np.log(n_params / size)) < np.log(1.1)
        points.append(Points(f"{size:.3g} parameters", tokens[here].tolist(), loss[here].tolist()))
    law = np.array(
        [from_fit(fit, n_params=n, tokens=t).loss for n, t in zip(n_params, tokens, strict=True)],
        float,
    )
    off = Points("runs", n_params.tolist(), (100 * np.log(loss / law)).tolist())
    return [
        Panel("tokens", "loss, nats per token", curves, points),
        Panel("parameters", "ln loss above the law, %", [], [off], False),
    ]


def relation_panels(fit: Fit) -> list[Panel]:
    """The output against the input it is drawn along, a line for each of a few combinations of the others; of groups one by one a panel each."""
    if not fit.solution:
        keys = [key for key in RELATIONS[fit.law].groups if fit.cells and key in fit.cells[0]]
        shown = [cell for cell in fit.cells if "solution" in cell][:SHOWN]
        panels = [relation_panels(replace(fit, solution=cell["solution"]))[0] for cell in shown]
        titles = [", ".join(f"{key} {cell[key]}" for key in keys) for cell in shown]
        return [replace(panel, title=title) for panel, title in zip(panels, titles, strict=True)]
    drawn = solved_relation(fit, RELATIONS[fit.law])
    columns = {name: np.array(column, float) for name, column in fit.solution["points"].items()}
    y = columns.pop(drawn.output.name)
    panel = Panel(
        f"{drawn.along}",
        f"{drawn.output.name}, {drawn.output.means.split(',')[0]}",
        log_y=bool((y > 0).all()),
    )
    for label, rows in _groups(drawn, columns):
        order = rows[np.argsort(columns[drawn.along][rows])]
        at = _along(drawn, {name: column[order] for name, column in columns.items()})
        found = predict_relation(fit, drawn, at)
        panel.curves.append(
            Curve(
                label,
                at[drawn.along],
                *(np.array(found[key], float) for key in ("value", "low", "high")),
            )
        )
        panel.points.append(Points(label, columns[drawn.along][order].tolist(), y[order].tolist()))
    return [panel]


def _groups(relation: Relation, columns: Mapping[str, Array]) -> list[tuple[str, NDArray[np.int_]]]:
    """(label, rows) of a few combinations of the inputs it is not drawn along; runs where there are runs."""
    others = [c.name for c in relation.inputs if c.name != relation.along and c.name in columns]
    if "run" in columns:
        return [
            (f"run {run:g}", np.flatnonzero(columns["run"] == run))
            for run in _spread(columns["run"])
        ]
    if not others or relation.id == "seconds_per_step":
        return [(relation.id, np.arange(len(columns[relation.along])))]
    keys = np.stack([columns[name] for name in others], 1)
    distinct = np.unique(keys, axis=0)
    chosen = distinct[np.unique(np.linspace(0, len(distinct) - 1, SHOWN).round().astype(int))]
    label = [
        ", ".join(f"{name} {value:.3g}" for name, value in zip(others, key, strict=True))
        for key in chosen
    ]
    return [
        (text, np.flatnonzero((keys == key).all(1)))
        for text, key in zip(label, chosen, strict=True)
    ]


def _along(relation: Relation, columns: Mapping[str, Array], n: int = 60) -> dict[str, Array]:
    """The inputs on a fine grid along the one that varies, where the others are constant; else as they are."""
    x = columns[relation.along]
    constant = all(
        np.ptp(column) == 0 for name, column in columns.items() if name != relation.along
    )
    if not constant or relation.prepare or (x <= 0).any():
        return dict(columns)
    aside = (x.max() / x.min()) ** 0.15
    fine = np.geomspace(x.min() / aside, x.max() * aside, n)
    return {
        name: fine if name == relation.along else np.full(n, column[0])
        for name, column in columns.items()
    }


def draw(panel: Panel, ax: Axes) -> Axes:
    """Points, their curve and its interval, a colour each."""
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


def figure(panels: Sequence[Panel]) -> Figure:
    made = Figure(figsize=(5.4 * len(panels), 4.2), layout="constrained")
    for panel, ax in zip(panels, made.subplots(1, len(panels), squeeze=False)[0], strict=True):
        draw(panel, ax)
    return made
