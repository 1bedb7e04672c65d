"""How hyperparameters become each tensor's own, and which optimizer and schedule apply them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.errors import UserError, nearest
from scaletune.rules import FORMS
from scaletune.sections import Count, Fraction, Positive, Section


class Parametrization(Section):
    """How hyperparameters written at the base size become each tensor's own: see `scaletune.rules`."""

    form: str = "mup"
    base_width: Count
    base_depth: Count | None = None  # needed by a depth rule
    depth_alpha: float = (
        0.0  # 0, 1/2 or 1: residual branches times (depth / base_depth)**-alpha; 0: no depth rule
    )
    init_std: Positive = 0.02  # of every matrix at the base width
    init_gain: Positive | None = (
        None  # if given, of every matrix but tables: init_gain / sqrt(fan-in) at the base width instead
    )
    embedding_multiplier: Positive = 1.0  # at the base width, as are the next three
    attention_multiplier: Positive = (
        1.0  # of the softmax's scale head_dim**-0.5: the head size does not grow
    )
    residual_multiplier: Positive = 1.0  # of every residual branch
    logits_multiplier: Positive = 1.0

    @model_validator(mode="after")
    def _known(self) -> Parametrization:
        if self.form not in FORMS:
            raise ValueError(
                f"`form` must be one we know, but got {self.form!r}{nearest(self.form, FORMS)}"
            )
        if self.depth_alpha not in (0, 0.5, 1):
            raise ValueError(f"`depth_alpha` must be 0, 0.5 or 1, but got {self.depth_alpha}")
        if self.depth_alpha and self.base_depth is None:
            raise ValueError(
                f"`depth_alpha > 0` needs `base_depth`, but got depth_alpha={self.depth_alpha} and none"
            )
        return self


