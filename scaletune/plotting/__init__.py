"""Pictures: data, then ink. `..._curve(s)` and `..._points` give arrays, `draw_...` put them on an axis, `plot` writes the files. No global style, no pyplot."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.fitting.joint.basin import height
from scaletune.fitting.relations import RELATIONS
from scaletune.fitting.table import levels, main_sweep, tabulate
from scaletune.importing import trials as records_of
from scaletune.predicting import LOSS_LAWS, from_fit
from scaletune.records import Fit

COLORS = (
    "#4477aa",
    "#ee6677",
    "#228833",
    "#ccbb44",
    "#66ccee",
    "#aa3377",
)  # told apart by colour-blind readers too
DPI = 130
CROWDED = (
    40  # from this factor between its ends a logarithmic axis is labelled at its decades alone
)
AXIS = {
    "lr": "optimal learning rate",
    "batch_tokens": "optimal batch, tokens",
    "loss": "loss at the optimum, nats per token",
}
HEIGHTS = (0.25, 0.5, 1.0, 2.0, 4.0)  # % above the floor at which a basin is drawn


@dataclass(frozen=True)
class Curve:
    """A line with an optional shade: y against x, both positive."""

    label: str
    x: NDArray[np.float64]
    y: NDArray[np.float64]
    low: NDArray[np.float64] | None = None
    high: NDArray[np.float64] | None = None
    near: NDArray[np.float64] | None = None  # (len(x), 2): the near-optimal band


@dataclass(frozen=True)
class Points:
    """Measured values with their intervals."""

    label: str
    x: list[float]
    y: list[float]
    low: list[float] = field(default_factory=list)
    high: list[float] = field(default_factory=list)


def basin_curves(trials: pd.DataFrame) -> list[Curve]:
    """Mean loss over seeds against lr, one curve a width (of records without widths: a parameter count), low and high over the seeds."""
    size = "width" if "width" in trials else "n_params"
    done = trials[trials["loss"].notna()]
    curves = []
    for value, rows in done.groupby(size):
        loss = rows.groupby("lr")["loss"]
        x = np.array(sorted(rows["lr"].unique()), float)
        curves.append(
            Curve(
                f"{size.replace('n_params', 'parameters')} {value:g}",
                x,
                *(np.array(f(), float) for f in (loss.mean, loss.min, loss.max)),
            )
        )
    return curves


def draw_basins(curves: Sequence[Curve], ax: Axes, title: str = "") -> Axes:
    """Loss against lr, the lowest point of each curve marked."""
    for curve, color in zip(curves, COLORS * 9, strict=False):
        ax.plot(curve.x, curve.y, "-o", color=color, ms=3, lw=1.4, label=curve.label)
        if curve.low is not None and curve.high is not None:
            ax.fill_between(curve.x, curve.low, curve.high, color=color, alpha=0.15, lw=0)
        best = int(curve.y.argmin())
        ax.plot(curve.x[best], curve.y[best], "*", color=color, ms=13, mec="black", mew=0.6)
    ax.set_xscale("log", base=2)
    ax.set(xlabel="learning rate (peak, at base width)", title=title)
    ax.grid(alpha=0.25)
    return ax


def law_curve(
    fit: Fit, tokens: float, quantity: str = "lr", n_params: Sequence[float] = ()
) -> Curve:
    """The law's lr (or loss) at one horizon against n_params, from the smallest proxy to the largest of `n_params`; shade: its interval."""
    low, high = fit.ranges["n_params"]
    x = np.geomspace(low * 0.8, max([high, *n_params]) * 1.3, 60)
    said = [from_fit(fit, n_params=float(n), tokens=tokens) for n in x]
    y = np.array([getattr(p, quantity) for p in said], float)
    bounds = np.array([p.interval[quantity] or (math.nan, math.nan) for p in said], float)
    near = np.array([p.band[quantity] for p in said], float) if said[0].band[quantity] else None
    return Curve(tokens_label(tokens), x, y, bounds[:, 0], bounds[:, 1], near)


