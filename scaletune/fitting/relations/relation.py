"""`Relation`: a formula between columns of a table, with the search ranges of its parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

if TYPE_CHECKING:
    from scaletune.records import Fit

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
class GroupFit:
    """The fit of one group of rows, or the reason why it has none."""

    key: dict[str, Any]
    """Values of the group's columns."""

    rows: pd.DataFrame
    """The rows that were fitted."""

    fit: Fit | None = None
    reason: str = ""
    dropped: dict[str, str] = field(default_factory=dict)
    """Id of a row that is not used -> the reason."""

    se: Mapping[str, float] = field(default_factory=dict)
    """Standard errors at a scatter of 1, of the logarithms where the box says so."""

    bounds: Sequence[str] = ()
    """Parameters that are at the end of their search range."""


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

    required: tuple[RelationColumn, ...] = ()
    """Columns that the table must have besides the inputs and the output."""

    labels: tuple[str, ...] = ()
    """Columns of text that the table must have."""

    select: Callable[[pd.DataFrame], tuple[pd.DataFrame, dict[str, str]]] | None = None
    """Selects the rows of a group for which the formula holds, with {id: reason} of the others.

    A UserError is the reason why the group has no such rows."""

    reject: Callable[[pd.DataFrame, Values], str] | None = None
    """The reason why the solution of a group is not used, from its rows and parameters; or ""."""

    design: Callable[[pd.DataFrame], None] | None = None
    """Raises a UserError if the table as a whole does not suit the relation."""

    otherwise: str = ""
    """What to fit if no group of the table suits the relation."""

    compares_sizes: bool = False
    """The relation compares losses of different sizes, so all must be of one data set."""

    review: Callable[[Fit, Sequence[GroupFit], Sequence[float]], Fit] | None = None
    """Compares the fit with another one of the same rows.

    Its arguments are the fit, the groups, and their weights in the relation across the groups."""

    guess: Callable[[Columns, Array], Values] | None = None
    """Parameters near the solution, from the inputs and the output: the one start of the solver."""

    robust: bool = True
    """Use soft L1 with a scale of twice the median residual; False: least squares, as published."""

    reduce: Callable[[pd.DataFrame], tuple[pd.DataFrame, dict[str, str]]] | None = None
    """Computes the rows to fit from the rows of the table, and {id: reason} of unused rows."""

    curves: bool = False
    """Rows with one run_id are checkpoints of one run and are resampled together."""

    fixed: Mapping[str, float] = field(default_factory=dict)
    """Parameters with given values."""

    @property
    def columns(self) -> tuple[RelationColumn, ...]:
        """The columns of numbers that the table must have."""
        return (*self.required, *self.inputs, self.output)

    @property
    def free(self) -> list[str]:
        return [name for name in self.parameters if name not in self.fixed]
