"""`Recipe`: what to train and what to learn from it, as TOML. Defaults < file < `--set a.b=c`; unknown keys are errors.

A recipe without `axes` is a point: one trial, or one target. With `axes` it is a sweep, and with `holdout` and `target`
the whole study that `scaletune run` carries out.
"""

from __future__ import annotations

import copy
import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, Field, ValidationError, model_validator

from scaletune import huggingface
from scaletune.errors import UserError, nearest
from scaletune.hardware import Hardware
from scaletune.records import digest
from scaletune.rules import FORMS
from scaletune.sections import Count, Fraction, Positive, Section
from scaletune.sections import Whole as Seed
from scaletune.zoo import FAMILIES, Model

PYTHON_STDLIB, DIGITS, POWER_LAW = NAMED = ("python-stdlib", "digits", "power-law")  # sources that are no files
HUB = "hub:"  # before the name of a dataset on the Hugging Face Hub


def _stem(value: str) -> str:
    """A name that its files can bear."""
    if not value or value.startswith(".") or set(value) & set("/\\\0"):
        raise ValueError(f"`name` must be a file's name without its ending, but got {value!r}")
    return value


Name = Annotated[str, AfterValidator(_stem)]


class Parametrization(Section):
    """How hyperparameters written at the base size become each tensor's own: see `scaletune.rules`."""

    form: str = "mup"
    base_width: Count
    base_depth: Count | None = None  # needed by a depth rule
    depth_alpha: float = 0.0  # 0, 1/2 or 1: residual branches times (depth / base_depth)**-alpha; 0: no depth rule
    init_std: Positive = 0.02  # of every matrix at the base width
    init_gain: Positive | None = None  # if given, of every matrix but tables: init_gain / sqrt(fan-in) at the base width instead
    embedding_multiplier: Positive = 1.0  # at the base width, as are the next three
    attention_multiplier: Positive = 1.0  # of the softmax's scale head_dim**-0.5: the head size does not grow
    residual_multiplier: Positive = 1.0  # of every residual branch
    logits_multiplier: Positive = 1.0

    @model_validator(mode="after")
    def _known(self) -> Parametrization:
        if self.form not in FORMS:
            raise ValueError(f"`form` must be one we know, but got {self.form!r}{nearest(self.form, FORMS)}")
        if self.depth_alpha not in (0, 0.5, 1):
            raise ValueError(f"`depth_alpha` must be 0, 0.5 or 1, but got {self.depth_alpha}")
        if self.depth_alpha and self.base_depth is None:
            raise ValueError(f"`depth_alpha > 0` needs `base_depth`, but got depth_alpha={self.depth_alpha} and none")
        return self


MUON = {"original": "muon", "match_rms_adamw": "muon_match_rms", "spectral": "muon_spectral"}  # shape factor -> rule
READS = {  # optimizer family -> what it reads beside lr, weight_decay and clip; `decay`: its weight decay can be independent
    "adamw": {"beta1", "beta2", "eps", "decay"},
    "sgd": {"momentum", "nesterov"},
    "adafactor": {"decay"},
    "lion": {"beta1", "beta2", "decay"},
    "lamb": {"beta1", "beta2", "eps"},
    "muon": {"momentum", "nesterov", "shape_factor", "beta1", "beta2", "eps", "rest_ratio", "decay"},
    "shampoo": {"precondition_every", "beta1", "beta2", "eps", "rest_ratio", "decay"},
    "soap": {"precondition_every", "beta1", "beta2", "eps", "decay"},
    "adam_atan2": {"beta1", "beta2", "decay"},
    "dadapt_adam": {"beta1", "beta2", "eps"},
    "prodigy": {"beta1", "beta2", "eps"},
    "schedulefree_adamw": {"beta1", "beta2", "eps", "decay"},
    "momo_adam": {"beta1", "beta2", "eps", "decay"},
}
LR_FREE = ("dadapt_adam", "prodigy")  # which find the base lr