def tokens_label(tokens: float) -> str:
    """102400 -> '102k tokens'."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if tokens >= 0.9995 * size:  # what three digits round up to the next letter
            return f"{tokens / size:.3g}{letter} tokens"
    return f"{tokens:g} tokens"


def horizons_of(cells: Sequence[dict[str, Any]]) -> dict[float, list[dict[str, Any]]]:
    """Tokens -> the cells of that horizon, those a rounding apart together."""
    numbers = (
        levels(np.array([cell["tokens"] for cell in cells])).tolist() if cells else list[int]()
    )
    found: dict[int, list[dict[str, Any]]] = {}
    for number, cell in sorted(zip(numbers, cells, strict=True), key=lambda pair: pair[0]):
        found.setdefault(int(number), []).append(cell)
    return {min(cell["tokens"] for cell in there): there for there in found.values()}


def cell_points(cells: Sequence[dict[str, Any]], quantity: str = "lr") -> list[Points]:
    """Measured optima (or floors), one set a horizon, with intervals of 1.96 standard errors."""
    sets = []
    for tokens, there in horizons_of(cells).items():
        rows = [cell for cell in there if cell["status"] == "ok"]
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


def plain_ticks(ax: Axes) -> None:
    """1000 in the place of 10**3 along a logarithmic y; between the decades too, where they are few."""
    low, high = ax.get_ylim()
    ax.yaxis.set_major_formatter(lambda value, _: f"{value:.3g}")
    ax.yaxis.set_minor_formatter((lambda value, _: f"{value:.3g}") if high < CROWDED * low else "")


def _draw_points(
    points: Points, ax: Axes, color: str, marker: str = "o", size: float = 5, aside: float = 1.0
) -> None:
    y = np.array(points.y)
    error = np.array([y - points.low, np.array(points.high) - y]) if points.low else None
    x = np.array(points.x) * aside  # horizons share their x: side by side they can be told apart
    ax.errorbar(
        x,
        y,
        error,
        fmt=marker,
        color=color,
        ms=size,
        capsize=2,
        ecolor="black" if size > 5 else color,
        mec="black",
        mew=0.5,
        lw=1,
        label=points.label,
        zorder=3,
    )


def draw_law(
    curves: Sequence[Curve],
    points: Sequence[Points],
    held: Sequence[tuple[str, float, Points]],
    ax: Axes,
    quantity: str = "lr",
) -> Axes:
    """The law at each horizon, the interval of the last one, the cells it was fitted to, the held-out cell predicted and measured."""
    for i, curve in enumerate(curves):
        color = COLORS[i % len(COLORS)] if i < len(points) else "black"
        again = i >= len(COLORS)  # colours come round
        ax.plot(curve.x, curve.y, "--" if i >= len(points) else "-", color=color, lw=1.3)
        if i < len(points):
            aside = 1 + (0.08 if len(points) < 4 else 0.01) * (i - len(points) / 2)
            _draw_points(points[i], ax, color, "s" if again else "o", aside=aside)
    last = curves[-1]
    if last.low is not None and last.high is not None:
        ax.fill_between(
            last.x,
            last.low,
            last.high,
            color="black",
            alpha=0.08,
            lw=0,
            label=f"interval at {last.label}",
        )
    if last.near is not None:
        ax.fill_between(
            last.x,
            last.near[:, 0],
            last.near[:, 1],
            color="gold",
            alpha=0.3,
            lw=0,
            label=f"near-optimal at {last.label}",
        )
    for marker, size, marked in held:
        _draw_points(
            marked,
            ax,
            *(("white", marker, size) if marker == "D" else ("gold", marker, size, 1.12)),
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    plain_ticks(ax)
    ax.tick_params(which="both", labelsize=8)
    ax.grid(alpha=0.25, which="both")
    ax.set(xlabel="parameters (non-embedding)", ylabel=AXIS[quantity])
    return ax


def _validated(fit: Fit) -> list[dict[str, Any]]:
    """The held-out cells that were predicted and then trained."""
    return fit.held_out["cells"] if fit.held_out.get("kind") == "validation" else []


def held_points(fit: Fit, quantity: str) -> list[tuple[str, float, Points]]:
    """Each validated cell as (marker, size, points): the prediction with its interval, then the measurement."""
    made = []
    for cell in _validated(fit):
        predicted, interval, measured = (
            cell.get(f"predicted_{quantity}"),
            cell["interval"][quantity],
            cell.get(f"measured_{quantity}"),
        )
        said = f"held out, {tokens_label(cell['tokens'])}: "
        if predicted is not None and interval:
            made.append(
                (
                    "D",
                    6.0,
                    Points(
                        said + "predicted",
                        [cell["n_params"]],
                        [predicted],
                        [interval[0]],
                        [interval[1]],
                    ),
                )
            )
        if measured is not None:
            made.append(("*", 13.0, Points(said + "measured", [cell["n_params"]], [measured])))
    return made


def save(figure: Figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI, metadata={"Software": None})
    return path


def basins_figure(panels: dict[str, pd.DataFrame]) -> Figure:
    """Loss against lr side by side, one panel a name (say SP and muP), on one loss axis."""
    figure = Figure(figsize=(4.6 * len(panels), 3.8), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    curves = {name: basin_curves(trials) for name, trials in panels.items()}
    for ax, (name, drawn) in zip(axes, curves.items(), strict=True):
        draw_basins(drawn, ax, name)
    axes[0].set_ylabel("held-out loss, nats per token")
    lowest = [curve.y.min() for drawn in curves.values() for curve in drawn]
    if lowest:  # a panel, or all of them, may hold diverged trials alone
        axes[0].set_ylim(min(lowest) - 0.05, min(min(lowest) * 1.6, axes[0].get_ylim()[1]))
    for ax in reversed(axes):
        if ax.get_legend_handles_labels()[0]:
            ax.legend(fontsize=8, frameon=False)
            break
    return figure


def law_figure(fit: Fit) -> Figure:
    """The fitted laws, lr on the left and loss on the right, with cells and the held-out point."""
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
        draw_contour(
            basin_contour(fit, max(fit.cells, key=lambda cell: cell["n_params"] * cell["tokens"])),
            axes[-1],
        )
    for ax, quantity in zip(axes, quantities, strict=False):
        curves = [
            law_curve(fit, tokens, quantity, [cell["n_params"] for cell in held])
            for tokens in horizons
        ]
        draw_law(curves, cell_points(fit.cells, quantity), held_points(fit, quantity), ax, quantity)
    figure.legend(
        *figure.axes[0].get_legend_handles_labels(),
        fontsize=8,
        frameon=False,
        loc="outside lower center",
        ncols=4,
    )
    return figure


@dataclass(frozen=True)
class Contour:
    """One cell's basin over lr and batch, as the joint surface has it, with the cell's runs."""

    label: str
    lr: NDArray[np.float64]  # (n,)
    batch_tokens: NDArray[np.float64]  # (m,)
    height: NDArray[np.float64]  # (m, n), % above the floor
    runs: NDArray[np.float64]  # (R, 3): lr, batch_tokens, % above the floor
    own: tuple[float, float]  # the cell's own optimum
    law: tuple[float, float]  # the law's for it


def basin_contour(fit: Fit, cell: dict[str, Any], n: int = 80) -> Contour:
    """The basin of one cell of a joint fit about the cell's own optimum, over the range of its runs."""
    runs = np.array([[float(v) for v in line.split()] for line in cell["runs"]])
    lr, batch = (np.geomspace(runs[:, i].min() / 1.2, runs[:, i].max() * 1.2, n) for i in (0, 1))
    offset = np.zeros((n * n, len(cell["x"])))
    offset[:, :2] = (
        np.stack(np.meshgrid(np.log(lr), np.log(batch)), -1).reshape(-1, 2) - cell["x"][:2]
    )
    tall = 100 * cell["scale"] * height(offset, np.array(cell["shape"]))[0].reshape(n, n)
    said = from_fit(fit, n_params=cell["n_params"], tokens=cell["tokens"])
    assert said.lr and said.batch_tokens
    label = f"{cell['n_params']:.3g} parameters, {tokens_label(cell['tokens'])}"
    runs[:, 2] = 100 * (runs[:, 2] / cell["floor"] - 1)
    return Contour(
        label,
        lr,
        batch,
        tall,
        runs,
        (cell["lr"], cell["batch_tokens"]),
        (said.lr, said.batch_tokens),
    )


