"""`Recipe`: what to train, over which axes, where, and what to fit to the results."""

from __future__ import annotations

from typing import Any

from pydantic import model_validator

from scaletune.recipe.devices import check_devices
from scaletune.recipe.optimization import Budget, Parametrization, resolve_schedule
from scaletune.recipe.placeholder_values import known_placeholders
from scaletune.recipe.tables import (
    POINT_SECTIONS,
    Compare,
    FitSection,
    Holdout,
    RecipeTables,
)
from scaletune.recipe.trainer import Trainer
from scaletune.sections import Section
from scaletune.zoo import OwnConfig

__all__ = ["POINT_SECTIONS", "Compare", "FitSection", "Holdout", "Recipe"]


def _unstated(section: type[Section], **values: Any) -> Section:
    """A table that the recipe does not state: it has values, but none that a record repeats."""
    defaults = {name: field.default for name, field in section.model_fields.items()}
    return section.model_construct(_fields_set=set(), **defaults | values)


def _trains_itself(trainer: Any) -> bool:
    """Whether a `trainer` table, plain or validated, says who trains."""
    if isinstance(trainer, dict):
        return any(trainer.get(name) for name in ("command", "function", "external"))
    return isinstance(trainer, Trainer) and trainer.given


class Recipe(RecipeTables):
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
        if "plan" in self.trainer.names() and not self.is_planned:
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

    def dump(self) -> dict[str, Any]:
        """The recipe as plain values that validate to the same recipe."""
        return self.model_dump(exclude_unset=True)
