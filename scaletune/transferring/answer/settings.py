"""Builds the answer of a transfer: each setting with its source, loss, FLOPs, GPU-hours, memory.

A setting is fitted, set by the target, or the same as in the proxies. What rules from the
literature suggest is listed beside it and not applied.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from scaletune import counting
from scaletune.errors import UserError
from scaletune.recipe import OPTIMIZER_SETTINGS, Recipe, resolve_schedule
from scaletune.records import Fit
from scaletune.rules import Change, prior
from scaletune.transferring.answer.cost import cost, own_cost
from scaletune.transferring.answer.sensitivity import loss_sensitivity
from scaletune.transferring.target import Transfer, at_batch
from scaletune.zoo import OwnConfig

OPTIMIZER_KEYS = ("beta1", "beta2", "eps", "momentum", "clip")
"""Optimizer settings in the answer beside lr and weight decay, if the optimizer has them."""

STATED = ("model", "my", "parametrization", "optimizer", "schedule", "training", "data")
"""Tables of a user's own trainer of which the answer repeats what the target states."""
NO_ROW = (
    *("family", "width", "n_params", "n_params_total", "build"),
    *("lr", "weight_decay", "tokens", "batch_tokens"),
)
"""Settings that have no such row."""
SAME = "same as in the proxies"
BY_TARGET = "set by the target"


def build_answer(fit: Fit, transfer: Transfer) -> dict[str, Any]:
    """Returns the answer as plain JSON values, the content of answer.json."""
    evidence, target = transfer.evidence, transfer.target
    scale = {name: float(evidence[name]) for name in ("n_params", "tokens", "batch_tokens")}
    return {
        "schema": "scaletune.answer/1",
        "n_params": evidence["n_params"],
        "tokens": evidence["tokens"],
        "level": fit.level,
        "settings": _own_settings(fit, transfer, scale)
        if target.foreign
        else _settings(fit, transfer, scale),
        "loss": _loss(fit, evidence),
        "off_by_2x": loss_sensitivity(fit, scale, evidence["loss"]),
        "flops": _flops(transfer),
        **(
            own_cost(target, transfer.sizes)
            if transfer.sizes
            else cost(target, transfer.vocab_size)
        ),
        "priors": literature_suggestions(fit, transfer, scale),
        "status": evidence["status"],
        "assumptions": evidence["assumptions"],
        "fit": fit.digest,
    }


def _loss(fit: Fit, evidence: dict[str, Any]) -> dict[str, Any]:
    fitted = f"fitted: law {(fit.loss_law or fit).law}"
    return {
        "value": evidence["loss"],
        "interval": evidence["interval"].get("loss"),
        "unit": "nats per token",
        "source": fitted if evidence["loss"] is not None else "the fitted law gives no loss",
    }


def _source(fit: Fit, section: str, key: str, value: Any) -> str:
    """Where a setting that no law gives comes from."""
    setting = fit.provenance.get("setting") or {}
    if not setting:
        return f"{BY_TARGET}; the records do not contain the proxies' value"
    if key not in setting.get(section, {}) and "trainer" in setting:
        return f"{BY_TARGET}; the proxies' recipe does not state one value"
    if key not in setting.get(section, {}):
        return f"{BY_TARGET}; the proxies had different values"
    of_proxies = setting[section][key]
    return SAME if of_proxies == value else f"{BY_TARGET}; every proxy had {of_proxies!r}"


