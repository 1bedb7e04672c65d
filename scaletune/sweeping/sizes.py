"""What is known of a point before it is trained: parameters, tokens, FLOPs, seconds."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from scaletune import counting, data
from scaletune.errors import UserError
from scaletune.recipe import Recipe
from scaletune.zoo import OwnConfig


@dataclass(frozen=True)
class Sizes:
    """The sizes of a point. NaN where nobody has stated them."""

    n_params: float = math.nan
    """Non-embedding parameters."""
    n_params_total: float = math.nan
    tokens: float = math.nan
    batch_tokens: float = math.nan
    flops: float = math.nan
    """Training FLOPs."""
    flops_from: str = ""
    """Where the FLOPs come from: "model", "described", "6 N D" or "6 N_total D"."""
    seconds: float = 0.0
    """Estimated seconds of training: an order, not a promise."""
    digest: str = ""
    """Digest of the data that scaletune reads."""


def point_sizes(recipe: Recipe) -> Sizes:
    """The sizes of a point: of the zoo by counting, of the user's model by building it without
    memory, of the user's trainer by what the recipe states or its `describe` says.

    Raises:
        UserError: No worker could train the point, or `describe` fails.
    """
    if recipe.foreign:
        return foreign_sizes(recipe)
    corpus = data.load(recipe.data)
    data.check_recipe(recipe, corpus)
    if isinstance(recipe.model, OwnConfig):
        from scaletune.sweeping.built_sizes import built_model_counts  # imports torch

        counts = built_model_counts(recipe, corpus)
    else:
        counting.multipliers(recipe, corpus.vocab_size)  # refuses a form that cannot tie its head
        counts = counting.zoo_counts(recipe.model, corpus.vocab_size, recipe.data.seq_len)
    return Sizes(
        n_params=counts.n_params,
        n_params_total=counts.n_params_total,
        tokens=recipe.budget.tokens,
        batch_tokens=recipe.budget.batch_tokens,
        flops=counts.flops_per_token * recipe.budget.tokens,
        flops_from=counts.flops_from,
        seconds=counting.seconds(recipe, corpus.vocab_size, counts=counts),
        digest=corpus.digest,
    )


STATED_BY = {"n_params": "`model.n_params`", "tokens": "`budget.tokens`"}
"""Size -> the setting that states it. FLOPs follow from both."""


def require_known(sizes: Sizes, subject: str, recipe: Recipe, names: Sequence[str]) -> None:
    """UserError unless sizes are known before anything is trained.

    Args:
        sizes: The sizes of the point.
        subject: What needs them.
        recipe: The point.
        names: The sizes that are needed.
    """
    if not any(math.isnan(getattr(sizes, name)) for name in names):
        return
    unknown = [name for name in STATED_BY if math.isnan(getattr(sizes, name))]
    also = " or `model.build`" if "n_params" in unknown else ""
    raise UserError(
        f"{subject} needs {' and '.join(f'`{name}`' for name in unknown)} before a trial is"
        f" trained, but nobody states {'it' if len(unknown) == 1 else 'them'} at width"
        f" {recipe.model.width}: state {' and '.join(STATED_BY[name] for name in unknown)}, or give"
        f" `trainer.describe`{also}"
    )


def foreign_sizes(recipe: Recipe) -> Sizes:
    """The sizes of a point of the user's trainer."""
    from scaletune.sweeping.trainers.description import describe

    known = _stated(recipe) | describe(recipe)
    n, total = known.get("n_params", math.nan), known.get("n_params_total", math.nan)
    tokens = known.get("tokens", math.nan)
    flops, source = estimate_flops(n, total, tokens)
    for name, origin in (("model_flops", "model"), ("flops", "described")):
        flops, source = (known[name], origin) if name in known else (flops, source)
    return Sizes(
        n_params=n,
        n_params_total=total,
        tokens=tokens,
        batch_tokens=known.get("batch_tokens", math.nan),
        flops=flops,
        flops_from=source,
        seconds=_order_of_cost(recipe, flops),
    )


def _stated(recipe: Recipe) -> dict[str, float]:
    """What the recipe states; the counts of a zoo model that the user's trainer builds."""
    known: dict[str, float] = {}
    if recipe.has_budget:
        known |= {"tokens": recipe.budget.tokens, "batch_tokens": recipe.budget.batch_tokens}
    model = recipe.model
    if not isinstance(model, OwnConfig):
        return known | _zoo_counts(recipe)
    stated = {"n_params": model.n_params, "n_params_total": model.n_params_total}
    known |= {name: float(value) for name, value in stated.items() if value}
    if model.build and len(known) < 4:
        from scaletune.sweeping.built_sizes import built_counts

        known = built_counts(recipe) | known
    return known


def _zoo_counts(recipe: Recipe) -> dict[str, float]:
    """The counts of a zoo model, as far as they need no vocabulary that the recipe leaves open."""
    vocab_size = counting.default_vocab_size(recipe)
    counts = counting.params(recipe.model, vocab_size)
    known: dict[str, float] = {"n_params": counts["n_params"]}
    if not {"vocab_size", "source"} & recipe.data.model_fields_set:
        return known
    known["n_params_total"] = counts["n_params_total"]
    if recipe.has_budget and recipe.states("data.seq_len"):
        per_token = counting.flops_per_token(recipe.model, vocab_size, recipe.data.seq_len)
        known["model_flops"] = per_token * recipe.budget.tokens
    return known


def size_key(point: Recipe) -> tuple[Any, ...]:
    """What the sizes of a point depend on: equal for points that differ in lr or seed alone."""
    return (
        *(point.model, point.parametrization, point.optimizer.rule, point.data, point.budget),
        *(tuple(sorted(point.my.items())), repr(point.trainer)),
    )


def estimate_flops(n_params: float, n_params_total: float, tokens: float) -> tuple[float, str]:
    """(training FLOPs, by which count): 6 N D (arXiv:2001.08361)."""
    if n_params == n_params:
        return 6.0 * n_params * tokens, "6 N D"
    return 6.0 * n_params_total * tokens, "6 N_total D"


def _order_of_cost(recipe: Recipe, flops: float) -> float:
    """Seconds by which trials are ordered, the longest first."""
    if flops == flops:
        return flops / 1e11
    return recipe.budget.tokens * recipe.model.width**2 * recipe.model.depth / 1e11