class Optimizer(Section):
    """Which optimizer, and its settings at the base size; `scaletune.optim` builds it, `scaletune.rules` scales it.

    decay "torch": a step shrinks weights by lr * weight_decay, under sgd as L2 in the gradient, under lamb inside the trust ratio.
    "independent": by weight_decay alone at the peak, and as the schedule's multiplier below it (arXiv:1711.05101, Algorithm 2; arXiv:2309.14322).
    """

    family: str = "adamw"
    lr: Positive = 1e-2  # peak, at base width
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    clip: Positive = 1.0  # global gradient norm
    decay: str = "torch"
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    nesterov: bool = True
    shape_factor: Literal["original", "match_rms_adamw", "spectral"] = "original"  # muon's, on its orthogonal update
    rest_ratio: Positive = 1.0  # lr of the tensors that muon and shampoo leave to AdamW, over `lr`
    precondition_every: Count = 10  # steps; shampoo moves no matrix before the first

    @model_validator(mode="after")
    def _known(self) -> Optimizer:
        if self.family not in READS:
            raise ValueError(f"`optimizer.family` must be one we know, but got {self.family!r}{nearest(self.family, READS)}")
        if self.decay == "l2":
            raise ValueError(
                "L2 in the gradient does not scale as the loss gradient with width, and no coordinate check shows it: `optimizer.decay` must be"
                " 'torch' or 'independent', but got 'l2'"
                + (" (under sgd 'torch' is L2, which is sound there)" if self.family == "sgd" else "")
            )
        if self.decay not in ("torch", "independent"):
            raise ValueError(f"`optimizer.decay` must be 'torch' or 'independent', but got {self.decay!r}")
        return self

    @model_validator(mode="after")
    def _read(self) -> Optimizer:
        always = {"family", "lr", "weight_decay", "clip"}
        fields = type(self).model_fields.items()
        for name in (name for name, field in fields if name not in READS[self.family] | always and getattr(self, name) != field.default):
            readers = ", ".join(family for family, read in READS.items() if name in read)
            raise ValueError(f"family {self.family!r} does not read `{name}`, but got {getattr(self, name)!r} (read by: {readers})")
        if self.nesterov and not self.momentum:
            raise ValueError("`nesterov` needs `momentum > 0`, but got momentum=0; write nesterov = false")
        if self.family in LR_FREE and self.lr != 1:
            raise ValueError(f"family {self.family!r} finds its own learning rate: `optimizer.lr` must be 1.0, but got {self.lr}")
        if self.family == "schedulefree_adamw" and not self.beta1:
            raise ValueError("family 'schedulefree_adamw' interpolates with `beta1`, which must be above 0, but got 0")
        return self

    @property
    def rule(self) -> str:
        """The family's name in `scaletune.rules`."""
        return MUON[self.shape_factor] if self.family == "muon" else self.family


class Schedule(Section):
    """A multiplier of each group's peak learning rate, a pure function of the share of tokens seen: see `scaletune.optim.multiplier`."""

    kind: Literal["constant", "linear", "cosine", "wsd", "power", "one_cycle"] = "wsd"
    warmup: Fraction = 0.1  # share of the tokens
    warmup_tokens: Count | None = None  # in place of `warmup`
    decay: Fraction = 0.3  # wsd, power: share of the tokens, at the end
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"  # wsd, power (arXiv:2405.18392)
    floor: Fraction = 0.0  # the last multiplier; of power: over that of its decay's start
    start: Fraction = 0.04  # one_cycle: the first multiplier
    knee: Annotated[float, Field(gt=0)] | None = None  # power: tokens at which lr starts to fall, over the budget's
    knee_tokens: Count | None = None  # in place of `knee`
    power: Positive = 0.51  # power: lr ~ tokens**-power (arXiv:2408.13359)
    ema_half_life: Count | None = None  # tokens; the weights judged are then their exponential moving average

    @model_validator(mode="after")
    def _room(self) -> Schedule:
        if self.kind in ("wsd", "power") and self.warmup + self.decay > 1 and self.warmup_tokens is None:
            raise ValueError(f"`warmup + decay <= 1` must hold, but got warmup={self.warmup}, decay={self.decay}")
        return self

    @model_validator(mode="after")
    def _own(self) -> Schedule:
        owners = {"decay_shape": ("wsd", "power"), "start": ("one_cycle",), **dict.fromkeys(("knee", "knee_tokens", "power"), ("power",))}
        for name, kinds in owners.items():
            if self.kind not in kinds and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`schedule.{name}` is read by {' and '.join(kinds)} alone, but got kind={self.kind!r}")
        if self.kind == "power" and (self.knee is None) == (self.knee_tokens is None):
            raise ValueError("schedule 'power' needs one of `knee` and `knee_tokens`, from where lr falls")
        return self


