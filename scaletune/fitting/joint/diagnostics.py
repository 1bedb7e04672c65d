"""What the runs do not determine about the joint surface, and which runs would: `Fit.status`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from scaletune.fitting.table import SAME_SCALE, n_levels
from scaletune.surface.model import parameter_names
from scaletune.surface.posterior import JointSolution
from scaletune.surface.prior import CENTRE_SD, PRIORS
from scaletune.units import human

PRIOR_DOMINATED = 0.8
"""Posterior over prior sd above which an exponent is prior-dominated."""
UNCERTAIN = 0.6
"""Sd of a ln optimum at the centre above which more runs are needed."""
HIGH_NOISE = 5e-3
"""Sd of ln loss above which the form is in doubt: ten times that of public sweeps."""
HIGH_SCATTER = 0.03
"""Sd of ln minimum loss about the law above which the settings may not be comparable: six times
that of public sweeps."""
MOST_NAMED = 3
"""At most so many settings are named, the others are counted."""
WORD = {"lr": "learning rate", "batch": "batch size", "wd": "weight decay"}


def sentences(
    kept: pd.DataFrame,
    axes: Sequence[str],
    solution: JointSolution,
    prior: Any,
    cells: Sequence[Mapping[str, Any]],
) -> list[str]:
    """All warnings of a fit."""
    data = [*not_measured(kept, cells), *_axes(kept, axes)]
    return [
        *data,
        *_exponents(axes, solution, prior, advice=not data),
        *_optima(axes, solution),
        *_edges(cells),
        *_noise(solution, len(cells)),
    ]


def not_measured(kept: pd.DataFrame, cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the runs do not measure at all: the first sentences of the status."""
    return [*_scales(cells), *_single_values(kept)]


