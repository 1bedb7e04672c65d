"""What one fitted relation is: a formula between columns of anyone's table, the boxes its parameters live in, what follows from them."""

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
    """Where a parameter is looked for; solved as its logarithm when that is what it varies by."""

    low: float
    high: float
    log: bool = True
    far: bool = False  # its value at one of everything, far from any row: wide by construction, and no doubt of the law's


@dataclass(frozen=True)
class Column:
    """A column a relation reads, with its unit; one without `default` must be there."""

    name: str
    means: str
    default: float | None = None
    positive: bool = True


@dataclass(frozen=True, kw_only=True)
class Relation:
    """`output = function(columns, parameters)`, fitted by robust least squares on ln output, or on output where not `log`."""

    id: str
    formula: str
    source: str
    inputs: tuple[Column, ...]
    output: Column
    parameters: Mapping[str, Box]
    function: Callable[[Columns, Values], Array]
    along: str  # the input it is drawn against
    log: bool = True
    derived: Callable[[Values], Mapping[str, float]] | None = (
        None  # what users ask of the parameters
    )
    groups: tuple[
        str, ...
    ] = ()  # columns whose every combination is fitted by itself, where the table has them
    across: Relation | None = None  # fitted to the groups' parameters and derived values
    prepare: Callable[[pd.DataFrame], Mapping[str, Any]] | None = (
        None  # columns made of whole runs, rows in the table's order
    )
    select: Callable[[pd.DataFrame], pd.DataFrame] | None = (
        None  # the rows of a group that the formula is about
    )
    robust: bool = (
        True  # soft L1 about twice the residuals' median; False: least squares as published
    )
    reduce: Callable[[pd.DataFrame], pd.DataFrame] | None = (
        None  # rows made of the table's, before anything is read
    )
    curves: bool = False  # rows with one run_id are checkpoints of one run: resampled together
    known: Mapping[str, float] = field(default_factory=dict)  # parameters the caller holds fixed

    @property
    def free(self) -> list[str]:
        return [name for name in self.parameters if name not in self.known]
