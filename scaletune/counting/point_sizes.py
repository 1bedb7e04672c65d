"""What is known of the size of a point before it is trained, whoever counts it.

Models of the zoo are counted from their config. Of a user's model the recipe may state the counts;
`scaletune.sweeping.sizes.point_sizes` also asks `model.build` and `trainer.describe`.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.zoo import OwnConfig


class PointSizes(Protocol):
    """The sizes of a point. NaN where nobody has stated them."""

    @property
    def n_params(self) -> float:
        """Non-embedding parameters."""

    @property
    def flops(self) -> float:
        """Training FLOPs."""

    @property
    def flops_from(self) -> str:
        """Where the FLOPs come from."""


Measure = Callable[[Recipe], PointSizes]


@dataclass(frozen=True)
class StatedSizes:
    """The sizes of a user's model that its recipe states."""

    n_params: float
    flops: float
    flops_from: str = "6 N D"


def stated_sizes(recipe: Recipe) -> StatedSizes:
    """The sizes that the recipe of a user's model states."""
    model = recipe.model
    n_params = float(model.n_params or math.nan) if isinstance(model, OwnConfig) else math.nan
    tokens = recipe.budget.tokens if recipe.has_budget else math.nan
    return StatedSizes(n_params, 6.0 * n_params * tokens)


HOW_TO_COUNT = "state `model.n_params`, or give `trainer.describe` or `model.build`"
HOW_IN_PYTHON = (
    ", which the command line asks (in Python: sizes=scaletune.sweeping.sizes.point_sizes)"
)


def require_n_params(sizes: PointSizes, subject: str) -> float:
    """The non-embedding parameters of a point; UserError if nobody has stated them."""
    if sizes.n_params == sizes.n_params:
        return sizes.n_params
    raise UserError(
        f"{subject} needs the non-embedding parameters of your model, but nobody states them:"
        f" {HOW_TO_COUNT}{HOW_IN_PYTHON}"
    )
