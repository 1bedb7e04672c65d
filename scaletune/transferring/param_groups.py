"""Builds `param_groups.json`: per-tensor settings by name, for what a stack's config cannot hold.

`loader.py` applies the file to any torch model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import OPTIMIZER_SETTINGS, Optimizer, Recipe, resolve_schedule
from scaletune.rules import TensorPlan
from scaletune.transferring.target import Transfer

GROUPS = (
    "learning rate, weight decay and eps per tensor: loader.py sets them from param_groups.json"
)
SCHEDULE = (
    "learning-rate schedule: use loader.py's LambdaLR, which multiplies each group's own peak lr;"
    " a scheduler that writes one absolute lr into all groups undoes the transfer"
)
SCRIPT = (
    "gradient clipping, batch size and token horizon: set them in the training script to the values"
    " in param_groups.json"
)
CLIPPED = (
    "the proxies' clipping behaviour: rewritten weights have other gradient norms, so the same"
    " max_grad_norm clips at another point than in the proxies"
)

HALF_STEP = (
    "an offset of half a step: the plan evaluates its schedule at the middle of each step, this"
    " stack at whole steps"
)


def pattern(name: str) -> str:
    """A regular expression for a tensor's name in every layer."""
    return "^" + re.sub(r"layers\\\.\d+", r"layers\\.\\d+", re.escape(name)) + "$"


def group_rows(rows: Sequence[TensorPlan]) -> list[dict[str, Any]]:
    """Groups tensors with the same optimizer, settings and init std, as patterns of their names.

    Gains and biases have init std 0: the model's own values stay.
    """
    groups: dict[tuple[Any, ...], dict[str, None]] = {}
    for row in rows:
        key = (row.family, row.lr, row.weight_decay, row.eps, row.init_std)
        groups.setdefault(key, {})[pattern(row.name)] = None
    keys = ("family", "lr", "weight_decay", "eps", "init_std")
    return [
        {"patterns": [*patterns]} | dict(zip(keys, values, strict=True))
        for values, patterns in groups.items()
    ]


def rows_by_kind(rows: Sequence[TensorPlan]) -> dict[str, TensorPlan]:
    """A tensor's name within its layer, such as `self_attn.q_proj.weight` -> its row."""
    return {_kind(row): row for row in rows}


def _kind(row: TensorPlan) -> str:
    return re.sub(r"^model\.layers\.\d+\.", "", row.name)


def rows_by_name(rows: Sequence[TensorPlan], names: Mapping[str, str]) -> dict[str, TensorPlan]:
    """Another stack's tensor name -> the row.

    Raises:
        UserError: The stack has no name for a tensor, or keeps tensors with different settings in
            one.
    """
    by_name: dict[str, TensorPlan] = {}
    for kind, row in rows_by_kind(rows).items():
        if kind not in names:
            raise UserError(
                f"the stack must have a tensor for each of the target's, but has none for {kind!r}:"
                " set model.biases = false"
            )
        first = by_name.setdefault(names[kind], row)
        if _settings(first) != _settings(row):
            raise UserError(
                f"the stack keeps {first.name!r} and {row.name!r} in one tensor, but the plan gives"
                " them different settings: emit 'pytorch'"
            )
    return by_name


def share_eps(
    rows: Sequence[TensorPlan], names: Mapping[str, str]
) -> tuple[list[TensorPlan], list[str]]:
    """Gives tensors that a stack keeps in one tensor the smallest of their eps.

    With grouped-query attention the number of key and value heads does not grow with width. Their
    gradients, and so their eps, shrink less with width than those of the queries.

    Returns:
        The rows, and a sentence for each eps that changes.
    """
    shared: dict[str, list[TensorPlan]] = {}
    for kind, row in rows_by_kind(rows).items():
        shared.setdefault(names.get(kind, kind), []).append(row)
    least = {
        _kind(row): min(each.eps for each in together)
        for together in shared.values()
        for row in together
    }
    sentences = [
        f"eps of {kind}: {row.eps:.4g} in the plan, {least[kind]:.4g} here, because the stack keeps"
        " it in one tensor with others"
        for kind, row in rows_by_kind(rows).items()
        if row.eps > least[kind]
    ]
    return [replace(row, eps=least[_kind(row)]) for row in rows], sentences


def _settings(row: TensorPlan) -> tuple[float, ...]:
    return row.lr, row.weight_decay, row.eps, row.init_std


