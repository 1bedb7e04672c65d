"""Selects the runs of a FLOP budget (a slice) through which a parabola in ln n_params is fitted."""

from __future__ import annotations

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from scaletune.errors import UserError
from scaletune.fitting.relations.relation import Array
from scaletune.fitting.relations.rows import scale_levels

NEAR_MINIMUM = 5.0  # the parabola in ln n_params holds within this factor of the minimum
FEWEST_SIZES = 4  # sizes near the minimum that a parabola needs
ROUNDS = 10  # iterations until the rows near the minimum no longer change
SETTINGS = ("lr", "batch_tokens", "weight_decay")
OTHER_SETTING = "another run of this size and budget has a lower loss at other settings"
OTHERWISE = (
    "fit n_params and tokens together with `chinchilla` or `loss_nd`, or training curves with "
    "`frontier`"
)
NO_MINIMUM = (
    "the fitted parabola has no minimum inside the sizes, so it is no optimum: add sizes on both "
    "sides of the lowest loss"
)


def require_budgets(rows: pd.DataFrame) -> None:
    """Raises a UserError if no FLOP budget has enough sizes for a parabola."""
    budgets = scale_levels(rows["flops"].to_numpy(float))
    sizes = [
        _n_sizes(rows["n_params"].to_numpy(float)[budgets == budget])
        for budget in range(budgets.max() + 1)
    ]
    if max(sizes) >= FEWEST_SIZES:
        return
    raise UserError(
        f"isoflop needs {FEWEST_SIZES} sizes at one FLOP budget (within 1 %), but of the "
        f"{len(sizes)} budgets in {len(rows)} runs none has more than {max(sizes)}: {OTHERWISE}; "
        "if a column holds the nominal budget, name it: --map flops=NAME"
    )


def _n_sizes(sizes: Array) -> int:
    return int(scale_levels(sizes).max()) + 1


def near_minimum(rows: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Rows of a budget within the factor NEAR_MINIMUM of the minimum of their own parabola.

    Returns:
        The rows, and {id: reason} of the others.

    Raises:
        UserError: The budget has no minimum inside its sizes.
    """
    best = _best_settings(rows)
    dropped = dict.fromkeys(rows.loc[~rows["id"].isin(best["id"]), "id"], OTHER_SETTING)
    best = best.sort_values(["n_params", "loss", "id"])
    near = _window(*(np.log(best[name].to_numpy(float)) for name in ("n_params", "loss")))
    far = f"more than {NEAR_MINIMUM:g}x from the size with the lowest loss at its budget"
    return best[near], dropped | dict.fromkeys(best.loc[~near, "id"], far)


def _window(x: Array, y: Array) -> NDArray[np.bool_]:
    """Which runs are near the minimum of the parabola through them; x, y: ln size, ln loss."""
    number = scale_levels(np.exp(x))
    last = int(number.max())
    _require_sizes(last + 1, "")
    sizes, lowest = (
        np.array([np.median(values[number == i]) for i in range(last + 1)]) for values in (x, y)
    )
    if (end := int(lowest.argmin())) in (0, last):
        raise UserError(_at_end("smallest" if end == 0 else "largest"))
    centre = float(sizes[_smoothed_argmin(lowest)])
    near = np.zeros(len(x), bool)
    for _ in range(ROUNDS):
        before, near = near, np.abs(x - centre) <= np.log(NEAR_MINIMUM) + 1e-9
        if (near == before).all():
            break
        _require_sizes(len(np.unique(number[near])), f" within {NEAR_MINIMUM:g}x of the minimum")
        _, slope, half_curvature = robust_parabola(x[near] - centre, y[near])
        shift = -slope / (2 * half_curvature) if half_curvature > 0 else np.inf
        if not x.min() < centre + shift < x.max():
            raise UserError(NO_MINIMUM)
        centre += float(shift)
    return near


def _require_sizes(n_sizes: int, where: str) -> None:
    if n_sizes < FEWEST_SIZES:
        raise UserError(
            f"it has {n_sizes} size{'s' if n_sizes != 1 else ''}{where}, but a parabola needs "
            f"{FEWEST_SIZES}: add sizes at this budget"
        )


def _at_end(end: str) -> str:
    return (
        f"the lowest loss is at the {end} size, so the optimum is beyond the sizes: "
        f"add {'smaller' if end == 'smallest' else 'larger'} sizes at this budget"
    )


def _best_settings(rows: pd.DataFrame) -> pd.DataFrame:
    """The run with the lowest loss at each size, if the runs of a size differ in their settings."""
    names = [name for name in SETTINGS if name in rows]
    if not names:
        return rows
    size = scale_levels(rows["n_params"].to_numpy(float))
    varied = rows.groupby(size)[names].nunique().max(axis=1) > 1
    lowest = rows.groupby(size)["loss"].transform("min") == rows["loss"]
    return rows[lowest | ~varied.to_numpy()[size]]


def _smoothed_argmin(lowest: Array) -> int:
    """Index of the lowest running median of three, so that one low outlier does not decide."""
    middle = np.median(np.stack([lowest[:-2], lowest[1:-1], lowest[2:]]), axis=0)
    return int(middle.argmin()) + 1


def robust_parabola(x: Array, y: Array, rounds: int = 20) -> Array:
    """(3): coefficients of 1, x and x**2, by least squares with soft L1 weights."""
    terms, root = np.stack([np.ones_like(x), x, x**2], 1), np.ones(len(x))
    for _ in range(rounds):
        fitted = np.linalg.lstsq(terms * root[:, None], y * root, rcond=None)[0]
        errors = y - terms @ fitted
        scale = max(2 * 1.4826 * float(np.median(np.abs(errors))), 1e-9)
        root = (1 + (errors / scale) ** 2) ** -0.25 if len(x) > FEWEST_SIZES else root
    return np.asarray(fitted, float)
