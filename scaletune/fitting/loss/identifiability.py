"""Which effects on the loss the runs do not measure, and which runs would measure them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from scaletune.fitting.loss.published import published_parameters
from scaletune.fitting.table import SAME_SCALE, n_levels

MIN_LEVELS, MIN_ROWS = 3, 6  # sizes and token budgets, and settings, that identify the law

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Unmeasured:
    """What a loss law takes from published laws, because the runs do not measure it."""

    columns: tuple[str, ...]
    """The columns whose effect on the loss is not measured; () if it is measured roughly."""

    is_tied: bool
    """Whether the runs identify the law if alpha = beta, so that no published law is needed."""

    sentence: str
    """For `Fit.status`: what is not measured, the published spread, and the runs to add."""


def find_unmeasured(
    n_params: Array, tokens: Array, fixed: Mapping[str, float | str] | None = None
) -> Unmeasured | None:
    """What these runs do not measure; None if they identify every free parameter.

    Args:
        n_params: (R) non-embedding parameters.
        tokens: (R) tokens.
        fixed: Parameters that are not fitted.
    """
    sizes, horizons, rows = n_levels(n_params), n_levels(tokens), len(n_params)
    free = {name for name in ("E", "A", "B", "alpha", "beta") if name not in (fixed or {})}
    one_size, one_horizon = sizes == 1, horizons == 1
    if one_size and one_horizon:
        cause = "there is one run" if rows == 1 else "all runs have one size and one token budget"
        return _unmeasured(("n_params", "tokens"), cause)
    if one_size and free & {"A", "alpha"}:
        return _unmeasured(("n_params",), "all runs have one size")
    if one_horizon and free & {"B", "beta"}:
        return _unmeasured(("tokens",), "all runs have one token budget")
    if not (one_size or one_horizon) and {"A", "B"} <= free and _collinear(n_params, tokens):
        cause = "`tokens` follows from `n_params` in all runs"
        return _unmeasured(("n_params", "tokens"), cause, "their separate effects")
    is_small = min(sizes, horizons) < MIN_LEVELS or rows < MIN_ROWS
    if not (rows <= len(free) if fixed else is_small):
        return None
    settings = f"{sizes} sizes and {horizons} token budgets"
    remedy = _missing_runs(sizes, horizons, rows)
    if not fixed and max(sizes, horizons) >= MIN_LEVELS and rows >= MIN_ROWS:
        cause = f"{settings} cannot separate alpha from beta: the loss law sets them equal"
        return Unmeasured((), True, f"{cause}; {remedy}")
    cause = f"{rows} settings ({settings}) do not identify the exponents of the loss law"
    spread = _spread(("n_params", "tokens"))
    return Unmeasured((), False, f"{cause}: the law and its intervals lean on {spread}; {remedy}")


def _unmeasured(columns: tuple[str, ...], cause: str, effects: str = "") -> Unmeasured:
    names = " and ".join(f"`{name}`" for name in columns)
    if len(columns) == 1:
        are, they, remedy = "is", f"the effect of {names}", f"runs at a second value of {names}"
    else:
        are, they = "are", effects or f"the effects of {names}"
        remedy = "runs at other sizes and, independently, at other token budgets"
    return Unmeasured(
        columns,
        False,
        f"{cause}, so {they} on the loss {are} not measured: the law and its intervals take"
        f" {'it' if are == 'is' else 'them'} from {_spread(columns)}; add {remedy}",
    )


def _spread(columns: tuple[str, ...]) -> str:
    """The number of published laws and the range of their exponents."""
    exponents = published_parameters()[:, 3:]
    ranges = [
        f"{name} {exponents[:, i].min():.2f} to {exponents[:, i].max():.2f}"
        for i, (name, column) in enumerate((("alpha", "n_params"), ("beta", "tokens")))
        if column in columns
    ]
    return f"{len(exponents)} published laws ({', '.join(ranges)})"


def _missing_runs(sizes: int, horizons: int, rows: int) -> str:
    """The runs to add: both exponents need three sizes, three token budgets and six settings."""
    missing = [
        f"{MIN_LEVELS - present} more {what}{'s' if present < MIN_LEVELS - 1 else ''}"
        for present, what in ((sizes, "size"), (horizons, "token budget"))
        if present < MIN_LEVELS
    ]
    needed = f"runs at {' and '.join(missing)}" if missing else f"{MIN_ROWS - rows} more settings"
    return f"add {needed} to identify both exponents"


def _collinear(n_params: Array, tokens: Array) -> bool:
    """Whether tokens follow a power of n_params within SAME_SCALE."""
    x, y = np.log(n_params) - np.log(n_params).mean(), np.log(tokens) - np.log(tokens).mean()
    rest = y - x * (x @ y) / (x @ x)
    return bool(1 - (x @ y) ** 2 / ((x @ x) * (y @ y)) < 1e-4) or bool(
        np.abs(rest).max() < np.log(SAME_SCALE)
    )