def _scales(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Whether the settings separate the effects of n_params and tokens."""
    sizes, horizons = (
        n_levels([cell[column] for cell in cells]) for column in ("n_params", "tokens")
    )
    messages = []
    if sizes == 1:
        messages.append(
            "all runs have the same n_params: lr.N, batch.N and loss.alpha are not identified and"
            f" keep their prior, {_published('lr.N', 'batch.N', 'loss.alpha')}, and so do intervals"
            " at another n_params; add settings at another n_params"
        )
    if horizons == 1:
        messages.append(
            "all runs have the same tokens: lr.D, batch.D and loss.beta are not identified and"
            f" keep their prior, {_published('lr.D', 'batch.D', 'loss.beta')}, and so do intervals"
            " at other tokens; add settings at another token budget"
        )
    if sizes > 1 and horizons > 1:
        n, d = (np.log([cell[column] for cell in cells]) for column in ("n_params", "tokens"))
        slope = float(((n - n.mean()) @ (d - d.mean())) / ((n - n.mean()) @ (n - n.mean())))
        if np.std(d - d.mean() - slope * (n - n.mean())) < math.log(SAME_SCALE):
            messages.append(
                f"tokens follow n_params**{slope:.2g} in all settings: exponents are identified"
                " along this line only, and intervals off it keep the prior,"
                f" {_published('lr.D', 'batch.D')}; add settings at another ratio of tokens to"
                " n_params"
            )
    return messages


def _published(*names: str) -> str:
    """Prior mean and sd of exponents, for a sentence."""
    parts = []
    for name in names:
        axis = name.split(".")[0]
        mean, sd = (
            PRIORS[name]
            if name in PRIORS
            else (
                PRIORS[f"{axis}.along"][0] - PRIORS[f"{axis}.D"][0],
                math.hypot(PRIORS[f"{axis}.along"][1], PRIORS[f"{axis}.D"][1]),
            )
        )
        parts.append(f"{name} {mean:.2g} ± {sd:.2g}")
    return f"that of published laws ({', '.join(parts)})"


TUNED = (("lr", "lr", "learning rates"), ("batch", "batch_tokens", "batch sizes"))


def _single_values(kept: pd.DataFrame) -> list[str]:
    """Axes of which one value was trained."""
    messages = []
    for axis, column, more in TUNED:
        values = sorted(kept[column].unique())
        if n_levels(values) == 1:
            messages.append(
                f"{WORD[axis].split()[0]} sensitivity unknown: include two more {more} in the"
                f" sweep (all runs have {column} {values[0]:.4g}; add {values[0] / 2:.4g} and"
                f" {values[0] * 2:.4g}); the optimal {WORD[axis]} is a guess, within a factor of"
                f" {math.exp(1.96 * CENTRE_SD):.0f}"
            )
    return messages


def _axes(kept: pd.DataFrame, axes: Sequence[str]) -> list[str]:
    """Axes of which too few values were trained in some settings."""
    messages = []
    for axis, column, _ in TUNED:
        alone = int((kept.groupby("cell")[column].nunique() == 1).sum())
        if alone and n_levels(kept[column].unique()) > 1:
            messages.append(
                f"{alone} of {kept['cell'].nunique()} settings have one {column} each: they do not"
                f" constrain the optimal {WORD[axis]}"
            )
    if "weight_decay" in kept and "wd" not in axes and kept["weight_decay"].nunique() > 1:
        messages.append(
            "weight_decay differs between runs, but no setting has three values above 0: its effect"
            " counts as noise; add values, or fit the runs of one weight decay"
        )
    return messages


def _exponents(axes: Sequence[str], solution: JointSolution, prior: Any, advice: bool) -> list[str]:
    """Exponents whose posterior is hardly narrower than their prior."""
    order = parameter_names(len(axes))
    rows = dict(zip(order, np.eye(len(order)), strict=True))
    exponents = {
        name: rows[name] for axis in axes for name in (f"{axis}.D", "loss.alpha", "loss.beta")
    }
    exponents |= {f"{axis}.N": rows[f"{axis}.along"] - rows[f"{axis}.D"] for axis in axes}
    weak = []
    for name, row in exponents.items():
        before = math.sqrt(float(row**2 @ prior[:, 1] ** 2))
        after = math.sqrt(float(row @ solution.covariance @ row))
        if after > PRIOR_DOMINATED * before:
            weak.append(f"{name} = {row @ solution.theta:.2g} ± {after:.2g} (prior ± {before:.2g})")
    if not weak:
        return []
    return [
        f"poorly constrained (prior-dominated): {', '.join(weak)}"
        + ("; add settings at more distant scales" if advice else "")
    ]


def _optima(axes: Sequence[str], solution: JointSolution) -> list[str]:
    """Axes whose optimum is uncertain even at the centre of the runs."""
    order = parameter_names(len(axes))
    at = {axis: order.index(f"{axis}.c") for axis in axes}
    sd = {axis: math.sqrt(float(solution.covariance[i, i])) for axis, i in at.items()}
    return [
        f"the optimal {WORD[axis]} of these runs is uncertain by a factor of {math.exp(error):.2g};"
        " add runs on both sides of it"
        for axis, error in sd.items()
        if error > UNCERTAIN
    ]


def _edges(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    """Settings whose optimum is outside the trained range, and whether all are."""
    outside = [cell["status"] for cell in cells if cell["status"] != "ok"]
    all_outside = len(outside) == len(cells)
    if (others := len(outside) - MOST_NAMED) > 0:
        outside[MOST_NAMED:] = [f"{others} more settings have their optimum outside their runs"]
    if all_outside:
        outside.insert(
            0, "no setting has its optimum inside its grid: the loss basin is extrapolated in all"
        )
    return outside


def _noise(solution: JointSolution, n_cells: int) -> list[str]:
    """Scatter and noise far above those of public sweeps."""
    scatter, noise = solution.scales.scatter[-1], solution.scales.noise
    messages = []
    if n_cells > 1 and scatter > HIGH_SCATTER:
        messages.append(
            f"the minimum losses of the settings scatter by {scatter:.1%} (sd) about the law: check"
            " that all losses have one unit, one tokenizer and one data set"
        )
    if noise > HIGH_NOISE:
        messages.append(
            f"runs near the minimum scatter by {noise:.2%} (sd) about the surface: the form fits"
            " badly, or the runs differ in something that is not recorded"
        )
    return messages


def edge(
    group: pd.DataFrame, row: Mapping[str, Any], axes: Sequence[str], columns: Mapping[str, str]
) -> str:
    """ "ok", or a sentence that says at which end of its runs the optimum of a setting is."""
    messages = []
    for axis in axes:
        column = columns[axis]
        low, high, best = float(group[column].min()), float(group[column].max()), row[column]
        if low < high and not low * (1 + 1e-9) < best < high * (1 - 1e-9):
            side = "below" if best < high else "above"
            messages.append(
                f"optimal {column} {best:.3g} {side} the trained range ({low:.3g} to {high:.3g})"
            )
    return (
        f"the setting with {human(row['n_params'])} parameters and {human(row['tokens'])} tokens:"
        f" {' and '.join(messages)}; extrapolated"
        if messages
        else "ok"
    )
