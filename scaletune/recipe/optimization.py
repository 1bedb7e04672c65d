"""The recipe tables of parametrization, optimizer, schedule, budget and training options."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from scaletune.errors import UserError, nearest
from scaletune.rules import FORMS
from scaletune.sections import Count, Fraction, NotNegative, Positive, Section


class Parametrization(Section):
    """How hyperparameters at the base size become those of each tensor: see `scaletune.rules`."""

    form: str = "mup"
    """Parametrization: mup (= mup_t8), mup_t3, mup_t9, sp, sp_per_layer, ntk, mean_field, u_mup or
    unit_scaling."""
    base_width: Count
    """Width at which lr, weight decay and init std are written."""
    base_depth: Count | None = None
    """Depth at which they are written. Needed with `depth_alpha`."""
    depth_alpha: float = 0.0
    """Residual branches are multiplied by (depth / base_depth)**-depth_alpha. 0: no depth rule;
    0.5: depth-muP; 1: CompleteP."""
    init_std: Positive = 0.02
    """Standard deviation of every matrix at init, at the base width."""
    init_gain: Positive | None = None
    """If given, every matrix except tables has the init std init_gain / sqrt(fan-in), at the base
    width."""
    embedding_multiplier: Positive = 1.0
    """Multiplier of the embedding's output, at the base width."""
    attention_multiplier: Positive = 1.0
    """Multiplier of the softmax scale head_dim**-0.5. The head size does not grow with width."""
    residual_multiplier: Positive = 1.0
    """Multiplier of every residual branch, at the base depth."""
    logits_multiplier: Positive = 1.0
    """Multiplier of the logits, at the base width."""

    @model_validator(mode="after")
    def _known(self) -> Parametrization:
        if self.form not in FORMS:
            raise ValueError(
                f"`form` must be a known form, but got {self.form!r}{nearest(self.form, FORMS)}"
            )
        if self.depth_alpha not in (0, 0.5, 1):
            raise ValueError(f"`depth_alpha` must be 0, 0.5 or 1, but got {self.depth_alpha}")
        if self.depth_alpha and self.base_depth is None:
            raise ValueError(
                "`depth_alpha > 0` needs `base_depth`, but got"
                f" depth_alpha={self.depth_alpha} and none"
            )
        return self


MUON_RULES = {
    "original": "muon",
    "match_rms_adamw": "muon_match_rms",
    "spectral": "muon_spectral",
}
"""Shape factor of Muon -> its family in `scaletune.rules`."""
OPTIMIZER_SETTINGS = {
    "adamw": {"beta1", "beta2", "eps", "decay"},
    "sgd": {"momentum", "nesterov"},
    "adafactor": {"decay"},
    "lion": {"beta1", "beta2", "decay"},
    "lamb": {"beta1", "beta2", "eps"},
    "muon": {
        *("momentum", "nesterov", "shape_factor", "beta1", "beta2"),
        *("eps", "rest_ratio", "decay"),
    },
    "shampoo": {"precondition_every", "beta1", "beta2", "eps", "rest_ratio", "decay"},
    "soap": {"precondition_every", "beta1", "beta2", "eps", "decay"},
    "adam_atan2": {"beta1", "beta2", "decay"},
    "dadapt_adam": {"beta1", "beta2", "eps"},
    "prodigy": {"beta1", "beta2", "eps"},
    "schedulefree_adamw": {"beta1", "beta2", "eps", "decay"},
    "momo_adam": {"beta1", "beta2", "eps", "decay"},
}
"""Optimizer family -> the settings it reads besides lr, weight_decay and clip. "decay": its weight
decay can be independent."""
LR_FREE = ("dadapt_adam", "prodigy")
"""Families that find the base lr themselves."""