def draw_contour(contour: Contour, ax: Axes) -> Axes:
    """Lines of equal loss, the runs in the same colours, the cell's own optimum and the law's."""
    top = HEIGHTS[-1]
    lines = ax.contour(
        contour.lr,
        contour.batch_tokens,
        contour.height,
        HEIGHTS,
        cmap="viridis",
        vmin=0,
        vmax=top,
        linewidths=1.3,
    )
    ax.clabel(lines, fmt="%g %%", fontsize=7)
    x, y, tall = contour.runs.T
    ax.scatter(
        x,
        y,
        c=np.minimum(tall, top),
        cmap="viridis",
        vmin=0,
        vmax=top,
        s=14,
        edgecolors="none",
        alpha=0.8,
    )
    ax.plot(
        *contour.own, "*", color="gold", ms=13, mec="black", mew=0.6, label="the cell's own optimum"
    )
    ax.plot(*contour.law, "D", color="white", ms=6, mec="black", mew=0.8, label="the law's")
    ax.set_xscale("log", base=2)
    ax.set_yscale("log", base=2)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:.3g}")
    ax.tick_params(labelsize=8)
    ax.set(
        xlabel="learning rate", ylabel="batch, tokens", title=f"% above the floor: {contour.label}"
    )
    ax.title.set_fontsize(9)
    ax.legend(fontsize=8, frameon=False, loc="lower right")
    return ax


