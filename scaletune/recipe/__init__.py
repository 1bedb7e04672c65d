"""`Recipe`: what to train and what to fit to the results, as TOML.

Settings of a file replace the defaults; `--set a.b=c` replaces those of the file. An unknown key is
an error. A recipe without `axes` is a point: one trial, or one target. With `axes` it is a sweep,
and with `holdout` and `target` the study that `scaletune run` carries out.
"""

from scaletune.recipe.data import (
    DIGITS,
    HUB_PREFIX,
    NAMED_SOURCES,
    POWER_LAW,
    PYTHON_STDLIB,
    Data,
    PowerLaw,
)
from scaletune.recipe.engine import Engine, SearchSection
from scaletune.recipe.optimization import (
    LR_FREE,
    MUON_RULES,
    OPTIMIZER_SETTINGS,
    Budget,
    Optimizer,
    Parametrization,
    Schedule,
    Training,
    resolve_schedule,
)
from scaletune.recipe.points import (
    DATA_SOURCE_KEYS,
    cell_axes,
    comparison_recipe,
    points,
    trial_id,
    with_settings,
)
from scaletune.recipe.short_names import SHORT_NAMES
from scaletune.recipe.study import POINT_SECTIONS, Compare, FitSection, Holdout, Recipe
from scaletune.recipe.toml_file import load, parse_setting
from scaletune.recipe.trainer import Trainer
from scaletune.recipe.validation import validate_recipe
from scaletune.zoo import Model

__all__ = [
    "DATA_SOURCE_KEYS",
    "DIGITS",
    "HUB_PREFIX",
    "LR_FREE",
    "MUON_RULES",
    "NAMED_SOURCES",
    "OPTIMIZER_SETTINGS",
    "POINT_SECTIONS",
    "POWER_LAW",
    "PYTHON_STDLIB",
    "SHORT_NAMES",
    "Budget",
    "Compare",
    "Data",
    "Engine",
    "FitSection",
    "Holdout",
    "Model",
    "Optimizer",
    "Parametrization",
    "PowerLaw",
    "Recipe",
    "Schedule",
    "SearchSection",
    "Trainer",
    "Training",
    "cell_axes",
    "comparison_recipe",
    "load",
    "parse_setting",
    "points",
    "resolve_schedule",
    "trial_id",
    "validate_recipe",
    "with_settings",
]
