"""Pictures of checks: coordinate check, sharpness, alignment, training regime.

`panels` gives arrays, `draw` draws a panel, `figure` puts panels side by side, `plot` writes the
file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from scaletune.plotting.shared import COLORS, Array, Curve, save

Record = Mapping[str, Any]
EXPONENTS = 0.3, 1.2  # least range of an axis of exponents
DECADE = 10.0


@dataclass(frozen=True)
class CheckPanel:
    """Curves that share an axis, with reference lines."""

    title: str
    """Title of the panel."""

    xlabel: str
    """Label of the x axis."""

    ylabel: str
    """Label of the y axis."""

    curves: list[Curve]
    """Measured values."""

    references: list[tuple[str, float]] = field(default_factory=list)
    """(label, y) of each horizontal reference line."""

    log: bool = True
    """Whether both axes are logarithmic; if not, neither is."""


def panels(record: Record) -> list[CheckPanel]:
    """The panels of a check's record, selected by record["what"]."""
    return {
        "coordinate": _coordinate,
        "sharpness": _sharpness,
        "alignment": _alignment,
        "regime": _regime,
    }[record["what"]](record)


def _array(values: Sequence[float | None]) -> Array:
    return np.array([math.nan if value is None else value for value in values], float)


def _with_slope(label: str, slope: float | None) -> str:
    return f"{label}, slope {math.inf if slope is None else slope:+.2f}"


def _coordinate(record: Record) -> list[CheckPanel]:
    """RMS change of each activation against width (or depth), one panel per step."""
    slopes = {(row["activation"], row["step"]): row["slope"] for row in record["slopes"]}
    x, shown = _array(record[f"{record['over']}s"]), []
    ylabel = "RMS change since initialization"
    for step in sorted({row["step"] for row in record["sizes"]}):
        curves = [
            Curve(
                _with_slope(row["activation"], slopes[row["activation"], step]),
                x,
                _array(row["rms"]),
            )
            for row in record["sizes"]
            if row["step"] == step
            and max(row["rms"], default=0) > 1e-20  # zero: the first step of a zeroed readout
        ]
        shown.append(CheckPanel(f"step {step}", record["over"], ylabel, curves))
    return shown


def _sharpness(record: Record) -> list[CheckPanel]:
    """Each kind of sharpness against the step, one curve per width, with the stability limit."""
    sizes, steps, shown = record[f"{record['over']}s"], record["steps"], []
    for kind, ylabel in (
        ("raw", "sharpness, top eigenvalue"),
        ("preconditioned", "lr * sharpness, entry by entry"),
        ("scaled", "lr * sharpness, tensor by tensor (used for the verdict)"),
    ):
        if steps[0][kind] is None:
            continue
        x = _array([row["step"] for row in steps])
        curves = [
            Curve(f"{record['over']} {size}", x, _array([row[kind][i] for row in steps]))
            for i, size in enumerate(sizes)
        ]
        limit = [("stability limit", record["threshold"])] if kind == "preconditioned" else []
        shown.append(CheckPanel(kind, "step", ylabel, curves, limit))
    return shown


def _alignment(record: Record) -> list[CheckPanel]:
    """The alignment exponent of each tensor against the step, one panel per term."""
    shown = []
    references = [("full", 1.0), ("none", 0.5)]
    for term in dict.fromkeys(row["term"] for row in record["tensors"]):
        by_tensor: dict[str, list[tuple[int, float | None]]] = {}
        for row in record["tensors"]:
            if row["term"] == term:
                exponent = row["exponent"] if row["fits"] != "-" else None
                by_tensor.setdefault(row["tensor"], []).append((row["step"], exponent))
        curves = [
            Curve(
                tensor.removesuffix(".weight"),
                _array([x for x, _ in points]),
                _array([y for _, y in points]),
            )
            for tensor, points in by_tensor.items()
        ]
        ylabel = "alignment exponent over fan-in"
        shown.append(CheckPanel(term, "step", ylabel, curves, references, log=False))
    return shown


