"""The values of a recipe that the placeholders of the `trainer` table stand for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe.placeholders import GIVEN
from scaletune.recipe.short_names import SHORT_NAMES
from scaletune.recipe.tables import RecipeTables
from scaletune.rules import Role, scale

ROLE_NAMES: dict[str, Role] = {
    "embedding": "emb",
    "hidden": "hid",
    "readout": "out",
    "vector": "vec",
}
"""Name in a placeholder -> role of a tensor: input layers; matrices whose fans both grow with
width; the readout; biases and gains."""
SCALARS = ("lr", "weight_decay", "eps", "init_std", "multiplier")
DERIVED_FROM = {
    "steps": "`budget.tokens` and `budget.batch_tokens`",
    "batch_sequences": "`budget` and `data.seq_len`",
    **{f"{s}.{r}": "`parametrization.base_width`" for s in SCALARS for r in ROLE_NAMES},
}
"""Placeholder that is computed -> the settings that it is computed from."""
DERIVED = frozenset(DERIVED_FROM)
SECTIONS = (
    *("model", "parametrization", "optimizer", "schedule"),
    *("training", "data", "budget", "my"),
)


def known_placeholders(recipe: RecipeTables) -> set[str]:
    """The placeholders that a recipe's templates may have, those of its axes and cells included."""
    names = {*setting_values(recipe, stated=False), *GIVEN, *DERIVED}
    return names | swept_paths(recipe)


def swept_paths(recipe: RecipeTables) -> set[str]:
    """Dotted path, and column name, of what axes and cells set."""
    swept = [*recipe.axes, *(name for cell in recipe.cells for name in cell)]
    paths = {SHORT_NAMES.get(name, name) for name in swept}
    return paths | {short for short, path in SHORT_NAMES.items() if path in paths}


PREDICTED = ("lr", "weight_decay")
"""Scalars that a fit predicts for a target, whose recipe need not state them."""


def require_stated(recipe: RecipeTables, is_target: bool = False) -> None:
    """UserError if a template has a placeholder whose value the recipe does not state.

    Args:
        recipe: The recipe.
        is_target: Whether a fit may give what it predicts.
    """
    for name, needs in sorted(unstated_placeholders(recipe).items()):
        if is_target and name.removeprefix("optimizer.").split(".")[0] in PREDICTED:
            continue
        raise UserError(f"the placeholder {{{name}}} needs {needs} in the recipe")


def unstated_placeholders(recipe: RecipeTables) -> dict[str, str]:
    """Placeholder of a template -> what the recipe must state for it to have a value."""
    stated = setting_values(recipe).keys() | swept_paths(recipe)
    available = stated | (GIVEN.keys() - DERIVED) | derived_values(recipe).keys()
    needs = {
        name: DERIVED_FROM.get(name, f"`{SHORT_NAMES.get(name, name)}`")
        for name in recipe.trainer.names() - available
    }
    for name in recipe.trainer.names() & DERIVED:
        scalar = name.split(".")[0]
        if scalar in ("lr", "weight_decay") and scalar not in stated:
            needs[name] = f"`{SHORT_NAMES[scalar]}`"
    return needs


def setting_values(recipe: RecipeTables, stated: bool = True) -> dict[str, Any]:
    """Dotted path, or column name, -> value of the settings of a point.

    Args:
        recipe: The point.
        stated: Whether only what the recipe states counts: a trainer is told nothing else, since
            our defaults say nothing about it.
    """
    values: dict[str, Any] = {"seed": recipe.seed, "model.depth": recipe.model.depth}
    values["engine.accumulation"] = recipe.engine.accumulation
    for name in SECTIONS:
        table = getattr(recipe, name)
        own = isinstance(table, Mapping)
        values |= _flatten(name, table if own else table.model_dump(exclude_unset=stated))
    return values | {short: values[path] for short, path in SHORT_NAMES.items() if path in values}


def _flatten(prefix: str, table: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in table.items():
        path = f"{prefix}.{name}"
        values |= _flatten(path, value) if isinstance(value, Mapping) else {path: value}
    return values


def derived_values(recipe: RecipeTables) -> dict[str, Any]:
    """The placeholders that are computed from a point's settings, as far as it states them."""
    values: dict[str, Any] = {}
    if recipe.has_budget:
        values["steps"] = recipe.budget.steps
        if "seq_len" in recipe.data.model_fields_set:
            values["batch_sequences"] = recipe.budget.batch_tokens // recipe.data.seq_len
    if recipe.parametrization.model_fields_set:
        for name, role in ROLE_NAMES.items():
            values |= {f"{key}.{name}": v for key, v in role_scalars(recipe, role).items()}
    return values


def role_scalars(recipe: RecipeTables, role: Role) -> dict[str, float]:
    """lr, weight decay, eps, init std and multiplier of the tensors of a role at a point's width.

    For trainers that take one number per role. Tensors whose fans do not grow like the width need a
    plan by name instead (`plan.json`).
    """
    p, optimizer = recipe.parametrization, recipe.optimizer
    m = recipe.model.width / p.base_width
    s = scale(p.form, role, m, m, family=optimizer.rule)
    own = {
        "emb": p.embedding_multiplier,
        "out": p.logits_multiplier,
    }.get(role, 1.0)
    return {
        "lr": optimizer.lr * s.lr,
        "weight_decay": optimizer.weight_decay * s.weight_decay,
        "eps": optimizer.eps * s.eps,
        "init_std": p.init_std * s.std,
        "multiplier": own * s.multiplier,
    }