def named_groups(rows: Sequence[TensorPlan], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Groups another stack's tensor names by lr, weight decay and eps."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, row in rows_by_name(rows, names).items():
        groups.setdefault((row.lr, row.weight_decay, row.eps), []).append(name)
    return [
        {"patterns": patterns, "lr": lr, "weight_decay": wd, "eps": eps}
        for (lr, wd, eps), patterns in groups.items()
    ]


def stds(rows: Sequence[TensorPlan], names: Mapping[str, str]) -> dict[str, float]:
    """Another stack's matrix name -> init std."""
    return {name: row.init_std for name, row in rows_by_name(rows, names).items() if row.init_std}


CLASSES = {
    "adamw": "torch.optim.AdamW",
    "sgd": "torch.optim.SGD",
    "adafactor": "torch.optim.Adafactor",
    "muon": "torch.optim.Muon",
    "lion": "pytorch_optimizer.Lion",
}
"""Optimizer family that loader.py can build -> its class."""

LOADED = tuple(CLASSES)
_ONE_LR = "it estimates one lr for all tensors, but the plan has one per tensor"
_NO_CLASS = "torch has no class for it"
WHY_NOT = {
    "dadapt_adam": _ONE_LR,
    "prodigy": _ONE_LR,
    "momo_adam": "its step needs the loss, which training scripts do not pass to it",
    "schedulefree_adamw": "it needs calls of train and eval, which training scripts do not make",
    **dict.fromkeys(("lamb", "shampoo", "soap", "adam_atan2"), _NO_CLASS),
}
"""Optimizer family -> why loader.py does not build it."""


def _optimizer(o: Optimizer) -> dict[str, Any]:
    """Arguments of the optimizer's class that all groups share."""
    settings = OPTIMIZER_SETTINGS[o.family]
    keys = [key for key in ("momentum", "nesterov", "shape_factor") if key in settings]
    own: dict[str, Any] = {key: getattr(o, key) for key in keys}
    own |= {"betas": [o.beta1, o.beta2]} if "beta1" in settings else {}
    return {"class": CLASSES[o.family], **own, "max_grad_norm": o.clip}


def param_groups(
    transfer: Transfer,
    rows: Sequence[TensorPlan],
    cannot: Sequence[str],
    multipliers: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The content of param_groups.json.

    Args:
        transfer: The transfer that is emitted.
        rows: The plan as the stack's tensors need it.
        cannot: Sentences about what the stack's config cannot hold.
        multipliers: The forward multipliers of the stack's config, if `read_back.read` cannot read
            it.

    Returns:
        Groups of name patterns with their settings (the first match wins), the optimizer, the
        schedule, the budget, `cannot` and the evidence.
    """
    t, b = transfer.target, transfer.target.budget
    budget = {"tokens": b.tokens, "batch_tokens": b.batch_tokens, "steps": b.steps}
    return {
        "schema": "scaletune.param_groups/1",
        **({"multipliers": dict(multipliers)} if multipliers else {}),
        "groups": group_rows(rows),
        "optimizer": _optimizer(t.optimizer),
        "schedule": resolve_schedule(t.schedule, b).model_dump(),
        "budget": budget | {"seq_len": t.data.seq_len},
        "cannot": list(cannot),
        "evidence": transfer.evidence,
    }


def require_supported(
    target: Recipe,
    stack: str,
    kinds: Sequence[str] = ("constant", "linear", "cosine", "wsd"),
    shapes: Sequence[str] = ("linear",),
    families: Sequence[str] = ("adamw",),
) -> None:
    """UserError unless the stack, or loader.py, has the target's optimizer and schedule."""
    allowed = {
        "optimizer.family": families,
        "schedule.kind": kinds,
        "schedule.decay_shape": shapes,
        "schedule.ema_half_life": (None,),
    }
    for path, values in allowed.items():
        section, key = path.split(".")
        if (value := getattr(getattr(target, section), key)) not in values:
            in_family = path == "optimizer.family" and value in WHY_NOT
            why = f" ({WHY_NOT[value]})" if in_family else ""
            raise UserError(
                f"format {stack!r} supports `{path}` {', '.join(map(repr, values))},"
                f" but got {value!r}{why}"
            )
    if target.optimizer.family == "muon" and target.model.family == "moe":
        raise UserError(
            f"format {stack!r} uses torch.optim.Muon, which takes single matrices, but the experts"
            " of a 'moe' are stacked in one tensor: set another optimizer.family"
        )
