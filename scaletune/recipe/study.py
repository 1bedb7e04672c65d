"""`Recipe`: the point, what it is swept over, where, and what to learn from it."""

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
    resolved,
)
from scaletune.sections import Positive, Section
from scaletune.sections import Whole as Seed
from scaletune.zoo import Model


def _stem(value: str) -> str:
    """A name that its files can bear."""
    if not value or value.startswith(".") or set(value) & set("/\\\0"):
        raise ValueError(f"`name` must be a file's name without its ending, but got {value!r}")
    return value


Name = Annotated[str, AfterValidator(_stem)]


def _dotted(axes: Any) -> Any:
    """Axes by their dotted paths; `model.width = [...]` without quotes is a table `model` to TOML."""
    if not isinstance(axes, dict):
        return axes
    tables = {name: _dotted(table) for name, table in axes.items() if isinstance(table, dict)}
    inner = {
        f"{name}.{key}": values for name, table in tables.items() for key, values in table.items()
    }
    return inner | {
        name: values for name, values in axes.items() if name not in tables
    }  # `--set` writes the path: it goes over a table


Axes = Annotated[dict[str, Annotated[list[Any], Field(min_length=1)]], BeforeValidator(_dotted)]


class Compare(Section):
    """The same sweep under other settings, to be shown beside it; never fitted."""

    name: Name
    set: dict[str, Any]
    axes: Axes = {}  # these replace the sweep's own axes of that name


class Holdout(Section):
    """A cell that no fit sees: predicted first, then trained on `lr` and at the predicted value."""

    set: dict[str, Any]
    lr: Annotated[list[Positive], Field(min_length=3)]


class Ask(Section):
    """What to learn from the trials."""

    law: str = "lr_nd"


POINT = (
    "model",
    "parametrization",
    "optimizer",
    "schedule",
    "training",
    "data",
    "budget",
    "seed",
)  # what a trial's identity is made of


class Recipe(Section):
    """What to train (the point), over what (`axes`), where (`engine`), and what to do with it (`fit`, `holdout`, `target`)."""

    name: Name = "recipe"  # the file's stem, unless said
    model: Model
    parametrization: Parametrization
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    training: Training = Training()
    data: Data = Data()
    budget: Budget
    seed: Seed = 0
    axes: Axes = {}
    cells: list[
        dict[str, Any]
    ] = []  # a ragged sweep: tables of settings, a list being several values; each under every combination of `axes`
    engine: Engine = Engine()
    search: Search = Search()
    compare: list[Compare] = []
    fit: Ask = Ask()
    holdout: Holdout | None = None
    target: str | None = None  # a recipe file, relative to this one
    hardware: Hardware | None = None  # of a target: what it is to be trained on
    to: list[str] = ["granite", "recipe"]  # formats the target is emitted in
    evidence: dict[
        str, Any
    ] = {}  # of an emitted recipe: the fit, the law, the interval, the assumptions

    @model_validator(mode="after")
    def _told_apart(self) -> Recipe:
        taken = ["main", "validation"]  # what the study's own trials are called on record
        for other in self.compare:
            if other.name in taken:
                raise ValueError(
                    f"`compare.name` must be its own, and not one of {', '.join(taken)}, but got {other.name!r}"
                )
            taken.append(other.name)
        return self

    @model_validator(mode="after")
    def _batch(self) -> Recipe:
        batch, seq_len = self.budget.batch_tokens, self.data.seq_len
        if batch % seq_len:
            raise ValueError(
                f"`batch_tokens % seq_len == 0` must hold, but got batch_tokens={batch}, seq_len={seq_len}"
            )
        rows, processes, accumulation = (
            batch // seq_len,
            self.engine.processes,
            self.engine.accumulation,
        )
        if rows % (processes * accumulation):
            raise ValueError(
                f"`batch_tokens / seq_len % (processes * accumulation) == 0` must hold, but got {rows} rows, processes={processes}, "
                f"accumulation={accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _scheduled(self) -> Recipe:
        if self.optimizer.family == "schedulefree_adamw" and self.schedule.kind != "constant":
            raise ValueError(
                f"family 'schedulefree_adamw' needs `schedule.kind = 'constant'`, but got {self.schedule.kind!r}"
            )
        resolved(self.schedule, self.budget)
        return self

    @model_validator(mode="after")
    def _suits_the_model(self) -> Recipe:
        p = self.parametrization
        self.model.check(self.data.seq_len, p.base_width, p.depth_alpha)
        return self

    def point(self) -> dict[str, Any]:
        """What identifies a trial, as plain values."""
        return self.model_dump(include=set(POINT))
