"""`Recipe`: what to train, over which axes, where, and what to fit to the results."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from scaletune.hardware import Hardware
from scaletune.recipe.data import Data
from scaletune.recipe.devices import check_devices
from scaletune.recipe.engine import Engine, SearchSection
from scaletune.recipe.optimization import (
    Budget,
    Optimizer,
    Parametrization,
    Schedule,
    Training,
    resolve_schedule,
)
from scaletune.recipe.placeholder_values import known_placeholders
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
"""The keys of a recipe that identify a trial, with `my` and a part of `trainer`."""

PlainValue = str | int | float | bool


def _unstated(section: type[Section], **values: Any) -> Section:
    """A table that the recipe does not state: it has values, but none that a record repeats."""
    defaults = {name: field.default for name, field in section.model_fields.items()}
    return section.model_construct(_fields_set=set(), **defaults | values)


def _trains_itself(trainer: Any) -> bool:
    """Whether a `trainer` table, plain or validated, says who trains."""
    if isinstance(trainer, dict):
        return any(trainer.get(name) for name in ("command", "function", "external"))
    return isinstance(trainer, Trainer) and trainer.given


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
    my: dict[str, PlainValue] = {}
    """The user's own settings: passed on to `trainer` and `model.build`, kept in records, and swept
    over as `"my.dropout" = [0, 0.1]` in `axes`."""
    trainer: Trainer = Trainer()
    """Who trains: the user's own command or function, or somebody else. Default: scaletune's
    training loop."""
    axes: Axes = {}
    """Column name or dotted path -> list of values. The sweep is every combination."""
    cells: list[dict[str, Any]] = []
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

    @model_validator(mode="before")
    @classmethod
    def _own_trainer(cls, content: Any) -> Any:
        """Fills in what a recipe with its own trainer or model need not state."""
        if not isinstance(content, dict):
            return content
        content, foreign = dict(content), _trains_itself(content.get("trainer"))
        model = content.get("model")
        if isinstance(model, dict) and "family" not in model and (foreign or model.get("build")):
            content["model"] = model = {"family": "own", **model}
        if foreign and not content.get("parametrization"):
            width = model.get("width") if isinstance(model, dict) else getattr(model, "width", 1)
            content["parametrization"] = _unstated(Parametrization, form="sp", base_width=width)
        if foreign and not content.get("budget"):
            content["budget"] = _unstated(Budget, tokens=1, batch_tokens=1)
        return content

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
        if self.foreign and not ("seq_len" in self.data.model_fields_set and self.has_budget):
            return self
        if batch % seq_len:
            raise ValueError(
                "`batch_tokens % seq_len == 0` must hold, but got"
                f" batch_tokens={batch}, seq_len={seq_len}"
            )
        rows, engine = batch // seq_len, self.engine
        if not self.foreign and rows % (engine.processes * engine.accumulation):
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
        if self.has_budget:
            resolve_schedule(self.schedule, self.budget)
        return self

    @model_validator(mode="after")
    def _suits_the_trainer(self) -> Recipe:
        if isinstance(self.model, OwnConfig) and not (self.foreign or self.model.build):
            raise ValueError(
                "`model.family` 'own' needs `model.build`, `trainer.command`, `trainer.function` or"
                " `trainer.external`, but got none"
            )
        planned = isinstance(self.model, OwnConfig) and self.model.build
        if "plan" in self.trainer.names() and not (
            planned and self.parametrization.model_fields_set
        ):
            raise ValueError(
                "the placeholder {plan} needs `model.build`, whose tensors are planned, and"
                " `parametrization.base_width`"
            )
        self.trainer.check(known_placeholders(self))
        return self

    @model_validator(mode="after")
    def _suits_the_devices(self) -> Recipe:
        check_devices(self)
        return self

    @model_validator(mode="after")
    def _suits_the_model(self) -> Recipe:
        p = self.parametrization
        self.model.check(self.data.seq_len, p.base_width, p.depth_alpha)
        return self

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

    def point(self) -> dict[str, Any]:
        """The keys that identify a trial, as plain values.

        Of a foreign trainer, only what the recipe states: our defaults say nothing about it.
        """
        own = {"my": dict(self.my)} if self.my else {}
        own |= {"trainer": identity} if (identity := self.trainer.identity()) else {}
        point = self.model_dump(include=set(POINT_SECTIONS), exclude_unset=self.foreign)
        if isinstance(self.model, OwnConfig) and not self.foreign:
            point["model"] = self.model.model_dump(exclude_unset=True)
            if self.keeps_own_init:
                del point["parametrization"]["init_std"]
        kept = {name: v for name, v in point.items() if v != {}} | {"seed": self.seed}
        return (kept if self.foreign else point) | own

    def states(self, path: str) -> bool:
        """Whether a foreign recipe states a setting."""
        section, _, key = path.partition(".")
        return key in getattr(self, section).model_fields_set

    def dump(self) -> dict[str, Any]:
        """The recipe as plain values that validate to the same recipe."""
        return self.model_dump(exclude_unset=True)