def _regime(record: Record) -> list[CheckPanel]:
    """Relative change of features and kernel against width, one curve per step."""
    x, shown = _array(record[f"{record['over']}s"]), []
    ylabel = "change relative to initialization"
    for of, title in (("features", "last features"), ("kernel", "empirical NTK")):
        curves = [
            Curve(_with_slope(f"step {row['step']}", row["slope"]), x, _array(row["relative"]))
            for row in record["changes"]
            if row["of"] == of
        ]
        shown.append(CheckPanel(title, record["over"], ylabel, curves))
    return shown


def _kind(label: str, many: bool) -> str:
    """The legend label of a curve; with more curves than colors, tensors of one kind share it."""
    return label.rpartition(".")[2] if many else label


def draw(panel: CheckPanel, ax: Axes) -> Axes:
    """Draws the curves and reference lines of a panel.

    A logarithmic y axis spans at least a decade, so that noise does not fill it.
    """
    many = len(panel.curves) > len(COLORS)
    kinds = list(dict.fromkeys(_kind(curve.label, many) for curve in panel.curves))
    named: set[str] = set()
    for curve in panel.curves:
        kind = _kind(curve.label, many)
        i, label = kinds.index(kind), None if kind in named else kind
        ax.plot(
            curve.x,
            curve.y,
            "-" if i < len(COLORS) else ":",
            marker="o",
            color=COLORS[i % len(COLORS)],
            ms=3,
            lw=1.4,
            label=label,
        )
        named.add(kind)
    for label, y in panel.references:
        ax.axhline(y, color="black", ls="--", lw=1)
        ax.annotate(
            label, (1, y), xycoords=("axes fraction", "data"), ha="right", va="bottom", fontsize=8
        )
    (_logarithmic if panel.log else _linear)(ax)
    ax.set_xticks(panel.curves[0].x if panel.curves else [], minor=False)
    ax.set(xlabel=panel.xlabel, ylabel=panel.ylabel, title=panel.title)
    ax.grid(alpha=0.25)
    return ax


def _logarithmic(ax: Axes) -> None:
    ax.set_xscale("log", base=2)
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    if high / low < DECADE:
        middle = math.sqrt(high * low)
        ax.set_ylim(middle / math.sqrt(DECADE), middle * math.sqrt(DECADE))
    few = math.log10(ax.get_ylim()[1] / ax.get_ylim()[0]) < 3
    ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
    ax.minorticks_off()
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def _linear(ax: Axes) -> None:
    low, high = ax.get_ylim()
    ax.set_ylim(min(low, EXPONENTS[0]), max(high, EXPONENTS[1]))


def figure(record: Record) -> Figure:
    """The panels of a check side by side, with its verdict as the title."""
    shown = panels(record)
    page = Figure(figsize=(4.4 * len(shown), 4.2), layout="constrained")
    axes = page.subplots(1, len(shown), squeeze=False)[0]
    for panel, ax in zip(shown, axes, strict=True):
        draw(panel, ax)
        if any(", slope" in label for label in ax.get_legend_handles_labels()[1]):
            ax.legend(fontsize=8, frameon=False)
    if axes[-1].get_legend() is None:  # every panel has the same curves
        legend: dict[str, Any] = {"fontsize": 8, "frameon": False, "ncols": 10}
        handles, labels = axes[-1].get_legend_handles_labels()
        page.legend(handles, labels, loc="outside lower center", **legend)
    title = f"{record['what']} check over {record['over']}: {record['verdict']}"
    page.suptitle(title, fontsize=11)
    return page


def plot(record: Record, out: str | Path) -> Path:
    """Writes `out`/WHAT.png, where WHAT is the kind of check, and returns its path."""
    return save(figure(record), Path(out) / f"{record['what']}.png")
