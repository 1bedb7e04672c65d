"""`Recipe`: what to train and what to learn from it, as TOML. Defaults < file < `--set a.b=c`; unknown keys are errors.

A recipe without `axes` is a point: one trial, or one target. With `axes` it is a sweep, and with `holdout` and `target`
the whole study that `scaletune run` carries out.
"""

from __future__ import annotations

import itertools
import math
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator

from scaletune.errors import UserError, nearest
from scaletune.records import digest
from scaletune.rules import FORMS

PYTHON_STDLIB = "python-stdlib"


def _whole(value: Any) -> Any:
    """TOML writes 1e9 as a float: a whole one is a count."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stem(value: str) -> str:
    """A name that its files can bear."""
    if not value or value.startswith(".") or set(value) & set("/\\\0"):
        raise ValueError(f"`name` must be a file's name without its ending, but got {value!r}")
    return value


Name = Annotated[str, AfterValidator(_stem)]
Count = Annotated[int, BeforeValidator(_whole), Field(gt=0)]
Seed = Annotated[int, BeforeValidator(_whole), Field(ge=0)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """One table of a recipe: frozen, strict (a quoted number is an error), closed (an unknown key is an error)."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class Model(Section):
    """A decoder Transformer of the zoo: RMSNorm, rotary positions, SwiGLU, causal attention, head size fixed, no biases."""

    family: Literal["transformer"] = "transformer"
    width: Count
    depth: Count = 2
    head_dim: Count = 32
    ffn_ratio: Positive = 3.0  # SwiGLU's inner width over `width`
    tied: bool = False  # head and embedding are one tensor
    rope_theta: Positive = 10000.0
    norm_eps: Positive = 1e-5

    @model_validator(mode="after")
    def _shapes(self) -> Model:
        if self.width % self.head_dim:
            raise ValueError(f"`width % head_dim == 0` must hold, but got width={self.width}, head_dim={self.head_dim}")
        if self.head_dim % 2:
            raise ValueError(f"`head_dim % 2 == 0` must hold (rotary positions turn pairs), but got head_dim={self.head_dim}")
        if not (self.ffn_ratio * self.width).is_integer():
            raise ValueError(f"`ffn_ratio * width` must be whole, but got ffn_ratio={self.ffn_ratio}, width={self.width}")
        return self

    @property
    def ffn_width(self) -> int:
        return round(self.ffn_ratio * self.width)


class Parametrization(Section):
    """How hyperparameters written at the base size become each tensor's own: see `scaletune.rules`."""

    form: str = "mup"
    base_width: Count
    base_depth: Count | None = None  # needed by a depth rule
    depth_alpha: float = 0.0  # 0, 1/2 or 1: residual branches times (depth / base_depth)**-alpha; 0: no depth rule
    init_std: Positive = 0.02  # of every matrix at the base width
    embedding_multiplier: Positive = 1.0  # at the base width
    logits_multiplier: Positive = 1.0  # at the base width

    @model_validator(mode="after")
    def _known(self) -> Parametrization:
        if self.form not in FORMS:
            raise ValueError(f"`form` must be one we know, but got {self.form!r}{nearest(self.form, FORMS)}")
        if self.depth_alpha not in (0, 0.5, 1):
            raise ValueError(f"`depth_alpha` must be 0, 0.5 or 1, but got {self.depth_alpha}")
        if self.depth_alpha and self.base_depth is None:
            raise ValueError(f"`depth_alpha > 0` needs `base_depth`, but got depth_alpha={self.depth_alpha} and none")
        return self


class Optimizer(Section):
    family: Literal["adamw"] = "adamw"
    lr: Positive = 1e-2  # peak, at base width
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.1  # PyTorch's: the step shrinks weights by lr * weight_decay
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    eps: Positive = 1e-8
    clip: Positive = 1.0  # global gradient norm


class Schedule(Section):
    """A multiplier of each group's peak learning rate, a pure function of the share of tokens seen."""

    kind: Literal["constant", "linear", "cosine", "wsd"] = "wsd"
    warmup: Fraction = 0.1  # share of the tokens
    decay: Fraction = 0.3  # wsd: share of the tokens, at the end
    floor: Fraction = 0.0  # the last multiplier

    @model_validator(mode="after")
    def _room(self) -> Schedule:
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"`warmup + decay <= 1` must hold, but got warmup={self.warmup}, decay={self.decay}")
        return self


