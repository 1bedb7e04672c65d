"""What runs cannot say of the joint surface, and which runs would: sentences for `Fit.status`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaletune.fitting.joint.surface import Solved, names
from scaletune.fitting.table import SAME_SCALE, n_levels

HARDLY = 0.8  # posterior over prior sd from which an exponent is mostly prior
VAGUE = 0.6  # sd of a centre, in logs
NOISY = 5e-3  # sd of ln loss at the bottom from which the form is in doubt: ten times what public sweeps show
STRAY = 0.03  # sd of ln floor about the law from which cells look as if they were not comparable: six times what public sweeps show
NAMED = 3  # cells that are named, the others are counted
WORD = {"lr": "learning rate", "batch": "batch size", "wd": "weight decay"}


def sentences(
    kept: pd.DataFrame,
    axes: Sequence[str],
    solved: Solved,
    given: Any,
    cells: Sequence[Mapping[str, Any]],
) -> list[str]:
    """Everything there is to say of a fit."""
    said = [*_scales(cells), *_axes(kept, axes)]
    said += (
        _exponents(axes, solved, given, bool(said)) + _centres(axes, solved) + _edges(cells, axes)
    )
    if len(cells) > 1 and solved.scales.scatter[-1] > STRAY:
        said.append(
            f"the cells' lowest losses lie {solved.scales.scatter[-1]:.1%} about the law: is loss in one unit, of one tokenizer and one data set?"
        )
    if solved.scales.noise > NOISY:
        said.append(
            f"runs lie {solved.scales.noise:.2%} about the surface near its bottom: the form fits badly, or they differ in what is not said"
        )
    return said


def _scales(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether cells tell n_params from tokens."""
    sizes, horizons = (
        n_levels([cell[column] for cell in cells]) for column in ("n_params", "tokens")
    )
    said = []
    if sizes == 1:
        said.append(
            "every run has the same n_params: lr.N, batch.N and loss.alpha are not identified and stay as published laws have them; add cells at another n_params"
        )
    if horizons == 1:
        said.append(
            "every run has the same tokens: lr.D, batch.D and loss.beta are not identified and stay as published laws have them; add cells at another number of tokens"
        )
    if sizes > 1 and horizons > 1:
        n, d = (np.log([cell[column] for cell in cells]) for column in ("n_params", "tokens"))
        slope = float(((n - n.mean()) @ (d - d.mean())) / ((n - n.mean()) @ (n - n.mean())))
        if np.std(d - d.mean() - slope * (n - n.mean())) < math.log(SAME_SCALE):
            said.append(
                f"tokens follow n_params**{slope:.2g} in all cells: exponents are identified along that line only; add cells at another ratio of tokens to n_params"
            )
    return said


def _axes(kept: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """Settings that too few values of were tried."""
    said = []
    for axis, column in (("lr", "lr"), ("batch", "batch_tokens")):
        values = sorted(kept[column].unique())
        if n_levels(values) == 1:
            said.append(
                f"every run has {column} {values[0]:.4g}: the best {WORD[axis]}, and how it grows, is not measured but a guess; add runs at {values[0] / 2:.4g} and {values[0] * 2:.4g}"
            )
        elif (alone := int((kept.groupby("cell")[column].nunique() == 1).sum())) > 0:
            said.append(
                f"{alone} of {kept['cell'].nunique()} cells were trained at one {column} each: they say nothing of the best {WORD[axis]}"
            )
    if "weight_decay" in kept and "wd" not in axes and kept["weight_decay"].nunique() > 1:
        said.append(
            "weight_decay differs between runs, but no cell has three values of it above 0: its effect is taken for noise; add them, or fit one value at a time"
        )
    return said


def _exponents(axes: Sequence[str], solved: Solved, given: Any, partly: bool) -> list[str]:
    """Exponents of a centre that are mostly prior."""
    order = names(len(axes))
    rows = dict(zip(order, np.eye(len(order)), strict=True))
    asked = {name: rows[name] for axis in axes for name in (f"{axis}.D", "loss.alpha", "loss.beta")}
    asked |= {f"{axis}.N": rows[f"{axis}.along"] - rows[f"{axis}.D"] for axis in axes}
    weak = []
    for name, row in asked.items():
        before, after = (
            math.sqrt(float(row**2 @ given[:, 1] ** 2)),
            math.sqrt(float(row @ solved.covariance @ row)),
        )
        if after > HARDLY * before:
            weak.append(
                f"{name} ({row @ solved.theta:.2g} ± {after:.2g}, before any run ± {before:.2g})"
            )
    if not weak:
        return []
    return [
        f"hardly identified by these runs, so mostly what published laws say: {', '.join(weak)}"
        + ("" if partly else "; add cells at scales further apart")
    ]


def _centres(axes: Sequence[str], solved: Solved) -> list[str]:
    order = names(len(axes))
    sd = {
        axis: math.sqrt(
            float(solved.covariance[order.index(f"{axis}.c"), order.index(f"{axis}.c")])
        )
        for axis in axes
    }
    return [
        f"the best {WORD[axis]} of these very runs is known to a factor of {math.exp(error):.2g} only; add runs on both sides of it"
        for axis, error in sd.items()
        if error > VAGUE
    ]


def _edges(cells: Sequence[Mapping[str, Any]], axes: Sequence[str]) -> list[str]:
    """Cells whose optimum is at the end of what was tried, and whether all of them are."""
    said = [cell["status"] for cell in cells if cell["status"] != "ok"]
    if len(said) > NAMED:
        said[NAMED:] = [f"{len(said) - NAMED} more cells have their own optimum outside their runs"]
    if sum(cell["status"] != "ok" for cell in cells) == len(cells):
        said.insert(
            0,
            "no cell has its optimum inside its grid: the centre of the basin is extrapolated in all of them",
        )
    return said


def edge(
    group: pd.DataFrame, row: Mapping[str, Any], axes: Sequence[str], columns: Mapping[str, str]
) -> str:
    """ "ok", or the sentence that says at which end of its runs a cell's own optimum lies."""
    where = f"the cell of {row['n_params']:g} parameters and {row['tokens']:g} tokens"
    said = []
    for axis in axes:
        column = columns[axis]
        low, high, best = float(group[column].min()), float(group[column].max()), row[column]
        if low < high and not low * (1 + 1e-9) < best < high * (1 - 1e-9):
            said.append(
                f"its best {column}, {best:.3g}, {'below' if best < high else 'above'} all that were tried ({low:.3g} to {high:.3g})"
            )
    return (
        f"{where} has {' and '.join(said)}: its own optimum is not inside its runs"
        if said
        else "ok"
    )