class Optimizer(Section):
    """The optimizer and its settings at the base size.

    `scaletune.optim` builds it, `scaletune.rules` scales it.
    """

    family: str = "adamw"
    """adamw, sgd, adafactor, lion, lamb, muon, shampoo, soap, adam_atan2, dadapt_adam, prodigy,
    schedulefree_adamw or momo_adam."""
    lr: Positive = 1e-2
    """Peak learning rate, at the base width. Must be 1.0 for dadapt_adam and prodigy."""
    weight_decay: NotNegative = 0.1
    """Weight decay, at the base width: see `decay`."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay rate of the first moment."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """Decay rate of the second moment."""
    eps: Positive = 1e-8
    """Term added to the denominator of a step, at the base width. shampoo: the damping."""
    clip: Positive = 1.0
    """Maximum global gradient norm."""
    decay: str = "torch"
    """How weights decay. torch: a step shrinks them by lr * weight_decay (sgd: L2 in the gradient;
    lamb: inside the trust ratio). independent: by weight_decay times the schedule's multiplier, so
    by weight_decay at the peak (arXiv:1711.05101, Algorithm 2; arXiv:2309.14322)."""
    momentum: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """sgd, muon: momentum."""
    nesterov: bool = True
    """sgd, muon: whether the momentum is Nesterov's."""
    shape_factor: Literal["original", "match_rms_adamw", "spectral"] = "original"
    """muon: the factor on its orthogonal update."""
    rest_ratio: Positive = 1.0
    """muon, shampoo: lr of the tensors that AdamW trains, over `lr`."""
    precondition_every: Count = 10
    """shampoo, soap: steps between updates of the preconditioner. shampoo changes no matrix before
    the first update."""

    @model_validator(mode="after")
    def _known(self) -> Optimizer:
        if self.family not in OPTIMIZER_SETTINGS:
            raise ValueError(
                "`optimizer.family` must be a known family, but got"
                f" {self.family!r}{nearest(self.family, OPTIMIZER_SETTINGS)}"
            )
        if self.decay == "l2":
            raise ValueError(
                "`optimizer.decay` must be 'torch' or 'independent', but got 'l2': L2 in the"
                " gradient does not scale with width like the gradient of the loss, and a"
                " coordinate check does not detect it"
                + (" (under sgd 'torch' is L2, which is correct there)" * (self.family == "sgd"))
            )
        if self.decay not in ("torch", "independent"):
            raise ValueError(
                f"`optimizer.decay` must be 'torch' or 'independent', but got {self.decay!r}"
            )
        return self

    @model_validator(mode="after")
    def _read(self) -> Optimizer:
        read = OPTIMIZER_SETTINGS[self.family] | {"family", "lr", "weight_decay", "clip"}
        for name, field in type(self).model_fields.items():
            value = getattr(self, name)
            if name not in read and value != field.default:
                readers = [family for family, keys in OPTIMIZER_SETTINGS.items() if name in keys]
                raise ValueError(
                    f"family {self.family!r} does not read `{name}`, but got {value!r}"
                    f" (read by: {', '.join(readers)})"
                )
        if self.nesterov and not self.momentum:
            raise ValueError(
                "`nesterov` needs `momentum > 0`, but got momentum=0; write nesterov = false"
            )
        if self.family in LR_FREE and self.lr != 1:
            raise ValueError(
                f"`optimizer.lr` must be 1.0 for family {self.family!r}, which finds its own"
                f" learning rate, but got {self.lr}"
            )
        if self.family == "schedulefree_adamw" and not self.beta1:
            raise ValueError(
                "`beta1` must be above 0 for family 'schedulefree_adamw', which interpolates with"
                " it, but got 0"
            )
        return self

    @property
    def rule(self) -> str:
        """The family's name in `scaletune.rules`."""
        return MUON_RULES[self.shape_factor] if self.family == "muon" else self.family


