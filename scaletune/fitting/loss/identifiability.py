"""Which parameters of the loss law the scales of the runs identify, and what to add for the others."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.functional_forms import OFF, Shape
from scaletune.fitting.table import n_levels

PUBLISHED = (0.35, 0.37)  # exponents assumed when the runs cannot give them: arXiv:2404.10102
ASSUMED = (0.15, 0.6)  # and the range of them that intervals then allow for
TIED = 0.1  # how far alpha and beta may differ in the intervals of a fit that ties them

Array = NDArray[np.float64]


def choose(n_params: Array, tokens: Array) -> Shape:
    """The richest shape of (ln E, ln A, ln B, alpha, beta) these scales identify; what is tied, fixed or left out is said."""
    sizes, horizons = n_levels(n_params), n_levels(tokens)
    both = sizes > 1 and horizons > 1 and not _collinear(n_params, tokens)
    rows = len(n_params)
    if both and min(sizes, horizons) >= 3 and rows >= 6:
        return _shape([0, 1, 2, 3, 4])
    if both and max(sizes, horizons) >= 3 and rows >= 5:
        said = f"{sizes} sizes and {horizons} token counts cannot tell alpha from beta: the loss law has them equal"
        return _shape([0, 1, 2, 3], f"{said}; {_add(sizes, horizons, rows)}", tie=True)
    fixed = f"loss-law exponents are not identified by {rows} cells ({sizes} sizes, {horizons} token counts): fixed at published values"
    if both and rows >= 3:
        return _shape(
            [0, 1, 2],
            f"{fixed}, alpha {PUBLISHED[0]}, beta {PUBLISHED[1]}; {_add(sizes, horizons, rows)}",
        )
    term, levels = (2, horizons) if sizes == 1 else (1, sizes)
    other = "n_params" if term == 2 else "tokens"
    if levels == 1:
        return _shape([0], "one scale only: the loss law is a constant")
    alone = f"the loss law has no term in `{other}`, which these cells do not vary on its own; runs at a second value of `{other}` would give it one"
    if levels >= 4:
        return _shape([0, term, term + 2], alone)
    return _shape([0, term], f"{fixed}; {alone}")


def _add(sizes: int, horizons: int, rows: int) -> str:
    """What would identify both exponents: three sizes, three token counts, six cells."""
    wanted = [
        f"runs at {3 - have} more {what}{'s' if have < 2 else ''}"
        for have, what in ((sizes, "size"), (horizons, "token count"))
        if have < 3
    ]
    return f"{' and '.join(wanted) or f'{6 - rows} more cells'} would identify both"


def _shape(free: list[int], *said: str, tie: bool = False) -> Shape:
    base = np.array([OFF, OFF, OFF, *PUBLISHED])
    columns = np.eye(5)[:, free]
    if tie:
        columns[4, 3], base[4] = 1.0, 0.0
    base[[i for i in free if i > 2]] = 0.0
    base[[i for i in free if i < 3]] = 0.0
    return Shape(tuple(free), base, columns, said)


def _collinear(n_params: Array, tokens: Array) -> bool:
    x, y = np.log(n_params) - np.log(n_params).mean(), np.log(tokens) - np.log(tokens).mean()
    return bool(1 - (x @ y) ** 2 / ((x @ x) * (y @ y)) < 1e-4)