class PowerLaw(Section):
    """The source "power-law": features of variance k**-b, target terms of variance k**-a (arXiv:2402.01092); see `scaletune.data.synthetic`."""

    inputs: Count = 128
    examples: Count = 65536
    spectrum: Positive = 1.5  # b
    task: Annotated[float, Field(gt=1, allow_inf_nan=False)] = 1.5  # a
    noise: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # standard deviation of the target's; its own variance is 1
    seed: Seed = 0


class Data(Section):
    """What to train on. Of examples that are not text, each counts as one token: `seq_len = 1`."""

    source: str = PYTHON_STDLIB  # a name above, hub:NAME, a file or a folder
    format: Literal["auto", "text", "tokens", "dataset", "cifar10", "cifar100", "cifar100-coarse"] = "auto"
    seq_len: Count = 64
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share of files (of a single file: its tail), where the source has no such split
    order: Literal["random", "shuffle"] = "random"  # with replacement; or epochs without
    epochs: Count = 1  # how often the train split may be gone through: repetition must be asked for
    vocab_size: Count | None = None  # padded to this
    dtype: Literal["uint16", "uint32"] = "uint16"  # of tokens in .bin
    tokenizer: str | None = None  # "bytes" or a tokenizer.json: text becomes tokens once, in `cache`
    column: str = "text"  # of a dataset
    separator: str = "\n\n"  # after each document; a special token of the tokenizer may be named
    subset: str | None = None  # of a dataset on the Hub
    limit: Count | None = None  # tokens to take of each split of what is tokenised
    cache: str | None = None  # folder of tokenised text; none: $XDG_CACHE_HOME/scaletune or ~/.cache/scaletune
    power_law: PowerLaw = PowerLaw()

    @model_validator(mode="after")
    def _whole(self) -> Data:
        if (self.source in (DIGITS, POWER_LAW) or self.format.startswith("cifar")) and self.seq_len != 1:
            raise ValueError(f"`seq_len == 1` must hold where an example counts as one token, but got seq_len={self.seq_len}")
        if self.source.startswith(HUB) and self.limit is None:
            raise ValueError(f"`data.limit` must say how many tokens to take of a stream, but got none for {self.source!r}")
        return self


class Budget(Section):
    tokens: Count
    batch_tokens: Count  # per optimizer step, over all processes
    eval_tokens: Count = 65536  # held-out

    @model_validator(mode="after")
    def _steps(self) -> Budget:
        if self.tokens % self.batch_tokens:
            raise ValueError(f"`tokens % batch_tokens == 0` must hold, but got tokens={self.tokens}, batch_tokens={self.batch_tokens}")
        return self

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


class Training(Section):
    """What of the loop changes the result: part of a trial's identity."""

    precision: Literal["float32", "bf16"] = "float32"  # bf16: autocast; weights, optimizer and held-out loss stay float32
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0  # adds this times the mean of log(Z)**2 (arXiv:2204.02311, section 5)


