"""Puts a fit's prediction into a target recipe: a `Transfer` is what every config is written from.

`prepare` predicts the learning rate at the target, checks that the proxies and the target match,
and plans the multiplier, init std, lr, weight decay and eps of each tensor.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

from scaletune import counting
from scaletune.counting.point_sizes import Measure, PointSizes
from scaletune.errors import UserError
from scaletune.predicting import Prediction
from scaletune.recipe import Recipe, with_settings
from scaletune.records import Fit
from scaletune.rules import TensorPlan, TransferPrior, batch_rule, caveats, shift
from scaletune.transferring import own_target
from scaletune.units import human

LR_MEANS = ("family", "decay", "momentum", "nesterov", "shape_factor", "rest_ratio")
"""Optimizer settings that change the meaning of a learning rate."""

UNSURE = 1e100
"""An lr interval with a larger ratio of its ends is unbounded (the joint surface clips them)."""

TOO_FAR = 30
"""A target further outside the fitted range than this factor needs `force`."""


@dataclass(frozen=True)
class Transfer:
    """What an emitter writes a config from."""

    target: Recipe
    """The target recipe with the predicted learning rate."""

    vocab_size: int
    """Vocabulary size in tokens."""

    plan: list[TensorPlan]
    """One row per tensor: multiplier, init std, lr, weight decay, eps."""

    multipliers: dict[str, float]
    """Forward multipliers: `embedding`, `attention` (the softmax scale), `residual`, `logits`."""

    evidence: dict[str, Any]
    """The fit's digest, law, prediction, interval, status sentences and assumptions."""

    sizes: PointSizes | None = None
    """Of a model of the user, whose tensors are not known and whose plan is empty."""

    def to_dict(self) -> dict[str, Any]:
        """Returns the plan as plain JSON values, independent of any training stack."""
        t, p = self.target, self.target.parametrization
        sizes = t.model.model_dump() | t.budget.model_dump()
        decay = {"weight_decay_mode": "each step shrinks weights by lr * weight_decay"}
        return {
            "schema": "scaletune.plan/1",
            "base": {"width": p.base_width, "depth": p.base_depth or t.model.depth},
            "target": sizes | {"seq_len": t.data.seq_len, "vocab_size": self.vocab_size},
            "form": p.form,
            "multipliers": self.multipliers,
            "optimizer": t.optimizer.model_dump() | decay,
            "schedule": t.schedule.model_dump() | {"multiplies": "each group's own peak lr"},
            "tensors": [asdict(row) for row in self.plan],
            "evidence": self.evidence,
        }


def is_router(row: TensorPlan) -> bool:
    """A router is the only tensor besides hidden matrices whose multiplier has no config key."""
    return ".mlp.gate." in row.name


def one_std(transfer: Transfer) -> tuple[list[TensorPlan], dict[str, float]]:
    """Rewrites the plan so that all matrices share one init std and hidden ones need no multiplier.

    This is an exact reparametrization (`scaletune.rules.shift`), for stacks whose config has a
    single `initializer_range`. The multiplier of a router that is a readout is folded into its
    weights, so the router has its own std.

    Returns:
        The rewritten rows, and the forward multipliers that go with them.
    """
    hidden = {row.init_std * row.multiplier for row in transfer.plan if row.role == "hid"}
    if max(hidden) > min(hidden) * (1 + 1e-9):
        raise UserError(
            "a config with one init std needs the same init std times multiplier in all hidden"
            f" matrices, but the plan has {sorted(hidden)}: emit 'pytorch'"
        )
    common = min(hidden)
    theta = {row.name: row.init_std / common if row.init_std else 1.0 for row in transfer.plan}
    theta |= {row.name: 1 / row.multiplier for row in transfer.plan if is_router(row)}
    rows = [shift(row, theta[row.name], row.family) for row in transfer.plan]
    embedding = theta["model.embed_tokens.weight"]
    head = theta.get("lm_head.weight", embedding)  # tied: the same tensor
    m = transfer.multipliers
    return rows, m | {"embedding": m["embedding"] * embedding, "logits": m["logits"] * head}


def at_batch(fit: Fit, n_params: float, tokens: float, batch_tokens: float) -> Prediction:
    """Returns the fit's prediction, at this batch size if its law has a batch term."""
    batch = {"batch_tokens": float(batch_tokens)} if fit.law in ("lr_ndb", "joint") else {}
    return fit.predict(n_params=n_params, tokens=tokens, **batch)


