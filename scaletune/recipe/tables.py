"""The tables of a recipe: the fields of `Recipe`, before their rules."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from scaletune.hardware import Hardware
from scaletune.recipe.data import Data
from scaletune.recipe.engine import Engine, SearchSection
from scaletune.recipe.optimization import (
    Budget,
    Optimizer,
    Parametrization,
    Schedule,
    Training,
)
from scaletune.recipe.trainer import Trainer
from scaletune.sections import Positive, Section
from scaletune.sections import Whole as Seed
from scaletune.zoo import Model, OwnConfig


def _check_stem(value: str) -> str:
    """The name, if files can have it."""
    if not value or value.startswith(".") or set(value) & set("/\\\0"):
        raise ValueError(f"`name` must be a file's name without its ending, but got {value!r}")
    return value


Name = Annotated[str, AfterValidator(_check_stem)]


def _dotted(axes: Any) -> Any:
    """Axes or settings by their dotted paths: TOML reads an unquoted `model.width` as a table.

    A path that `--set` writes replaces the same path in a table.
    """
    if not isinstance(axes, dict):
        return axes
    tables = {name: _dotted(table) for name, table in axes.items() if isinstance(table, dict)}
    inner = {
        f"{name}.{key}": values for name, table in tables.items() for key, values in table.items()
    }
    return inner | {name: values for name, values in axes.items() if name not in tables}


Axes = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_dotted)]
Settings = Annotated[dict[str, Any], BeforeValidator(_dotted)]


class Compare(Section):
    """The sweep under other settings, shown beside it and never fitted."""

    name: Name
    """Name of the comparison in records and plots. Not "main" or "validation"."""
    set: Settings
    """Settings that replace those of the recipe, by column name or dotted path."""
    axes: Axes = {}
    """Axes that replace the recipe's axes of the same name."""


class Holdout(Section):
    """A held-out setting, which no fit sees.

    It is predicted first, then trained at `lr` and at the predicted lr.
    """

    set: Settings
    """Settings that replace those of the recipe, by column name or dotted path."""
    lr: Annotated[list[Positive], Field(min_length=3)]
    """Learning rates to train, besides the predicted one."""


class FitSection(Section):
    """What to fit to the trials."""

    law: str = "lr_nd"
    """Law to fit, for example lr_nd, lr_ndb, joint, loss_nd or chinchilla."""


POINT_SECTIONS = (
    *("model", "parametrization", "optimizer", "schedule"),
    *("training", "data", "budget", "seed"),
)
"""The keys of a recipe that identify a trial, with `my` and a part of `trainer`."""

PlainValue = str | int | float | bool


def _require_plain(values: Any) -> Any:
    """The user's own settings, if each is one plain value."""
    for name, value in values.items() if isinstance(values, dict) else ():
        if not isinstance(value, PlainValue):
            raise ValueError(
                f"`my.{name}` must be text, a number, true or false, but got {value!r}"
            )
    return values


My = Annotated[dict[str, PlainValue], BeforeValidator(_require_plain)]


class RecipeTables(Section):
    """The fields of a `Recipe`."""

    name: Name = "recipe"
    """Name of the sweep and of its files. Default: the name of the recipe file without its ending.
    """
    model: Model
    """The model: see the tables of the model families. A target may name a Hugging Face config.json
    as `model.hf`."""
    parametrization: Parametrization
    """How hyperparameters at the base size become those of each tensor."""
    optimizer: Optimizer = Optimizer()
    """The optimizer and its settings at the base size."""
    schedule: Schedule = Schedule()
    """The learning rate schedule."""
    training: Training = Training()
    """Options of the training loop that change the result."""
    data: Data = Data()
    """What to train on."""
    budget: Budget
    """How long to train and to evaluate."""
    seed: Seed = 0
    """Seed of the initialisation and of the batches."""
    my: My = {}
    """The user's own settings: passed on to `trainer` and `model.build`, kept in records, and swept
    over as `"my.dropout" = [0, 0.1]` in `axes`."""
    trainer: Trainer = Trainer()
    """Who trains: the user's own command or function, or somebody else. Default: scaletune's
    training loop."""
    axes: Axes = {}
    """Column name or dotted path -> list of values. The sweep is every combination."""
    cells: list[Settings] = []
    """Tables of settings, each swept over every combination of `axes`. A list is several values.
    Use it where the settings are not a full grid."""
    engine: Engine = Engine()
    """Where and how trials run."""
    search: SearchSection = SearchSection()
    """Which points of `axes` are trained."""
    compare: list[Compare] = []
    """Sweeps under other settings, shown beside this one."""
    fit: FitSection = FitSection()
    """What to fit to the trials."""
    holdout: Holdout | None = None
    """A held-out setting that tests the fit."""
    target: str | None = None
    """Path of the target's recipe file, relative to this file."""
    hardware: Hardware | None = None
    """Of a target: the GPUs that it trains on."""
    to: list[str] = ["granite", "recipe"]
    """Formats of the configs that are written for the target."""
    evidence: dict[str, Any] = {}
    """Of a written recipe: the fit, the law, the intervals and the assumptions behind it."""

    @property
    def foreign(self) -> bool:
        """Whether not our loop trains, but the user's command or function, or somebody else."""
        return self.trainer.given

    @property
    def has_budget(self) -> bool:
        """Whether the recipe states how long to train. Only a foreign trainer may know better."""
        return bool(self.budget.model_fields_set)

    @property
    def keeps_own_init(self) -> bool:
        """Whether the module of `model.build` keeps the values that its constructor draws.

        It does unless the recipe states `init_std` or `init_gain`.
        """
        stated = self.parametrization.model_fields_set
        return isinstance(self.model, OwnConfig) and not stated & {"init_std", "init_gain"}

    @property
    def is_planned(self) -> bool:
        """Whether a foreign trainer gets a plan: of the model that `model.build` makes."""
        built = isinstance(self.model, OwnConfig) and bool(self.model.build)
        return built and bool(self.parametrization.model_fields_set)

    def states(self, path: str) -> bool:
        """Whether a foreign recipe states a setting."""
        section, _, key = path.partition(".")
        return key in getattr(self, section).model_fields_set
