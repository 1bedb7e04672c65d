"""`plan.json`: the parametrization of a foreign trainer's model, tensor by tensor.

The module that `model.build` returns is planned by `parametrize` at the point's width; the user's
trainer applies the plan to its own copy of the module (`scaletune.trial.apply_plan` and
`param_groups`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from scaletune import counting
from scaletune.models import own
from scaletune.parametrizing.apply import module_multipliers, padding_rows
from scaletune.parametrizing.recipe_model import plan_module, tensor_eps
from scaletune.parametrizing.row import Row
from scaletune.recipe import Recipe

SCHEMA = "scaletune.trial_plan/1"


def own_plan(recipe: Recipe) -> dict[str, Any]:
    """The plan of a point as plain values.

    Returns:
        {"form", "base_width", "width", "tensors", "multipliers"}. A tensor has its name, role and
        shape; its `multiplier`; `init_std` of a normal draw, or `init_value` (a constant), or
        `init_scale` (a factor on the values that the module draws itself); `padding`, the row of an
        embedding that stays zero; its peak `lr`,
        `weight_decay` and `eps`, null where the recipe does not state the value at the base width.
        An entry of "multipliers" is a module, its factor, and whether it multiplies the module's
        "input" or "output" (`share`: the first part of the last dimension).

    Raises:
        UserError: The module cannot be built or planned.
    """
    vocab_size = own.stated_vocab_size(recipe, counting.default_vocab_size(recipe))
    with _one_thread():  # with values: tensors that start constant stay constant
        module = own.build_module(recipe, vocab_size)
        plan = plan_module(recipe, vocab_size, module)
        multipliers = module_multipliers(module, plan.rows, plan.branches, plan.queries)
        padding = padding_rows(module)
    return {
        "schema": SCHEMA,
        "form": plan.form,
        "optimizer": plan.optimizer,
        "base_width": recipe.parametrization.base_width,
        "width": recipe.model.width,
        "tensors": [_tensor(row, recipe) | {"padding": padding[row.name]} for row in plan.rows],
        "multipliers": multipliers,
        "notes": list(plan.notes),
    }


@contextmanager
def _one_thread() -> Iterator[None]:
    """Without other threads of torch, this process can still be forked safely."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def _tensor(row: Row, recipe: Recipe) -> dict[str, Any]:
    return {
        "name": row.name,
        "role": row.role,
        "shape": [size for _, size in row.shape],
        "multiplier": row.multiplier,
        "tied": dict(row.tied),
        "init_std": row.init_std,
        "init_value": row.init_value,
        "init_scale": row.init_scale,
        "lr": row.lr if recipe.states("optimizer.lr") else None,
        "weight_decay": row.weight_decay if recipe.states("optimizer.weight_decay") else None,
        "eps": tensor_eps(row, recipe),
    }