def resolved(schedule: Schedule, budget: Budget) -> Schedule:
    """The schedule with what it says in tokens put as shares of the budget; UserError when they do not fit into it."""
    shares = {name: tokens / budget.tokens for name in ("warmup", "knee") if (tokens := getattr(schedule, f"{name}_tokens")) is not None}
    if shares.get("warmup", 0) > 1 or (schedule.kind in ("wsd", "power") and shares.get("warmup", 0) + schedule.decay > 1):
        raise UserError(
            f"`warmup_tokens / tokens + decay <= 1` must hold, but got warmup_tokens={schedule.warmup_tokens}, tokens={budget.tokens}"
            + (f", decay={schedule.decay}" if schedule.kind in ("wsd", "power") else "")
        )
    return schedule.model_copy(update=shares | {f"{name}_tokens": None for name in shares})


class Engine(Section):
    """Where and how trials run, and what is written beside the record. No part of a trial's identity."""

    kind: Literal["local"] = "local"
    workers: Literal["auto"] | Count = "auto"  # auto: one a GPU, or one a core
    processes: Count = 1  # that share one trial's batch
    stack: Literal["auto"] | Count = (
        "auto"  # trials that train as one model, at most: on a CPU the same bits; auto: what the device is quickest with
    )
    accumulation: Count = 1  # micro-batches a process and step
    compile: bool = False  # torch.compile
    evaluate_at: list[Fraction] = []  # shares of the tokens, beside the end
    noise_every: Annotated[int, Field(ge=0)] = 0  # steps between measurements of the gradient-noise scale; 0: none
    checkpoint_every: Annotated[int, Field(ge=0)] = 0  # steps; 0: none
    trackers: list[Literal["tensorboard", "wandb"]] = []
    runs: str = "runs"  # folder of checkpoints and trackers, one of its own a trial; relative to the folder that gets sweeps/
    retries: Annotated[int, Field(ge=0)] = 2  # of a trial whose worker dies, hangs or runs out of memory, before it is recorded as failed
    patience: Positive = 1800.0  # seconds a worker may say nothing before it counts as hung

    @model_validator(mode="after")
    def _parts(self) -> Engine:
        if self.noise_every and self.processes * self.accumulation < 2:
            raise ValueError(
                "`processes * accumulation >= 2` must hold for a gradient-noise scale (it compares batches of two sizes), but got "
                f"processes={self.processes}, accumulation={self.accumulation}"
            )
        return self


BLIND = ("gp", "cmaes")  # samplers that learn from complete trials alone


class Search(Section):
    """Which points of `axes` to train: all of them, or those a search asks for (`scaletune.sweeping.asking`). No part of a trial's identity."""

    kind: Literal["grid", "basin", "joint", "optuna"] = "grid"
    budget: Count | None = None  # points, diverged ones too: of each cell; of "joint": of all cells together; none: until `noise`
    noise: Positive = 0.0003  # stop when no more than this share of the loss is to be won; not read by "optuna"
    wave: Count = 1  # points asked for at once: of each cell; of "joint": of all cells together
    extend: Seed = 2  # grid steps that a range may grow by at an end where the optimum sits
    seed: Seed = 0
    sampler: Literal["tpe", "gp", "cmaes", "qmc", "random"] = "tpe"  # optuna
    pruner: Literal["none", "median", "halving", "hyperband"] = "none"  # optuna: over the `tokens` axis, a trial of its own each rung
    reduction: Annotated[int, Field(ge=2)] = 3  # halving, hyperband: one in so many goes on to the next rung

    @model_validator(mode="after")
    def _sound(self) -> Search:
        for name in ("sampler", "pruner", "reduction"):
            if self.kind != "optuna" and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"`search.{name}` is read by search.kind 'optuna' alone, but got kind={self.kind!r}")
        if self.kind == "optuna" and self.budget is None:
            raise ValueError("search.kind 'optuna' does not know when to stop: `search.budget` must say how many points a cell may have")
        if self.pruner != "none" and self.sampler in BLIND:
            raise ValueError(
                f"sampler {self.sampler!r} learns from complete trials alone: with a pruner it would stay at random search, but got "
                f"pruner={self.pruner!r} (learn from pruned trials or need none: tpe, qmc, random)"
            )
        return self