def _settings(fit: Fit, transfer: Transfer, scale: dict[str, float]) -> dict[str, Any]:
    evidence, optimizer = transfer.evidence, transfer.target.optimizer
    base_width = transfer.target.parametrization.base_width
    settings: dict[str, Any] = {
        "lr": {
            "value": optimizer.lr,
            "interval": evidence["interval"]["lr"],
            "band": evidence["band"]["lr"],
            "source": f"fitted: law {fit.law}; peak, at base width {base_width}",
        },
        "batch_tokens": _batch(fit, transfer, scale),
        "weight_decay": _weight_decay(fit, transfer),
    }
    for key in OPTIMIZER_KEYS:
        if key in {*OPTIMIZER_SETTINGS[optimizer.family], "clip"}:
            value = getattr(optimizer, key)
            settings[key] = {"value": value, "source": _source(fit, "optimizer", key, value)}
    settings["warmup"] = _warmup(fit, transfer)
    settings["schedule"] = _schedule(fit, transfer)
    if not transfer.target.keeps_own_init:
        settings["init_std"] = _init(fit, transfer)
    return settings | _stated_rows(fit, transfer.target, ("model", "my"))


def _own_settings(fit: Fit, transfer: Transfer, scale: dict[str, float]) -> dict[str, Any]:
    """The settings of a target that the user's own trainer trains: only what its recipe states."""
    evidence, target = transfer.evidence, transfer.target
    p, lr = target.parametrization, target.optimizer.lr
    at = f"peak, at base width {p.base_width}" if p.model_fields_set else "as the trainer gets it"
    settings: dict[str, Any] = {
        "lr": {
            "value": lr,
            "interval": evidence["interval"]["lr"],
            "band": evidence["band"]["lr"],
            "source": f"fitted: law {fit.law}; {at}",
            "at": at,
        },
        "batch_tokens": _batch(fit, transfer, scale),
    }
    if "weight_decay" in evidence or target.states("optimizer.weight_decay"):
        base = " at base width" if p.model_fields_set else ""
        settings["weight_decay"] = _weight_decay(fit, transfer) | {"at": base}
    return settings | _stated_rows(fit, target, STATED)


def _stated_rows(fit: Fit, target: Recipe, sections: Iterable[str]) -> dict[str, Any]:
    """Rows of the settings that the target states and that have no row or column of their own."""
    rows: dict[str, Any] = {}
    for section in sections:
        table = getattr(target, section)
        if section == "model" and not isinstance(table, OwnConfig):
            continue
        stated = table if isinstance(table, Mapping) else table.model_dump(exclude_unset=True)
        rows |= {
            f"{section}.{key}": {"value": value, "source": _source(fit, section, key, value)}
            for key, value in stated.items()
            if key not in NO_ROW
        }
    return rows


def _batch(fit: Fit, transfer: Transfer, scale: dict[str, float]) -> dict[str, Any]:
    """The target's batch size, and beside it the fit's optimum if its law has one."""
    evidence, source = transfer.evidence, BY_TARGET
    if evidence["lr"] != evidence["lr_at_fitted_batch"]:
        source += "; lr adjusted by the square-root rule, not tested by your sweep"
    row = {"value": transfer.target.budget.batch_tokens, "source": source}
    if fit.law != "joint":
        return row
    best = fit.predict(n_params=scale["n_params"], tokens=scale["tokens"])
    return row | {
        "fitted_best": best.batch_tokens,
        "interval": best.interval["batch_tokens"],
        "loss_at_best": best.loss,
    }


def _weight_decay(fit: Fit, transfer: Transfer) -> dict[str, Any]:
    value, evidence = transfer.target.optimizer.weight_decay, transfer.evidence
    if "weight_decay" not in evidence:
        return {"value": value, "source": _source(fit, "optimizer", "weight_decay", value)}
    interval = evidence["interval"]["weight_decay"]
    return {"value": value, "interval": interval, "source": f"fitted: law {fit.law}"}


def _warmup(fit: Fit, transfer: Transfer) -> dict[str, Any]:
    """Warmup as a fraction of the run, in tokens and in steps."""
    budget, schedule = transfer.target.budget, transfer.target.schedule
    share = resolve_schedule(schedule, budget).warmup
    key = "warmup" if schedule.warmup_tokens is None else "warmup_tokens"
    return {
        "value": share,
        "tokens": share * budget.tokens,
        "steps": share * budget.steps,
        "source": _source(fit, "schedule", key, getattr(schedule, key)),
    }