MUON = {
    "original": "muon",
    "match_rms_adamw": "muon_match_rms",
    "spectral": "muon_spectral",
}  # shape factor -> rule
READS = {  # optimizer family -> what it reads beside lr, weight_decay and clip; `decay`: its weight decay can be independent
    "adamw": {"beta1", "beta2", "eps", "decay"},
    "sgd": {"momentum", "nesterov"},
    "adafactor": {"decay"},
    "lion": {"beta1", "beta2", "decay"},
    "lamb": {"beta1", "beta2", "eps"},
    "muon": {
        "momentum",
        "nesterov",
        "shape_factor",
        "beta1",
        "beta2",
        "eps",
        "rest_ratio",
        "decay",
    },
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
    shape_factor: Literal["original", "match_rms_adamw", "spectral"] = (
        "original"  # muon's, on its orthogonal update
    )
    rest_ratio: Positive = 1.0  # lr of the tensors that muon and shampoo leave to AdamW, over `lr`
    precondition_every: Count = 10  # steps; shampoo moves no matrix before the first

    @model_validator(mode="after")
    def _known(self) -> Optimizer:
        if self.family not in READS:
            raise ValueError(
                f"`optimizer.family` must be one we know, but got {self.family!r}{nearest(self.family, READS)}"
            )
        if self.decay == "l2":
            raise ValueError(
                "L2 in the gradient does not scale as the loss gradient with width, and no coordinate check shows it: `optimizer.decay` must be"
                " 'torch' or 'independent', but got 'l2'"
                + (
                    " (under sgd 'torch' is L2, which is sound there)"
                    if self.family == "sgd"
                    else ""
                )
            )
        if self.decay not in ("torch", "independent"):
            raise ValueError(
                f"`optimizer.decay` must be 'torch' or 'independent', but got {self.decay!r}"
            )
        return self

    @model_validator(mode="after")
    def _read(self) -> Optimizer:
        always = {"family", "lr", "weight_decay", "clip"}
        fields = type(self).model_fields.items()
        for name in (
            name
            for name, field in fields
            if name not in READS[self.family] | always and getattr(self, name) != field.default
        ):
            readers = ", ".join(family for family, read in READS.items() if name in read)
            raise ValueError(
                f"family {self.family!r} does not read `{name}`, but got {getattr(self, name)!r} (read by: {readers})"
            )
        if self.nesterov and not self.momentum:
            raise ValueError(
                "`nesterov` needs `momentum > 0`, but got momentum=0; write nesterov = false"
            )
        if self.family in LR_FREE and self.lr != 1:
            raise ValueError(
                f"family {self.family!r} finds its own learning rate: `optimizer.lr` must be 1.0, but got {self.lr}"
            )
        if self.family == "schedulefree_adamw" and not self.beta1:
            raise ValueError(
                "family 'schedulefree_adamw' interpolates with `beta1`, which must be above 0, but got 0"
            )
        return self

    @property
    def rule(self) -> str:
        """The family's name in `scaletune.rules`."""
        return MUON[self.shape_factor] if self.family == "muon" else self.family


class Schedule(Section):
    """A multiplier of each group's peak learning rate, a pure function of the share of tokens seen: see `scaletune.optim.multiplier`."""

    kind: Literal["constant", "linear", "cosine", "wsd", "power", "one_cycle", "table"] = "wsd"
    warmup: Fraction = 0.1  # share of the tokens
    warmup_tokens: Count | None = None  # in place of `warmup`
    decay: Fraction = 0.3  # wsd, power: share of the tokens, at the end
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"  # wsd, power (arXiv:2405.18392)
    floor: Fraction = 0.0  # the last multiplier; of power: over that of its decay's start
    start: Fraction = 0.04  # one_cycle: the first multiplier
    knee: Annotated[float, Field(gt=0)] | None = (
        None  # power: tokens at which lr starts to fall, over the budget's
    )
    knee_tokens: Count | None = None  # in place of `knee`
    power: Positive = 0.51  # power: lr ~ tokens**-power (arXiv:2408.13359)
    shares: list[
        Fraction
    ] = []  # table: of the tokens, from where on each of `multipliers` holds; the first is 0
    multipliers: list[Positive] = []  # table: of lr, which they may exceed; warmup multiplies them
    ema_half_life: Count | None = (
        None  # tokens; the weights judged are then their exponential moving average
    )

    @model_validator(mode="after")
    def _room(self) -> Schedule:
        if (
            self.kind in ("wsd", "power")
            and self.warmup + self.decay > 1
            and self.warmup_tokens is None
        ):
            raise ValueError(
                f"`warmup + decay <= 1` must hold, but got warmup={self.warmup}, decay={self.decay}"
            )
        return self

    @model_validator(mode="after")
    def _own(self) -> Schedule:
        owners = {
            "decay_shape": ("wsd", "power"),
            "start": ("one_cycle",),
            **dict.fromkeys(("knee", "knee_tokens", "power"), ("power",)),
        }
        owners |= dict.fromkeys(("shares", "multipliers"), ("table",))
        for name, kinds in owners.items():
            if (
                self.kind not in kinds
                and getattr(self, name) != type(self).model_fields[name].default
            ):
                raise ValueError(
                    f"`schedule.{name}` is read by {' and '.join(kinds)} alone, but got kind={self.kind!r}"
                )
        if self.kind == "power" and (self.knee is None) == (self.knee_tokens is None):
            raise ValueError(
                "schedule 'power' needs one of `knee` and `knee_tokens`, from where lr falls"
            )
        return self

    @model_validator(mode="after")
    def _tabled(self) -> Schedule:
        shares, n = self.shares, len(self.multipliers)
        if self.kind == "table" and (
            not shares or shares[0] != 0 or sorted(set(shares)) != shares or len(shares) != n
        ):
            raise ValueError(
                f"schedule 'table' needs a multiplier for each of `shares`, which start at 0 and ascend, but got {shares} and {n} multipliers"
            )
        return self


class Budget(Section):
    tokens: Count
    batch_tokens: Count  # per optimizer step, over all processes
    eval_tokens: Count = 65536  # held-out

    @model_validator(mode="after")
    def _steps(self) -> Budget:
        if self.tokens % self.batch_tokens:
            raise ValueError(
                f"`tokens % batch_tokens == 0` must hold, but got tokens={self.tokens}, batch_tokens={self.batch_tokens}"
            )
        return self

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


class Training(Section):
    """What of the loop changes the result: part of a trial's identity."""

    precision: Literal["float32", "bf16"] = (
        "float32"  # bf16: autocast; weights, optimizer and held-out loss stay float32
    )
    z_loss: Annotated[float, Field(ge=0, allow_inf_nan=False)] = (
        0.0  # adds this times the mean of log(Z)**2 (arXiv:2204.02311, section 5)
    )


def resolved(schedule: Schedule, budget: Budget) -> Schedule:
    """The schedule with what it says in tokens put as shares of the budget; UserError when they do not fit into it."""
    shares = {
        name: tokens / budget.tokens
        for name in ("warmup", "knee")
        if (tokens := getattr(schedule, f"{name}_tokens")) is not None
    }
    if shares.get("warmup", 0) > 1 or (
        schedule.kind in ("wsd", "power") and shares.get("warmup", 0) + schedule.decay > 1
    ):
        raise UserError(
            f"`warmup_tokens / tokens + decay <= 1` must hold, but got warmup_tokens={schedule.warmup_tokens}, tokens={budget.tokens}"
            + (f", decay={schedule.decay}" if schedule.kind in ("wsd", "power") else "")
        )
    return (
        schedule.model_copy(update=shares | {f"{name}_tokens": None for name in shares})
        if shares
        else schedule
    )