class Compare(Section):
    """The same sweep under other settings, to be shown beside it; never fitted."""

    name: Name
    set: dict[str, Any]
    axes: dict[str, list[Any]] = {}  # these replace the sweep's own axes of that name


class Holdout(Section):
    """A cell that no fit sees: predicted first, then trained on `lr` and at the predicted value."""

    set: dict[str, Any]
    lr: Annotated[list[Positive], Field(min_length=3)]


class Ask(Section):
    """What to learn from the trials."""

    law: str = "lr_nd"


POINT = ("model", "parametrization", "optimizer", "schedule", "training", "data", "budget", "seed")  # what a trial's identity is made of
READ = (  # how the data are found and read: a trial's identity has the digest of what was read
    "source", "format", "epochs", "dtype", "tokenizer", "column", "separator", "subset", "limit", "cache", "power_law",
)  # fmt: skip
SHORT = {  # a contract column -> where a recipe keeps it
    "width": "model.width", "depth": "model.depth", "lr": "optimizer.lr", "weight_decay": "optimizer.weight_decay",
    "tokens": "budget.tokens", "batch_tokens": "budget.batch_tokens", "seq_len": "data.seq_len", "seed": "seed",
    "form": "parametrization.form",
}  # fmt: skip


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
    axes: dict[str, Annotated[list[Any], Field(min_length=1)]] = {}
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
    evidence: dict[str, Any] = {}  # of an emitted recipe: the fit, the law, the interval, the assumptions

    @model_validator(mode="after")
    def _told_apart(self) -> Recipe:
        taken = ["main", "validation"]  # what the study's own trials are called on record
        for other in self.compare:
            if other.name in taken:
                raise ValueError(f"`compare.name` must be its own, and not one of {', '.join(taken)}, but got {other.name!r}")
            taken.append(other.name)
        return self

    @model_validator(mode="after")
    def _batch(self) -> Recipe:
        batch, seq_len = self.budget.batch_tokens, self.data.seq_len
        if batch % seq_len:
            raise ValueError(f"`batch_tokens % seq_len == 0` must hold, but got batch_tokens={batch}, seq_len={seq_len}")
        rows, processes, accumulation = batch // seq_len, self.engine.processes, self.engine.accumulation
        if rows % (processes * accumulation):
            raise ValueError(
                f"`batch_tokens / seq_len % (processes * accumulation) == 0` must hold, but got {rows} rows, processes={processes}, "
                f"accumulation={accumulation}"
            )
        return self

    @model_validator(mode="after")
    def _scheduled(self) -> Recipe:
        if self.optimizer.family == "schedulefree_adamw" and self.schedule.kind != "constant":
            raise ValueError(f"family 'schedulefree_adamw' needs `schedule.kind = 'constant'`, but got {self.schedule.kind!r}")
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


def _at(path: str) -> str:
    """A short column name, a field of the recipe or a dotted path -> the dotted path; UserError with the nearest name."""
    if path in SHORT or path in Recipe.model_fields or "." in path:
        return SHORT.get(path, path)
    raise UserError(f"unknown setting `{path}`{nearest(path, SHORT)}; a dotted path such as `optimizer.beta2` names any setting")


def _put(content: dict[str, Any], path: str, value: Any) -> None:
    """Set `content[a][b] = value` for the path `a.b`."""
    *tables, key = path.split(".")
    for table in tables:
        content = content.setdefault(table, {})
        if not isinstance(content, dict):
            raise UserError(f"`{path}` cannot be set: `{table}` is not a table")
    content[key] = value