class Schedule(Section):
    """The learning rate schedule, a function of the share of tokens seen.

    It multiplies the peak lr of each parameter group: see `scaletune.optim.multiplier`.
    """

    kind: Literal["constant", "linear", "cosine", "wsd", "power", "one_cycle", "table"] = "wsd"
    """Kind of schedule. wsd: warmup, stable, decay."""
    warmup: Fraction = 0.1
    """Length of the linear warmup, as a share of the token budget."""
    warmup_tokens: Count | None = None
    """Length of the warmup in tokens. Replaces `warmup`."""
    decay: Fraction = 0.3
    """wsd, power: length of the final decay, as a share of the token budget."""
    decay_shape: Literal["linear", "cosine", "1-sqrt"] = "linear"
    """wsd, power: shape of the final decay (arXiv:2405.18392)."""
    floor: Fraction = 0.0
    """Final multiplier of the lr. power: final multiplier over that at the start of the decay."""
    start: Fraction = 0.04
    """one_cycle: first multiplier."""
    knee: Annotated[float, Field(gt=0)] | None = None
    """power: where the lr starts to fall, as a share of the token budget."""
    knee_tokens: Count | None = None
    """power: where the lr starts to fall, in tokens. Replaces `knee`."""
    power: Positive = 0.51
    """power: exponent, lr ~ tokens**-power (arXiv:2408.13359)."""
    shares: list[Fraction] = []
    """table: the shares of the token budget from which each of `multipliers` applies. The first
    is 0."""
    multipliers: list[Positive] = []
    """table: multipliers of the lr. They may be above 1. The warmup multiplies them."""
    ema_half_life: Count | None = None
    """Half-life in tokens of an exponential moving average of the weights, which is evaluated in
    place of the weights. Default: no average."""

    @model_validator(mode="after")
    def _room(self) -> Schedule:
        decays = self.kind in ("wsd", "power")
        if decays and self.warmup + self.decay > 1 and self.warmup_tokens is None:
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
                    f"`schedule.{name}` is read only by {' and '.join(kinds)}, but got"
                    f" kind={self.kind!r}"
                )
        if self.kind == "power" and (self.knee is None) == (self.knee_tokens is None):
            raise ValueError(
                "schedule 'power' needs either `knee` or `knee_tokens`, where the lr starts to fall"
            )
        return self

    @model_validator(mode="after")
    def _tabled(self) -> Schedule:
        shares, n = self.shares, len(self.multipliers)
        if self.kind == "table" and (
            not shares or shares[0] != 0 or sorted(set(shares)) != shares or len(shares) != n
        ):
            raise ValueError(
                "schedule 'table' needs one multiplier for each of `shares`, which start at 0 and"
                f" increase, but got {shares} and {n} multipliers"
            )
        return self


class Budget(Section):
    """How long to train and to evaluate."""

    tokens: Count
    """Training tokens. Must be a multiple of `batch_tokens`."""
    batch_tokens: Count
    """Batch size in tokens per optimizer step, over all processes."""
    eval_tokens: Count = 65536
    """Held-out tokens of one evaluation."""

    @model_validator(mode="after")
    def _steps(self) -> Budget:
        if self.tokens % self.batch_tokens:
            raise ValueError(
                "`tokens % batch_tokens == 0` must hold, but got"
                f" tokens={self.tokens}, batch_tokens={self.batch_tokens}"
            )
        return self

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_tokens


class Training(Section):
    """Options of the training loop that change the result. Part of a trial's identity."""

    precision: Literal["float32", "bf16"] = "float32"
    """bf16: autocast; weights, optimizer and held-out loss stay in float32."""
    z_loss: NotNegative = 0.0
    """Coefficient of the z-loss, the mean of log(Z)**2 (arXiv:2204.02311, section 5)."""


def resolve_schedule(schedule: Schedule, budget: Budget) -> Schedule:
    """The schedule with its lengths in tokens as shares of the budget; UserError if too long."""
    shares = {
        name: tokens / budget.tokens
        for name in ("warmup", "knee")
        if (tokens := getattr(schedule, f"{name}_tokens")) is not None
    }
    decays, warmup = schedule.kind in ("wsd", "power"), shares.get("warmup", 0)
    if warmup > 1 or (decays and warmup + schedule.decay > 1):
        raise UserError(
            "`warmup_tokens / tokens + decay <= 1` must hold, but got"
            f" warmup_tokens={schedule.warmup_tokens}, tokens={budget.tokens}"
            + (f", decay={schedule.decay}" if decays else "")
        )
    if not shares:
        return schedule
    return schedule.model_copy(update=shares | {f"{name}_tokens": None for name in shares})
