"""Pictures of checks: `panels(found)` gives arrays, `draw` puts a panel on an axis, `plot` writes the file."""

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
from numpy.typing import NDArray

from scaletune.plotting import COLORS, Curve, save

Found = Mapping[str, Any]
RANGE = 0.3, 1.2  # of the exponents shown, at least
DECADE = 10.0


@dataclass(frozen=True)
class Panel:
    """Curves that share an axis, with lines for what they are held against."""

    title: str
    xlabel: str
    ylabel: str
    curves: list[Curve]
    held: list[tuple[str, float]] = field(default_factory=list)  # (what it is, y)
    log: bool = True  # both axes; else neither


def panels(found: Found) -> list[Panel]:
    """What a check's record shows, by its "what"."""
    return {
        "coordinate": _coordinate,
        "sharpness": _sharpness,
        "alignment": _alignment,
        "regime": _regime,
    }[found["what"]](found)


def _array(values: Sequence[float | None]) -> NDArray[np.float64]:
    return np.array([math.nan if value is None else value for value in values], float)


def _sloped(label: str, slope: float | None) -> str:
    return f"{label}, slope {math.inf if slope is None else slope:+.2f}"


def _coordinate(found: Found) -> list[Panel]:
    """RMS change of each activation against width (or depth), a panel a step."""
    slopes = {(row["activation"], row["step"]): row["slope"] for row in found["slopes"]}
    x, made = _array(found[f"{found['over']}s"]), []
    for step in sorted({row["step"] for row in found["sizes"]}):
        rows = [
            row
            for row in found["sizes"]
            if row["step"] == step and max(row["rms"], default=0) > 1e-20
        ]  # a zeroed readout's first step
        curves = [
            Curve(
                _sloped(row["activation"], slopes[row["activation"], step]), x, _array(row["rms"])
            )
            for row in rows
        ]
        made.append(Panel(f"step {step}", found["over"], "RMS change since initialisation", curves))
    return made


def _sharpness(found: Found) -> list[Panel]:
    """Each kind of sharpness against the step, one curve a width; the limit of stability beside the preconditioned one."""
    sizes, steps, made = found[f"{found['over']}s"], found["steps"], []
    for kind, unit in (
        ("raw", "top eigenvalue"),
        ("preconditioned", "entry by entry"),
        ("scaled", "tensor by tensor: judged"),
    ):
        if steps[0][kind] is not None:
            x = _array([row["step"] for row in steps])
            curves = [
                Curve(f"{found['over']} {size}", x, _array([row[kind][i] for row in steps]))
                for i, size in enumerate(sizes)
            ]
            held = [("limit of stability", found["threshold"])] if kind == "preconditioned" else []
            made.append(
                Panel(
                    kind,
                    "step",
                    f"sharpness, {unit}" if kind == "raw" else f"lr * sharpness, {unit}",
                    curves,
                    held,
                )
            )
    return made


def _alignment(found: Found) -> list[Panel]:
    """Each tensor's exponent against the step, a panel a term."""
    made = []
    for term in dict.fromkeys(row["term"] for row in found["tensors"]):
        held: dict[str, list[tuple[int, float | None]]] = {}
        for row in found["tensors"]:
            if row["term"] == term:
                held.setdefault(row["tensor"], []).append(
                    (row["step"], row["exponent"] if row["fits"] != "-" else None)
                )
        curves = [
            Curve(
                tensor.removesuffix(".weight"),
                _array([x for x, _ in points]),
                _array([y for _, y in points]),
            )
            for tensor, points in held.items()
        ]
        made.append(
            Panel(
                term,
                "step",
                "alignment exponent over fan-in",
                curves,
                [("full", 1.0), ("none", 0.5)],
                log=False,
            )
        )
    return made


def _regime(found: Found) -> list[Panel]:
    """Relative change of features and kernel against width, one curve a step."""
    x, made = _array(found[f"{found['over']}s"]), []
    for of, title in (("features", "last features"), ("kernel", "empirical NTK")):
        rows = [row for row in found["changes"] if row["of"] == of]
        curves = [
            Curve(_sloped(f"step {row['step']}", row["slope"]), x, _array(row["relative"]))
            for row in rows
        ]
        made.append(Panel(title, found["over"], "change relative to initialisation", curves))
    return made


def _kind(label: str, many: bool) -> str:
    """What a curve is called: where there are more curves than colors, layers' tensors of one kind share a name."""
    return label.rpartition(".")[2] if many else label


def draw(panel: Panel, ax: Axes) -> Axes:
    """A panel's curves and what they are held against. An axis of sizes spans a decade at least, so that noise looks like noise."""
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
    for label, y in panel.held:
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
    ax.set_ylim(min(low, RANGE[0]), max(high, RANGE[1]))


def figure(found: Found) -> Figure:
    """The panels of a check side by side, its verdict above them."""
    shown = panels(found)
    made = Figure(figsize=(4.4 * len(shown), 4.2), layout="constrained")
    axes = made.subplots(1, len(shown), squeeze=False)[0]
    for panel, ax in zip(shown, axes, strict=True):
        draw(panel, ax)
        if any(", slope" in label for label in ax.get_legend_handles_labels()[1]):
            ax.legend(fontsize=8, frameon=False)
    if axes[-1].get_legend() is None:  # every panel has the same curves
        made.legend(
            *axes[-1].get_legend_handles_labels(),
            fontsize=8,
            frameon=False,
            loc="outside lower center",
            ncols=10,
        )
    made.suptitle(f"{found['what']} check over {found['over']}: {found['verdict']}", fontsize=11)
    return made


def plot(found: Found, out: str | Path) -> Path:
    """Write `out`/WHAT.png and return its path."""
    return save(figure(found), Path(out) / f"{found['what']}.png")
