"""`Relation`: a formula between columns of a table, with the search ranges of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

Array = NDArray[np.float64]
Columns = Mapping[str, Array]
Values = Mapping[str, float]


@dataclass(frozen=True)
class Box:
    """The search range of a parameter."""

    low: float
    high: float

    log: bool = True
    """Solve for the logarithm of the parameter."""

    at_origin: bool = False
    """The parameter is a value at column = 1, far from any row: a wide interval is expected."""


@dataclass(frozen=True)
class RelationColumn:
    """A column that a relation reads."""

    name: str

    description: str
    """What the column holds, with its unit."""

    default: float | None = None
    """Value if the table has no such column; without a default the column is required."""

    positive: bool = True
    """Values must be above 0."""


@dataclass(frozen=True, kw_only=True)
class Relation:
    """`output = function(columns, parameters)`, fitted by robust least squares."""

    id: str
    formula: str
    source: str
    inputs: tuple[RelationColumn, ...]
    output: RelationColumn
    parameters: Mapping[str, Box]
    function: Callable[[Columns, Values], Array]

    along: str
    """The input on the horizontal axis of a plot."""

    log: bool = True
    """Use residuals of ln output instead of output."""

    derived: Callable[[Values], Mapping[str, float]] | None = None
    """Further quantities computed from the parameters."""

    groups: tuple[str, ...] = ()
    """Columns of which each combination of values is fitted separately, if the table has them."""

    across: Relation | None = None
    """A relation that is fitted to the parameters and derived quantities of the groups."""

    prepare: Callable[[pd.DataFrame], Mapping[str, Any]] | None = None
    """Computes columns from whole runs; the rows keep the order of the table."""

    select: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    """Selects the rows of a group for which the formula holds."""

    robust: bool = True
    """Use soft L1 with a scale of twice the median residual; False: least squares, as published."""

    reduce: Callable[[pd.DataFrame], pd.DataFrame] | None = None
    """Computes the rows to fit from the rows of the table."""

    curves: bool = False
    """Rows with one run_id are checkpoints of one run and are resampled together."""

    fixed: Mapping[str, float] = field(default_factory=dict)
    """Parameters with given values."""

    @property
    def free(self) -> list[str]:
        return [name for name in self.parameters if name not in self.fixed]