def _schedule(fit: Fit, transfer: Transfer) -> dict[str, Any]:
    schedule = transfer.target.schedule
    values = resolve_schedule(schedule, transfer.target.budget).model_dump(exclude_none=True)
    kind = values.pop("kind")
    return {"value": kind, **values, "source": _source(fit, "schedule", "kind", schedule.kind)}


def _init(fit: Fit, transfer: Transfer) -> dict[str, Any]:
    """The base value, and the smallest and largest std of each role's tensors at the target."""
    p = transfer.target.parametrization
    key = "init_gain" if p.init_gain else "init_std"
    stds: dict[str, list[float]] = {}
    for row in transfer.plan:
        if row.init_std:
            stds.setdefault(row.role, []).append(row.init_std)
    value = getattr(p, key)
    return {
        "value": value,
        "by_role": {role: [min(values), max(values)] for role, values in stds.items()},
        "form": p.form,
        "source": _source(fit, "parametrization", key, value),
    }


def _flops(transfer: Transfer) -> dict[str, Any]:
    target = transfer.target
    if sizes := transfer.sizes:
        total = sizes.flops if sizes.flops == sizes.flops else None
        each = total / target.budget.tokens if total else None
        return {"total": total, "exact_a_token": each, "from": sizes.flops_from if total else None}
    parts = counting.flops(target.model, transfer.vocab_size, target.data.seq_len)
    per_token = {f"{name}_a_token": value for name, value in parts.items()}
    return {"total": parts["exact"] * target.budget.tokens, **per_token}


def literature_suggestions(
    fit: Fit, transfer: Transfer, scale: dict[str, float]
) -> list[dict[str, Any]]:
    """What rules from the literature suggest for settings that no proxy tested at this scale."""
    change = _change(fit, transfer, scale)
    optimizer = transfer.target.optimizer
    target = transfer.target
    if change is None or optimizer.family != "adamw":
        return []
    if target.foreign and not (
        target.states("optimizer.family") and target.states("optimizer.weight_decay")
    ):
        return []  # nobody states which optimizer the user's trainer has
    names = [] if "weight_decay" in transfer.evidence else ["ema_timescale", "power_lines"]
    names += ["square_root"] if change.batch != 1 else []
    suggestions = []
    for name in names:
        try:
            rule = prior(name, change)
        except UserError as error:
            suggestions.append({"rule": name, "says": str(error), "values": {}, "caveats": []})
            continue
        values = (
            {"eps": optimizer.eps * rule.eps}
            if name == "square_root"
            else {"weight_decay": optimizer.weight_decay * rule.weight_decay}
        )
        values |= dict(zip(("beta1", "beta2"), rule.betas, strict=True)) if rule.betas else {}
        caveats = list(rule.caveats)
        suggestions.append(
            {"rule": name, "says": rule.sentence, "values": values, "caveats": caveats}
        )
    return suggestions


def _change(fit: Fit, transfer: Transfer, scale: dict[str, float]) -> Change | None:
    """Ratios of the target to the largest proxies; None if the fit does not contain their scale.

    Settings that are the same as in the proxies were last tested at the largest of them.
    """
    batches = fit.solution.get("batch_tokens") or fit.ranges.get("batch_tokens")
    if not batches or not {"n_params", "tokens"} <= fit.ranges.keys():
        return None
    n_params, tokens = fit.ranges["n_params"][1], fit.ranges["tokens"][1]
    lr = at_batch(fit, n_params, tokens, batches[-1]).lr
    assert lr is not None
    optimizer = transfer.target.optimizer
    return Change(
        batch=scale["batch_tokens"] / batches[-1],
        tokens=scale["tokens"] / tokens,
        n_params=scale["n_params"] / n_params,
        lr=optimizer.lr / lr,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
    )
