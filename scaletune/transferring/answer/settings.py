"""Everything a target's owner asks: every setting with its source, loss, FLOPs, GPU-hours, memory, split, and what being off by 2x costs.

A value is fitted, as the target asks, or as in the proxies; what a prior would make of it is said beside it and not applied.
"""

from __future__ import annotations

from typing import Any

from scaletune import counting
from scaletune.errors import UserError
from scaletune.recipe import READS, resolved
from scaletune.records import Fit
from scaletune.rules import Change, prior
from scaletune.transferring import Transfer, at_batch
from scaletune.transferring.answer.cost import cost
from scaletune.transferring.answer.sensitivity import straying

TOLD = (
    "beta1",
    "beta2",
    "eps",
    "momentum",
    "clip",
)  # of an optimizer beside lr and weight decay, where it reads them


def answer(fit: Fit, made: Transfer) -> dict[str, Any]:
    """The whole answer as plain JSON values."""
    evidence, target = made.evidence, made.target
    scale = {name: float(evidence[name]) for name in ("n_params", "tokens", "batch_tokens")}
    return {
        "schema": "scaletune.answer/1",
        "n_params": evidence["n_params"], "tokens": evidence["tokens"], "level": fit.level,
        "settings": _settings(fit, made, scale),
        "loss": {
            "value": evidence["loss"], "interval": evidence["interval"].get("loss"), "unit": "nats per token",
            "source": f"fitted: law {(fit.loss_law or fit).law}" if evidence["loss"] is not None else "the fitted law gives no loss",
        },
        "off_by_2x": straying(fit, scale, evidence["loss"]),
        "flops": _flops(made),
        **cost(target, made.vocab_size),
        "priors": priors(fit, made, scale),
        "status": evidence["status"], "assumptions": evidence["assumptions"], "fit": fit.digest,
    }  # fmt: skip


def _source(fit: Fit, section: str, key: str, value: Any) -> str:
    """Where a setting that no law gives comes from."""
    setting = fit.provenance.get("setting") or {}
    if not setting:
        return "as the target asks: the records do not say what the proxies had"
    if key not in setting.get(section, {}):
        return "as the target asks: it was not one value in all proxies"
    theirs = setting[section][key]
    return (
        "as in the proxies, base size"
        if theirs == value
        else f"as the target asks: every proxy had {theirs!r}"
    )


def _settings(fit: Fit, made: Transfer, scale: dict[str, float]) -> dict[str, Any]:
    target, evidence = made.target, made.evidence
    optimizer = target.optimizer
    told: dict[str, Any] = {
        "lr": {
            "value": optimizer.lr, "interval": evidence["interval"]["lr"], "band": evidence["band"]["lr"],
            "source": f"fitted: law {fit.law}; peak, at base width {target.parametrization.base_width}",
        },
        "batch_tokens": _batch(fit, made, scale),
        "weight_decay": _weight_decay(fit, made),
    }  # fmt: skip
    for key in TOLD:
        if key in {*READS[optimizer.family], "clip"}:
            value = getattr(optimizer, key)
            told[key] = {"value": value, "source": _source(fit, "optimizer", key, value)}
    return told | {
        "warmup": _warmup(fit, made),
        "schedule": _schedule(fit, made),
        "init_std": _init(fit, made),
    }


def _batch(fit: Fit, made: Transfer, scale: dict[str, float]) -> dict[str, Any]:
    """The batch asked; beside it the fit's own best where its law has one."""
    asked = {"value": made.target.budget.batch_tokens, "source": "as the target asks"}
    if fit.law != "joint":
        return asked
    best = fit.predict(n_params=scale["n_params"], tokens=scale["tokens"])
    return asked | {
        "fitted_best": best.batch_tokens,
        "interval": best.interval["batch_tokens"],
        "loss_at_best": best.loss,
    }


def _weight_decay(fit: Fit, made: Transfer) -> dict[str, Any]:
    value = made.target.optimizer.weight_decay
    if "weight_decay" in made.evidence:
        return {
            "value": value,
            "interval": made.evidence["interval"]["weight_decay"],
            "source": f"fitted: law {fit.law}; at base width",
        }
    return {"value": value, "source": _source(fit, "optimizer", "weight_decay", value)}