def with_settings(recipe: Recipe, settings: Mapping[str, Any]) -> Recipe:
    """The recipe with `{short name or dotted path: value}` put in, validated again."""
    content = recipe.model_dump()
    if "model.family" in settings:  # another family has other options
        content["model"] = recipe.model.model_dump(exclude_defaults=True)
    for path, value in settings.items():
        _put(content, _at(path), copy.deepcopy(value))  # a later setting may reach into a table given here
    return validated(content, recipe.name)


def points(recipe: Recipe) -> list[Recipe]:
    """One recipe without axes for each combination of the axes, in each cell if there are any; each validated by itself."""
    bare = recipe.model_copy(update={"axes": {}, "cells": []})
    return [with_settings(bare, settings) for cell in recipe.cells or [{}] for settings in _combinations(_ragged(cell, recipe.axes))]


def _ragged(cell: Mapping[str, Any], axes: Mapping[str, list[Any]]) -> dict[str, list[Any]]:
    """The axes of one cell: its own, and the sweep's; UserError when one of its settings is an axis of the sweep or has no value."""
    swept = {_at(name) for name in axes}
    for name, value in cell.items():
        if _at(name) in swept:
            raise UserError(f"`{name}` must be set by `axes` or by a cell, but got both")
        if value == []:
            raise UserError(f"a setting of a cell must have a value, but got {name}=[]")
    return {name: value if isinstance(value, list) else [value] for name, value in cell.items()} | dict(axes)


def _combinations(axes: Mapping[str, list[Any]]) -> Iterable[dict[str, Any]]:
    return (dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values()))


def compared(recipe: Recipe, other: Compare) -> Recipe:
    """The sweep of one comparison: its settings put in, its axes in place of the recipe's."""
    return with_settings(recipe, {"axes": {**recipe.axes, **other.axes}, **other.set})


def identity(recipe: Recipe, data_digest: str) -> str:
    """A trial's id: the digest of what its point sets other than the defaults, with what the data holds in place of where it lies.

    So an option that is added later, at a default that changes nothing, leaves every recorded trial's id what it was.
    """
    point = recipe.model_dump(include=set(POINT), exclude_defaults=True)
    kinds = {"family": recipe.model.family, "optimizer": recipe.optimizer.family, "schedule": recipe.schedule.kind}
    data = {key: value for key, value in point.get("data", {}).items() if key not in READ} | {"digest": data_digest}
    return digest({**point, "data": data, "kinds": kinds})


def _table(annotation: Any) -> type[Section] | None:
    """The section that a field holds as X, X | None or list[X]."""
    return next((part for part in (annotation, *get_args(annotation)) if isinstance(part, type) and issubclass(part, Section)), None)


def _known(location: Iterable[Any]) -> Iterable[str]:
    """The keys of the table at a pydantic location."""
    section: type[Section] | None = Recipe
    for part in location:
        if isinstance(part, str) and part[1:-1] in FAMILIES and part.startswith("["):
            section = FAMILIES[part[1:-1]]
        elif section and isinstance(part, str):
            section = _table(section.model_fields[part].annotation) if part in section.model_fields else None
    return section.model_fields if section else ()


def _where(error: Mapping[str, Any]) -> str:
    """The dotted path of a pydantic error, without the names of a union's members."""
    return ".".join(str(part) for part in error["loc"] if "[" not in str(part))


def _rule(error: Mapping[str, Any]) -> str:
    if error["type"] == "too_short":
        return f"a list of at least {error['ctx']['min_length']}"
    return error["msg"].removeprefix("Input should be ")


def _quoted_number(value: Any) -> bool:
    try:
        return isinstance(value, str) and math.isfinite(float(value))
    except ValueError:
        return False


