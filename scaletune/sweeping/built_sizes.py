"""The sizes of a user's module, counted on the meta device.

The user's function runs in this process, because a subprocess would import torch anew (seconds).
"""

from __future__ import annotations

from scaletune import counting, data
from scaletune.parametrizing.model_counts import count_model
from scaletune.recipe import Recipe
from scaletune.sweeping.sizes import Sizes


def built_sizes(recipe: Recipe, corpus: data.Corpus) -> Sizes:
    """The sizes of a point that scaletune's loop trains.

    Raises:
        UserError: The module cannot be built or planned.
    """
    from scaletune.parametrizing.recipe_model import check_supported

    check_supported(recipe)
    counts = count_model(recipe, corpus.vocab_size, corpus.features)
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


def built_counts(recipe: Recipe) -> dict[str, float]:
    """Both parameter counts of the module of a foreign trainer's `model.build`.

    The vocabulary is that of `data`, as far as the recipe states it: its data are not read.
    """
    counts = count_model(recipe, counting.default_vocab_size(recipe))
    return {"n_params": counts.n_params, "n_params_total": counts.n_params_total}