def _panels(trials: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """One panel a token horizon."""
    return {
        tokens_label(tokens): trials[trials["tokens"] == tokens]
        for tokens in sorted(trials["tokens"].unique())
    }


def plot(source: Fit | pd.DataFrame | str | Path, out: str | Path = "plots") -> list[Path]:
    """Write pictures under `out`: of a fit `law.png`, of records `basins.png`. Returns the paths."""
    if isinstance(source, str | Path):
        source = Fit.read(source) if Path(source).suffix == ".json" else records_of(source)[0]
    if isinstance(source, Fit):
        if source.law in RELATIONS or "points" in source.solution:
            from scaletune.plotting import fitted

            panels = (
                fitted.relation_panels(source)
                if source.law in RELATIONS
                else fitted.loss_panels(source)
            )
            return [save(fitted.figure(panels), Path(out) / "law.png")]
        if source.law in LOSS_LAWS:
            raise UserError(
                f"a fit of {source.law!r} to floors of cells has no runs of its own to draw: draw its records, or fit 'lr_nd'"
            )
        if not source.cells:
            raise UserError(
                f"a fit must hold the cells it rests on to be drawn, but this one of {source.law!r} holds none"
            )
        return [save(law_figure(source), Path(out) / "law.png")]
    source = tabulate(source, ["n_params", "tokens", "lr", "loss"])
    source["loss"] = source["loss"].where(source["status"] == "done")
    main, _ = main_sweep(source)
    if not (main["status"] == "done").any():
        raise UserError(
            f"records need at least one finished trial to be drawn, but of {len(main)} none is done"
        )
    return [save(basins_figure(_panels(main)), Path(out) / "basins.png")]
