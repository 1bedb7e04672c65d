"""The sizes of a user's module, counted on the meta device.

The user's function runs in this process, because a subprocess would import torch anew (seconds).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from scaletune import counting, data
from scaletune.models import own
from scaletune.parametrizing.model_counts import count_model, module_params
from scaletune.parametrizing.recipe_model import check_supported
from scaletune.recipe import DIGITS, POWER_LAW, PYTHON_STDLIB, Recipe


def built_model_counts(recipe: Recipe, corpus: data.Corpus) -> counting.ModelCounts:
    """The counts of a point that scaletune's loop trains.

    Raises:
        UserError: The module cannot be built or planned.
    """
    check_supported(recipe)
    return count_model(recipe, corpus.vocab_size, corpus.features)


def built_counts(recipe: Recipe) -> dict[str, float]:
    """Both parameter counts of the module of a foreign trainer's `model.build`.

    Its data are not read: the vocabulary is what `[model]`, `[my]` or `[data]` states.
    """
    vocab_size = own.stated_vocab_size(recipe, counting.default_vocab_size(recipe))
    module = own.build_module(recipe, vocab_size, meta=True)
    n_params, total = module_params(module, recipe, vocab_size)
    return {"n_params": n_params, "n_params_total": total}


def count_built(recipe: Recipe, vocab_size: int) -> dict[str, Any]:
    """The counts of a point with `model.build`, as `scaletune.count` gives them."""
    check_supported(recipe)
    counts = count_model(recipe, vocab_size, _features(recipe))
    budget, total = recipe.budget, counts.n_params_total
    parts = {"exact": counts.flops_per_token, "six_n": 6.0 * counts.n_params}
    return {
        "family": recipe.model.family,
        "width": recipe.model.width,
        "depth": counts.depth,
        "vocab_size": vocab_size,
        "params": {
            "embedding and readout": total - counts.n_params,
            "other": counts.n_params,
            "n_params": counts.n_params,
            "n_params_total": total,
        },
        "tokens": budget.tokens,
        "batch_tokens": budget.batch_tokens,
        "steps": budget.steps,
        "flops_per_token": counts.flops_per_token,
        "flops": counts.flops_per_token * budget.tokens,
        "flops_from": counts.flops_from,
        "flops_per_token_by": parts,
        "memory_bytes": {
            "weights_optimizer": _weight_bytes(total, recipe.optimizer.family),
            "activations": None,
        },
        "bytes_per_step": None,
        "seconds": counting.seconds(recipe, vocab_size, counts=counts),
    }


def _weight_bytes(total: int, family: str) -> int | None:
    """Bytes of weights, gradients and optimizer states; None where they depend on the shapes."""
    if family in ("shampoo", "soap", "adafactor"):
        return None
    return 4 * total * (2 + counting.STATE_FLOATS_PER_WEIGHT.get(family, 2))


def _features(recipe: Recipe) -> tuple[int, ...]:
    """The shape of an example, read from data that are on this machine; () for text."""
    source = recipe.data.source
    if source == PYTHON_STDLIB or not (source in (DIGITS, POWER_LAW) or Path(source).exists()):
        return ()
    return data.load(recipe.data).features
