"""Size and cost of a point that a plan may train."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from scaletune import counting
from scaletune.counting.point_sizes import Measure, PointSizes, stated_sizes
from scaletune.errors import UserError
from scaletune.recipe import Recipe, with_settings
from scaletune.zoo import OwnConfig

FLOPS_PER_SECOND = 6e10
"""One laptop core."""


@dataclass(frozen=True)
class PointCost:
    """What a run of a point costs."""

    n_params: int
    """Non-embedding parameters."""
    flops: float
    seconds: float
    """Estimated."""


CostOf = Callable[[Recipe], PointCost]


def cost_function(
    target: Recipe, vocab_size: int, flops_per_second: float | None, sizes: Measure | None
) -> CostOf:
    """A function from a point to its cost.

    Args:
        target: The target of the plan.
        vocab_size: Number of tokens of the vocabulary.
        flops_per_second: Speed from which seconds are estimated.
        sizes: Measures a model that is not in the zoo.
    """
    rate = flops_per_second or FLOPS_PER_SECOND
    if not isinstance(target.model, OwnConfig):
        return lambda point: _zoo_cost(point, vocab_size, rate)
    measure = sizes or stated_sizes
    return lambda point: _own_cost(measure(point), point, rate)


def _zoo_cost(point: Recipe, vocab_size: int, rate: float) -> PointCost:
    per_token = counting.flops_per_token(point.model, vocab_size, point.data.seq_len)
    return PointCost(
        counting.params(point.model, vocab_size)["n_params"],
        per_token * point.budget.tokens,
        counting.seconds(point, vocab_size, rate),
    )


def _own_cost(sizes: PointSizes, point: Recipe, rate: float) -> PointCost:
    if math.isnan(sizes.n_params) or math.isnan(sizes.flops):
        raise UserError(
            "a plan needs the non-embedding parameters of your model at every width, but nobody"
            f" gives them at width {point.model.width}: give `trainer.describe` or `model.build`,"
            " which the command line asks (in Python: sizes=scaletune.sweeping.sizes.point_sizes)"
        )
    return PointCost(round(sizes.n_params), sizes.flops, sizes.flops / rate)


def proxy(target: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The target with other sizes, without the counts that it states of a user's model."""
    model = target.model
    if not isinstance(model, OwnConfig):
        return with_settings(target, settings)
    if "depth" not in model.model_fields_set:
        settings = {name: value for name, value in settings.items() if name != "depth"}
    counts = [name for name in ("n_params", "n_params_total") if getattr(model, name)]
    return with_settings(target, {**settings, **{f"model.{name}": None for name in counts}})
