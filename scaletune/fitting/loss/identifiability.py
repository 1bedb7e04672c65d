"""Chooses which parameters of the loss law are free, by the sizes and token budgets of the runs."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.functional_forms import LN_ABSENT, Shape
from scaletune.fitting.table import n_levels

PUBLISHED = (0.35, 0.37)  # exponents (arXiv:2404.10102) if the runs do not identify them,
ASSUMED = (0.15, 0.6)  # and their range in the intervals of such a fit
MAX_DIFFERENCE = 0.1  # of alpha and beta, in the intervals of a fit that sets them equal

Array = NDArray[np.float64]


def choose_shape(n_params: Array, tokens: Array) -> Shape:
    """The shape of (ln E, ln A, ln B, alpha, beta) with the most parameters that are identified.

    Its notes say what is tied, fixed or absent, and which runs would identify it.
    """
    sizes, horizons = n_levels(n_params), n_levels(tokens)
    both = sizes > 1 and horizons > 1 and not _collinear(n_params, tokens)
    rows = len(n_params)
    if both and min(sizes, horizons) >= 3 and rows >= 6:
        return _shape([0, 1, 2, 3, 4])
    if both and max(sizes, horizons) >= 3 and rows >= 5:
        tied = (
            f"{sizes} sizes and {horizons} token budgets cannot separate alpha from beta: the loss "
            f"law sets them equal; {_missing_runs(sizes, horizons, rows)}"
        )
        return _shape([0, 1, 2, 3], tied, tie=True)
    fixed = (
        f"{rows} settings ({sizes} sizes, {horizons} token budgets) do not identify the exponents "
        "of the loss law: they are fixed at published values"
    )
    if both and rows >= 3:
        values = f"alpha {PUBLISHED[0]}, beta {PUBLISHED[1]}"
        return _shape([0, 1, 2], f"{fixed}, {values}; {_missing_runs(sizes, horizons, rows)}")
    term, levels = (2, horizons) if sizes == 1 else (1, sizes)
    other = "n_params" if term == 2 else "tokens"
    if levels == 1:
        return _shape(
            [0],
            "all runs have one size and one token budget, so the loss law is a constant; add runs "
            "at other sizes and token budgets",
        )
    absent = (
        f"the loss law has no term in `{other}`, because `{other}` does not vary independently; "
        f"add runs at a second value of `{other}`"
    )
    if levels >= 4:
        return _shape([0, term, term + 2], absent)
    return _shape([0, term], f"{fixed}; {absent}")


def _missing_runs(sizes: int, horizons: int, rows: int) -> str:
    """The runs to add: both exponents need three sizes, three token budgets and six settings."""
    missing = [
        f"{3 - present} more {what}{'s' if present < 2 else ''}"
        for present, what in ((sizes, "size"), (horizons, "token budget"))
        if present < 3
    ]
    needed = f"runs at {' and '.join(missing)}" if missing else f"{6 - rows} more settings"
    return f"add {needed} to identify both exponents"


def _shape(free: list[int], *notes: str, tie: bool = False) -> Shape:
    base = np.array([LN_ABSENT, LN_ABSENT, LN_ABSENT, *PUBLISHED])
    columns = np.eye(5)[:, free]
    if tie:
        columns[4, 3], base[4] = 1.0, 0.0
    base[[i for i in free if i > 2]] = 0.0
    base[[i for i in free if i < 3]] = 0.0
    return Shape(tuple(free), base, columns, notes)


def _collinear(n_params: Array, tokens: Array) -> bool:
    x, y = np.log(n_params) - np.log(n_params).mean(), np.log(tokens) - np.log(tokens).mean()
    return bool(1 - (x @ y) ** 2 / ((x @ x) * (y @ y)) < 1e-4)