class Data(Section):
    source: str = PYTHON_STDLIB  # or a text file, a folder of text files, tokens as .bin (uint16) or .npy
    seq_len: Count = 64
    held_out: Annotated[float, Field(gt=0, lt=1)] = 0.05  # share of files (of a single file: its tail)


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
    ema: Annotated[float, Field(ge=0, lt=1)] = 0.0  # decay a step of averaged weights, which then give the held-out loss; 0: none


class Engine(Section):
    """Where and how trials run, and what is written beside the record. No part of a trial's identity."""

    kind: Literal["local"] = "local"
    workers: Literal["auto"] | Count = "auto"  # auto: one a GPU, or one a core
    processes: Count = 1  # that share one trial's batch
    accumulation: Count = 1  # micro-batches a process and step
    compile: bool = False  # torch.compile
    evaluate_at: list[Fraction] = []  # shares of the tokens, beside the end
    noise_every: Annotated[int, Field(ge=0)] = 0  # steps between measurements of the gradient-noise scale; 0: none
    checkpoint_every: Annotated[int, Field(ge=0)] = 0  # steps; 0: none
    trackers: list[Literal["tensorboard", "wandb"]] = []
    runs: str = "runs"  # folder of checkpoints and trackers, one of its own a trial

    @model_validator(mode="after")
    def _parts(self) -> Engine:
        if self.noise_every and self.processes * self.accumulation < 2:
            raise ValueError(
                "`processes * accumulation >= 2` must hold for a gradient-noise scale (it compares batches of two sizes), but got "
                f"processes={self.processes}, accumulation={self.accumulation}"
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
    engine: Engine = Engine()
    compare: list[Compare] = []
    fit: Ask = Ask()
    holdout: Holdout | None = None
    target: str | None = None  # a recipe file, relative to this one
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
    for path, value in settings.items():
        _put(content, _at(path), value)
    return validated(content, recipe.name)


def points(recipe: Recipe) -> list[Recipe]:
    """One recipe without axes for each combination of the axes, each validated by itself."""
    names = list(recipe.axes)
    bare = recipe.model_copy(update={"axes": {}})
    return [with_settings(bare, dict(zip(names, values, strict=True))) for values in itertools.product(*recipe.axes.values())]


def compared(recipe: Recipe, other: Compare) -> Recipe:
    """The sweep of one comparison: its settings put in, its axes in place of the recipe's."""
    return with_settings(recipe, {"axes": {**recipe.axes, **other.axes}, **other.set})


def identity(recipe: Recipe, data_digest: str) -> str:
    """A trial's id: the digest of what its point sets other than the defaults, with what the data holds in place of where it lies.

    So an option that is added later, at a default that changes nothing, leaves every recorded trial's id what it was.
    """
    point = recipe.model_dump(include=set(POINT), exclude_defaults=True)
    kinds = {"family": recipe.model.family, "optimizer": recipe.optimizer.family, "schedule": recipe.schedule.kind}
    data = {key: value for key, value in point.get("data", {}).items() if key != "source"} | {"digest": data_digest}
    return digest({**point, "data": data, "kinds": kinds})


def _table(annotation: Any) -> type[Section] | None:
    """The section that a field holds as X, X | None or list[X]."""
    return next((part for part in (annotation, *get_args(annotation)) if isinstance(part, type) and issubclass(part, Section)), None)


def _known(location: Iterable[Any]) -> Iterable[str]:
    """The keys of the table at a pydantic location."""
    section: type[Section] | None = Recipe
    for part in location:
        if section and isinstance(part, str):
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
        recipe = validated(content, path.stem)
        for asked in (recipe, *(compared(recipe, other) for other in recipe.compare)):
            points(asked)  # every combination must be valid before anything is trained
        with_settings(recipe, recipe.holdout.set if recipe.holdout else {})
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    return recipe.model_copy(update={"data": _beside(recipe.data, path)})


def _beside(data: Data, path: Path) -> Data:
    """A data source that is a file is relative to the recipe that names it, else to the working folder."""
    near = path.parent / data.source
    return data.model_copy(update={"source": str(near)}) if data.source != PYTHON_STDLIB and near.exists() else data
