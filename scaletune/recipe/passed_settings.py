"""Which of the swept settings the command of a trainer gets."""

from __future__ import annotations

from scaletune.recipe.placeholder_values import ROLE_NAMES, SCALARS
from scaletune.recipe.placeholders import placeholder_names
from scaletune.recipe.short_names import SHORT_NAMES
from scaletune.recipe.tables import RecipeTables

USES = {
    "steps": ("budget.tokens", "budget.batch_tokens"),
    "batch_sequences": ("budget.batch_tokens", "data.seq_len"),
    **{f"{scalar}.{role}": (f"optimizer.{scalar}",) for scalar in SCALARS for role in ROLE_NAMES},
}
"""Placeholder that is computed -> settings that it passes on."""
PLANNED = ("optimizer.", "parametrization.")
"""Tables that a trainer with `model.build` gets through its plan."""
COUNTS = ("model.n_params", "model.n_params_total")
"""Settings that state the size of a model: no trainer needs them."""


def swept_and_not_passed(recipe: RecipeTables) -> list[str]:
    """The axes and settings of cells that no placeholder of `trainer.command` stands for.

    The trainer may read them in its `trial.json`. If it does not, their values train the same.
    """
    trainer = recipe.trainer
    if not trainer.command:
        return []
    texts = [*trainer.command, *trainer.env.values()]
    names = {name for text in texts for name in placeholder_names("trainer.command", text)}
    passed = {path for name in names for path in (SHORT_NAMES.get(name, name), *USES.get(name, ()))}
    by_plan = any(name.partition(".")[2] in ROLE_NAMES for name in names)
    by_plan = by_plan or bool(getattr(recipe.model, "build", ""))
    swept = dict.fromkeys([*recipe.axes, *(name for cell in recipe.cells for name in cell)])
    paths = {name: SHORT_NAMES.get(name, name) for name in swept}
    return [
        name
        for name, path in paths.items()
        if path not in passed and path not in COUNTS and not (by_plan and path.startswith(PLANNED))
    ]


def unpassed_sentence(recipe: RecipeTables) -> str:
    """A caution about `swept_and_not_passed`; empty if there is nothing to say."""
    names = swept_and_not_passed(recipe)
    if not names:
        return ""
    listed = ", ".join(f"{{{name}}}" for name in names)
    return (
        f"Caution: `trainer.command` has no placeholder {listed}: unless the trainer reads"
        " `scaletune.trial.settings`, all values of this axis train the same"
    )
