"""`Recipe`: what to train, over which axes, where, and what to fit to the results."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from scaletune.hardware import Hardware
from scaletune.recipe.data import Data
from scaletune.recipe.engine import Engine, Search
from scaletune.recipe.optimization import (
    Budget,
    Optimizer,
    Parametrization,
    Schedule,
    Training,
    resolve_schedule,
)
from scaletune.sections import Positive, Section
from scaletune.sections import Whole as Seed
from scaletune.zoo import Model


def _check_stem(value: str) -> str:
    """The name, if files can have it."""
    if not value or value.startswith(".") or set(value) & set("/\\\0"):
        raise ValueError(f"`name` must be a file's name without its ending, but got {value!r}")
    return value


Name = Annotated[str, AfterValidator(_check_stem)]


def _dotted(axes: Any) -> Any:
    """Axes by their dotted paths: TOML reads an unquoted `model.width = [...]` as a table `model`.

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


class Compare(Section):
    """The sweep under other settings, shown beside it and never fitted."""

    name: Name
    """Name of the comparison in records and plots. Not "main" or "validation"."""
    set: dict[str, Any]
    """Settings that replace those of the recipe, by column name or dotted path."""
    axes: Axes = {}
    """Axes that replace the recipe's axes of the same name."""


class Holdout(Section):
    """A held-out setting, which no fit sees.

    It is predicted first, then trained at `lr` and at the predicted lr.
    """

    set: dict[str, Any]
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
"""The keys of a recipe that identify a trial."""


class Recipe(Section):
    """A training point, the axes it is swept over, and what a study does with the trials.

    A recipe without `axes` is one trial or one target. With `axes` it is a sweep; with `holdout`
    and `target` it is the study that `scaletune run` carries out.

    Example:
        >>> from scaletune.recipe import validate_recipe
        >>> recipe = validate_recipe(
        ...     {
        ...         "model": {"width": 64},
        ...         "parametrization": {"base_width": 32},
        ...         "budget": {"tokens": 65536, "batch_tokens": 1024},
        ...     },
        ...     "tiny",
        ... )
        >>> recipe.name, recipe.model.family, recipe.budget.steps
        ('tiny', 'transformer', 64)
    """

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
    axes: Axes = {}
    """Column name or dotted path -> list of values. The sweep is every combination."""
    cells: list[dict[str, Any]] = []
    """Tables of settings, each swept over every combination of `axes`. A list is several values.
    Use it where the settings are not a full grid."""
    engine: Engine = Engine()
    """Where and how trials run."""
    search: Search = Search()
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

    @model_validator(mode="after")
    def _unique_names(self) -> Recipe:
        taken = ["main", "validation"]  # the names of the study's own trials in records
        for other in self.compare:
            if other.name in taken:
                raise ValueError(
                    f"`compare.name` must be unique and not one of {', '.join(taken)}, but got"
                    f" {other.name!r}"
                )
            taken.append(other.name)
        return self

    @model_validator(mode="after")
    def _batch(self) -> Recipe:
        batch, seq_len = self.budget.batch_tokens, self.data.seq_len
        if batch % seq_len:
            raise ValueError(
                "`batch_tokens % seq_len == 0` must hold, but got"
                f" batch_tokens={batch}, seq_len={seq_len}"
            )
        rows, engine = batch // seq_len, self.engine
        if rows % (engine.processes * engine.accumulation):
            raise ValueError(
                "`batch_tokens / seq_len % (processes * accumulation) == 0` must hold, but got"
                f" {rows} rows, processes={engine.processes}, accumulation={engine.accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _scheduled(self) -> Recipe:
        if self.optimizer.family == "schedulefree_adamw" and self.schedule.kind != "constant":
            raise ValueError(
                "family 'schedulefree_adamw' needs `schedule.kind = 'constant'`, but got"
                f" {self.schedule.kind!r}"
            )
        resolve_schedule(self.schedule, self.budget)
        return self

    @model_validator(mode="after")
    def _suits_the_model(self) -> Recipe:
        p = self.parametrization
        self.model.check(self.data.seq_len, p.base_width, p.depth_alpha)
        return self

    def point(self) -> dict[str, Any]:
        """The keys that identify a trial, as plain values."""
        return self.model_dump(include=set(POINT_SECTIONS))