def _sentence(errors: Sequence[Mapping[str, Any]]) -> str:
    """One line on the first pydantic error, a misspelt key before all: the rule, the value, the nearest valid name."""
    error = next((error for error in errors if error["type"] == "extra_forbidden"), errors[0])
    path, got = _where(error), error.get("input")
    if error["type"] == "extra_forbidden":
        key = path.split(".")[-1]
        return f"unknown key `{path}`" + (f" (nearest: {SHORT[key]!r})" if key in SHORT else nearest(key, _known(error["loc"][:-1])))
    if error["type"] == "union_tag_invalid":
        family = error["input"]["family"]
        return f"`{path}.family` must be one we know, but got {family!r}{nearest(str(family), FAMILIES)}"
    if error["type"] == "missing":
        return f"`{path}` must be given"
    if error["type"] == "value_error":
        return str(error["ctx"]["error"])
    rules = " or ".join(_rule(other) for other in errors if _where(other) == path)
    hint = "; write the number without quotes" if _quoted_number(got) and ("number" in rules or "integer" in rules) else ""
    return f"`{path}` must be {rules}, but got {got!r}{hint}"


def validated(content: Mapping[str, Any], name: str) -> Recipe:
    """A Recipe from plain values; UserError with one sentence on the first thing that is wrong."""
    try:
        return Recipe.model_validate({"name": name, **content})
    except ValidationError as error:
        raise UserError(_sentence(error.errors())) from None


def parse_setting(text: str) -> tuple[str, Any]:
    """`a.b=c` of the command line -> (path, value); the value is TOML, and a bare word is a string."""
    path, equals, value = text.partition("=")
    if not equals or not path:
        raise UserError(f"`--set` must look like a.b=c, but got {text!r}")
    try:
        return path, tomllib.loads(f"value = {value}")["value"]
    except tomllib.TOMLDecodeError:
        return path, value


def load(path: str | Path, settings: Iterable[str] = ()) -> Recipe:
    """Read a recipe file and put `a.b=c` settings over it. Files it names are relative to it."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"the recipe file must exist, but got `{path}`")
    try:
        content = tomllib.loads(path.read_text("utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` must be TOML, but {error}") from None
    for setting in settings:
        where, value = parse_setting(setting)
        _put(content, _at(where), value)
    try:
        recipe = validated(_architecture(_beside(content, path.parent)), path.stem)
        for asked in (recipe, *(compared(recipe, other) for other in recipe.compare)):
            points(asked)  # every combination must be valid before anything is trained
        with_settings(recipe, recipe.holdout.set if recipe.holdout else {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe


def _architecture(content: dict[str, Any]) -> dict[str, Any]:
    """`model.hf`, a config.json of Hugging Face, as the model it describes; keys beside it go over its own, but for its vocabulary's."""
    model, data = content.get("model"), content.get("data", {})
    if not isinstance(model, dict) or "hf" not in model:
        return content
    if not isinstance(model["hf"], str):
        raise UserError(f"`model.hf` must be the path of a config.json, but got {model['hf']!r}")
    read, vocab_size, said = huggingface.read(model["hf"])
    own = {key: value for key, value in model.items() if key != "hf"}
    said += [f"`model.{key}` {value!r} is the target's own, over the config's" for key, value in own.items()]
    evidence = {"architecture": said} | content.get("evidence", {})
    return content | {"model": read | own, "data": {"vocab_size": vocab_size} | data, "evidence": evidence}


def _beside(content: Any, folder: Path, where: str = "") -> Any:
    """Files and folders of data that a recipe names, in its axes and comparisons too, are relative to it, else to the working folder."""
    if isinstance(content, dict):
        return {key: _beside(value, folder, f"{where}.{key}") for key, value in content.items()}
    if isinstance(content, list):
        return [_beside(value, folder, where) for value in content]
    named = (
        where.endswith((".data.source", ".data.tokenizer", ".model.hf", ".hardware.calibration"))
        and isinstance(content, str)
        and content not in (*NAMED, "bytes")
    )
    return str(folder / content) if named and (folder / content).exists() else content
