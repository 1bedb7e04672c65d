"""`Recipe`: what to train and what to learn from it, as TOML. Defaults < file < `--set a.b=c`; unknown keys are errors.

A recipe without `axes` is a point: one trial, or one target. With `axes` it is a sweep, and with `holdout` and `target`
the whole study that `scaletune run` carries out.
"""

from scaletune.recipe.data import DIGITS, HUB, NAMED, POWER_LAW, PYTHON_STDLIB, Data, PowerLaw
from scaletune.recipe.engine import Engine, Search
from scaletune.recipe.optimization import (
    LR_FREE,
    MUON,
    READS,
    Budget,
    Optimizer,
    Parametrization,
    Schedule,
    Training,
    resolved,
)
from scaletune.recipe.points import READ, compared, identity, points, with_settings
from scaletune.recipe.study import POINT, Ask, Compare, Holdout, Recipe
from scaletune.recipe.toml_file import load, parse_setting
from scaletune.recipe.validation import SHORT, validated
from scaletune.zoo import Model

__all__ = [
    "DIGITS", "HUB", "LR_FREE", "MUON", "NAMED", "POINT", "POWER_LAW", "PYTHON_STDLIB", "READ", "READS", "SHORT", "Ask", "Budget", "Compare", "Data",
    "Engine", "Holdout", "Model", "Optimizer", "Parametrization", "PowerLaw", "Recipe", "Schedule", "Search", "Training", "compared",
    "identity", "load", "parse_setting", "points", "resolved", "validated", "with_settings",
]  # fmt: skip