def _warmup(fit: Fit, made: Transfer) -> dict[str, Any]:
    """As a share of the run, its tokens and its steps."""
    budget, own = made.target.budget, made.target.schedule
    share = resolved(own, budget).warmup
    key, value = (
        ("warmup", own.warmup)
        if own.warmup_tokens is None
        else ("warmup_tokens", own.warmup_tokens)
    )
    sizes = {"tokens": share * budget.tokens, "steps": share * budget.steps}
    return {"value": share, **sizes, "source": _source(fit, "schedule", key, value)}


def _schedule(fit: Fit, made: Transfer) -> dict[str, Any]:
    shown = {
        key: value
        for key, value in resolved(made.target.schedule, made.target.budget).model_dump().items()
        if value is not None
    }
    return {
        "value": shown.pop("kind"),
        **shown,
        "source": _source(fit, "schedule", "kind", made.target.schedule.kind),
    }


def _init(fit: Fit, made: Transfer) -> dict[str, Any]:
    """The base value, and the least and greatest std of the tensors of each role at the target."""
    p = made.target.parametrization
    key, value = ("init_gain", p.init_gain) if p.init_gain else ("init_std", p.init_std)
    stds: dict[str, list[float]] = {}
    for row in made.plan:
        if row.init_std:
            stds.setdefault(row.role, []).append(row.init_std)
    by_role = {role: [min(values), max(values)] for role, values in stds.items()}
    return {
        "value": value,
        "by_role": by_role,
        "form": p.form,
        "source": _source(fit, "parametrization", key, value),
    }


def _flops(made: Transfer) -> dict[str, float]:
    parts = counting.flops(made.target.model, made.vocab_size, made.target.data.seq_len)
    tokens = made.target.budget.tokens
    return {
        "total": parts["exact"] * tokens,
        **{f"{name}_a_token": value for name, value in parts.items()},
    }


def priors(fit: Fit, made: Transfer, scale: dict[str, float]) -> list[dict[str, Any]]:
    """What rules of the literature would make of settings that no proxy tested at this scale; none is applied."""
    change = _change(fit, made, scale)
    if change is None or made.target.optimizer.family != "adamw":
        return []
    found, optimizer = [], made.target.optimizer
    names = ["ema_timescale", "power_lines"] * ("weight_decay" not in made.evidence) + [
        "square_root"
    ] * (change.batch != 1)
    for name in names:
        try:
            rule = prior(name, change)
        except UserError as error:
            found.append({"rule": name, "says": str(error), "values": {}, "caveats": []})
            continue
        values = (
            {"weight_decay": optimizer.weight_decay * rule.weight_decay}
            if name != "square_root"
            else {"eps": optimizer.eps * rule.eps}
        )
        values |= dict(zip(("beta1", "beta2"), rule.betas, strict=True)) if rule.betas else {}
        found.append(
            {"rule": name, "says": rule.sentence, "values": values, "caveats": list(rule.caveats)}
        )
    return found


def _change(fit: Fit, made: Transfer, scale: dict[str, float]) -> Change | None:
    """Ratios of the target to the largest proxies, where carried-over values were last seen to work; None where the fit does not say."""
    batches = fit.solution.get("batch_tokens") or fit.ranges.get("batch_tokens")
    if not batches or not {"n_params", "tokens"} <= fit.ranges.keys():
        return None
    n_params, tokens = fit.ranges["n_params"][1], fit.ranges["tokens"][1]
    there = at_batch(fit, n_params, tokens, batches[-1]).lr
    assert there is not None
    optimizer = made.target.optimizer
    return Change(
        batch=scale["batch_tokens"] / batches[-1], tokens=scale["tokens"] / tokens, n_params=scale["n_params"] / n_params,
        lr=optimizer.lr / there, beta1=optimizer.beta1, beta2=optimizer.beta2,
    )  # fmt: skip