def differences(target: Recipe, setting: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """Describes each setting in which the target differs from all proxies.

    The parametrization and the optimizer must not differ, because a learning rate at base width has
    another meaning under another form, base width or optimizer family. Other settings (beta2, for
    example) are assumed not to move the optimum.

    Args:
        target: The target recipe.
        setting: What all proxies share, as `{section: {key: value}}`.

    Raises:
        UserError: The parametrization differs, or an optimizer setting of `LR_MEANS`.
    """
    content, sentences = target.model_dump(), []
    for section, shared in setting.items():
        if section == "trainer":
            sentences += own_target.other_trainer(target, shared)
            continue
        for key, value in shared.items():
            own = content[section].get(key, None if section == "my" else value)
            of_data = (section, key) == ("data", "source") or (own, key) == (None, "vocab_size")
            if own == value or of_data:
                continue
            both = f"`{section}.{key}` is {own!r}"
            if section == "parametrization":
                raise UserError(
                    f"a target must have the proxies' parametrization, but {both}"
                    f" and the proxies had {value!r}"
                )
            if section == "optimizer" and key in LR_MEANS:
                raise UserError(
                    f"a target must have the proxies' optimizer, but {both}"
                    f" and the proxies had {value!r}"
                )
            sentences.append(f"{both}, every proxy had {value!r}: assumed not to move the optimum")
    return sentences


def prepare(
    fit: Fit,
    target: Recipe,
    vocab_size: int | None = None,
    force: bool = False,
    sizes: Measure | None = None,
) -> Transfer:
    """Puts the fit's prediction at the target into the target recipe.

    Args:
        fit: A fit of a law that gives a learning rate.
        target: The target recipe.
        vocab_size: Vocabulary size; by default the target's or the proxies'.
        force: Allow a target more than `TOO_FAR` times outside the fitted range.
        sizes: Measures a model that is not in the zoo. Default: what its recipe states.

    Raises:
        UserError: The target has another parametrization or optimizer than the proxies, it is too
            far
            outside the fitted range without `force`, or the fit gives no learning rate with a
            finite interval.
    """
    setting = fit.provenance.get("setting") or {}
    vocab_size = vocab_size or _vocab_size(target, setting)
    untested = differences(target, setting)
    measured = (
        None if own_target.knows_tensors(target) else own_target.measure_target(target, sizes)
    )
    n_params = _n_params(target, vocab_size, measured)
    best, prior = _predict(fit, target, n_params)
    assert best.lr is not None
    far = _far_sentences(fit, target, n_params, force)
    own_cautions = _own_cautions(target, prior, setting)
    assumptions = [
        *target.evidence.get("architecture", []),
        *fit.assumptions,
        prior.sentence,
        *_depth_sentence(target, fit.ranges.get("depth", [])),
        *far,
        *untested,
        *_rule_caveats(target),
    ]
    evidence = {
        "scaletune": version("scaletune"),
        "fit": fit.digest,
        "law": fit.law,
        "n_params": n_params,
        "tokens": target.budget.tokens,
        "batch_tokens": target.budget.batch_tokens,
        "lr": best.lr * prior.factor,
        "lr_at_fitted_batch": best.lr,
        "interval": best.interval | {"lr": _scaled(best.interval["lr"], prior.factor)},
        "level": fit.level,
        "band": best.band | {"lr": _scaled(best.band["lr"], prior.factor)},
        "loss": best.loss,
        "status": [*best.warnings, *_unknown_parametrization(target, setting), *own_cautions]
        or ["ok"],
        "assumptions": assumptions,
    }
    settings = {"lr": float(f"{best.lr * prior.factor:.4g}")}
    if best.weight_decay is not None:  # the lr is optimal together with this weight decay
        settings["weight_decay"] = evidence["weight_decay"] = float(f"{best.weight_decay:.4g}")
    recipe = with_settings(target, settings | {"evidence": evidence})
    if measured:
        return Transfer(recipe, vocab_size, [], {}, evidence, measured)
    plan = counting.plan_tensors(recipe, vocab_size)
    return Transfer(recipe, vocab_size, plan, counting.multipliers(recipe, vocab_size), evidence)


def _n_params(target: Recipe, vocab_size: int, measured: PointSizes | None) -> int:
    if measured:
        return round(measured.n_params)
    return counting.params(target.model, vocab_size)["n_params"]


def _own_cautions(
    target: Recipe, prior: TransferPrior, setting: Mapping[str, Mapping[str, Any]]
) -> list[str]:
    """Warnings about a target or proxies that the user's own trainer trains."""
    cautions = own_target.unused_lr(target)
    if prior.name == own_target.UNKNOWN_OPTIMIZER:
        cautions.append(prior.sentence)
    if "trainer" in setting and not target.foreign:
        cautions.append(
            "the proxies were trained by your own trainer, and the target is not: the fitted lr is"
            " assumed to mean the same for both"
        )
    return cautions


def _vocab_size(target: Recipe, setting: Mapping[str, Any]) -> int:
    of_proxies = setting.get("data", {}).get("vocab_size")
    return target.data.vocab_size or of_proxies or counting.BYTES_TEXT_VOCAB


def _scaled(pair: list[float] | None, factor: float) -> list[float] | None:
    return [value * factor for value in pair] if pair else None


def _predict(fit: Fit, target: Recipe, n_params: int) -> tuple[Prediction, TransferPrior]:
    """The prediction, and the rule that scales its lr to the target's batch size.

    The rule's factor is 1 if the law itself has a batch term.
    """
    batch = target.budget.batch_tokens
    best = at_batch(fit, n_params, target.budget.tokens, batch)
    if best.lr is None or not math.isfinite(best.lr):
        raise UserError(
            f"a transfer needs a law that gives a learning rate, but `{fit.law}` gives none:"
            " fit law 'lr_nd'"
        )
    _require_interval(best)
    if best.batch_tokens is None:
        sentence = (
            f"batch of {batch:g} tokens: lr is not adjusted to it, because the fitted runs do not"
            " share one batch size"
        )
        return best, TransferPrior(1.0, sentence)
    if target.foreign and batch != best.batch_tokens and not target.states("optimizer.family"):
        return best, own_target.unknown_batch_rule(batch, best.batch_tokens)
    return best, batch_rule(batch, best.batch_tokens, target.optimizer.beta1)


def _require_interval(best: Prediction) -> None:
    pair = best.interval.get("lr")
    if not pair or not all(map(math.isfinite, pair)) or pair[1] > UNSURE * pair[0]:
        raise UserError(
            "a transfer needs a bounded interval of lr, but the fit's interval at this target is"
            f" {pair}: add proxies, or proxies nearer to the target"
        )


def _far_sentences(fit: Fit, target: Recipe, n_params: int, force: bool) -> list[str]:
    """One sentence per variable that is more than TOO_FAR times outside the fitted range."""
    budget = target.budget
    scale = {
        "n_params": n_params,
        "tokens": budget.tokens,
        "batch_tokens": budget.batch_tokens,
        "depth": target.model.depth,
    }
    sentences = []
    for column, (low, high) in fit.ranges.items():
        value = scale.get(column) or 0.0
        factor = max(value / high, low / value) if value else 1.0
        if factor > TOO_FAR * (1 + 1e-9):
            sentences.append(
                f"{column} {human(value)} is {factor:.3g}x outside the fitted range"
                f" ({human(low)} to {human(high)})"
            )
    if sentences and not force:
        raise UserError(
            f"a target must be at most {TOO_FAR}x outside the fitted range, but {sentences[0]}:"
            " train larger proxies, or transfer anyway with --force"
        )
    return [f"forced: {sentence}" for sentence in sentences]


def _depth_sentence(target: Recipe, fitted_depths: list[float]) -> list[str]:
    depth, p = target.model.depth, target.parametrization
    if target.foreign and not p.model_fields_set:
        rule = "what your trainer does with depth decides"
    else:
        rule = (
            f"residual branches scale as depth**-{p.depth_alpha:g}"
            if p.depth_alpha
            else "no depth rule"
        )
    if not fitted_depths or (fitted_depths[0] <= depth <= fitted_depths[-1]):
        return []
    return [f"depth {fitted_depths[-1]:g} -> {depth}, {rule}: no proxy tested another depth"]


def _rule_caveats(target: Recipe) -> list[str]:
    form, rule = target.parametrization.form, target.optimizer.rule
    if target.foreign and not target.parametrization.model_fields_set:
        return []
    return [f"caveat of the scaling rules: {caveat}" for caveat in caveats(form, rule)]


def _unknown_parametrization(target: Recipe, setting: Mapping[str, Any]) -> list[str]:
    """A warning if the records do not state the parametrization of their runs."""
    p, width = target.parametrization, target.model.width
    if setting.get("parametrization") or p.form == "sp" or p.base_width == width:
        return []
    return [
        "the records do not state the parametrization of their runs: the fitted lr is assumed to"
        f" hold at base width {p.base_width} and is scaled with form {p.form!r} to width {width}."
        " If the runs used standard parametrization, the fitted lr is that of every tensor:"
        f" set parametrization.base_width to {width}"
    ]
