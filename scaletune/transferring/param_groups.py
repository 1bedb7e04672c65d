"""`param_groups.json`: what a config cannot hold, by tensor name; `loader.py` attaches it to any torch model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from scaletune.errors import UserError
from scaletune.recipe import READS, Optimizer, Recipe, resolved
from scaletune.rules import Planned
from scaletune.transferring import Transfer

GROUPS = "learning rate, weight decay and eps of each tensor: param_groups.json, through loader.py"
SCHEDULE = "schedule: loader.py's LambdaLR multiplies each group's own peak; a scheduler that writes absolute values undoes the transfer"
SCRIPT = "gradient clipping, batch size and token horizon: set them in the training script as param_groups.json says"
CLIPPED = "the plan's own gradient norm: rewritten weights have other gradients, so a global clip bites at another value than in the proxies"


def pattern(name: str) -> str:
    """A regular expression for one tensor's name, whatever its layer."""
    return "^" + re.sub(r"layers\\\.\d+", r"layers\\.\\d+", re.escape(name)) + "$"


def grouped(rows: Sequence[Planned]) -> list[dict[str, Any]]:
    """Tensors that share an optimizer and its settings and init std, as patterns of their names; gains and biases have no init std."""
    groups: dict[tuple[Any, ...], dict[str, None]] = {}
    for row in rows:
        groups.setdefault((row.family, row.lr, row.weight_decay, row.eps, row.init_std), {})[
            pattern(row.name)
        ] = None
    keys = ("family", "lr", "weight_decay", "eps", "init_std")
    return [
        {"patterns": [*patterns]} | dict(zip(keys, values, strict=True))
        for values, patterns in groups.items()
    ]


def kinds(rows: Sequence[Planned]) -> dict[str, Planned]:
    """`self_attn.q_proj.weight` -> its settings, which every layer shares."""
    return {_kind(row): row for row in rows}


def _kind(row: Planned) -> str:
    return re.sub(r"^model\.layers\.\d+\.", "", row.name)


def by_name(rows: Sequence[Planned], names: Mapping[str, str]) -> dict[str, Planned]:
    """Another stack's name -> its settings; UserError on a kind it has no name for, or that it keeps in one tensor with an unlike one."""
    found: dict[str, Planned] = {}
    for kind, row in kinds(rows).items():
        if kind not in names:
            raise UserError(
                f"the stack must have a name for every tensor, but has none for {kind!r}: set model.biases = false"
            )
        first = found.setdefault(names[kind], row)
        if _settings(first) != _settings(row):
            raise UserError(
                f"the stack keeps {first.name!r} and {row.name!r} in one tensor, but they need other settings: emit 'pytorch'"
            )
    return found


def merged(rows: Sequence[Planned], names: Mapping[str, str]) -> tuple[list[Planned], list[str]]:
    """(rows, sentences): what a stack keeps in one tensor gets the least of its eps, and which that changes.

    Keys and values of few heads do not grow in number with width, so their gradients, and eps, shrink less than the queries' do.
    """
    shared: dict[str, list[Planned]] = {}
    for kind, row in kinds(rows).items():
        shared.setdefault(names.get(kind, kind), []).append(row)
    least = {
        _kind(row): min(each.eps for each in together)
        for together in shared.values()
        for row in together
    }
    said = [
        f"eps of {kind}: {row.eps:.4g} in the plan and {least[kind]:.4g} here, as it is one tensor with others"
        for kind, row in kinds(rows).items() if row.eps > least[kind]
    ]  # fmt: skip
    return [replace(row, eps=least[_kind(row)]) for row in rows], said


def _settings(row: Planned) -> tuple[float, ...]:
    return row.lr, row.weight_decay, row.eps, row.init_std


def named_groups(rows: Sequence[Planned], names: Mapping[str, str]) -> list[dict[str, Any]]:
    """Optimizer settings with the names, in another stack, of the tensors that share them."""
    groups: dict[tuple[float, ...], list[str]] = {}
    for name, row in by_name(rows, names).items():
        groups.setdefault((row.lr, row.weight_decay, row.eps), []).append(name)
    return [
        {"patterns": found, "lr": lr, "weight_decay": wd, "eps": eps}
        for (lr, wd, eps), found in groups.items()
    ]


def stds(rows: Sequence[Planned], names: Mapping[str, str]) -> dict[str, float]:
    """Another stack's names of the matrices -> their init std."""
    return {name: row.init_std for name, row in by_name(rows, names).items() if row.init_std}


CLASSES = {  # optimizer family that loader.py builds -> whose class it is
    "adamw": "torch.optim.AdamW", "sgd": "torch.optim.SGD", "adafactor": "torch.optim.Adafactor", "muon": "torch.optim.Muon",
    "lion": "pytorch_optimizer.Lion",
}  # fmt: skip
LOADED = tuple(CLASSES)
_NO_CLASS = "torch has no class of it"
WHY_NOT = {  # family -> why loader.py does not build it
    "dadapt_adam": "it finds one lr for all tensors, where the plan has one for each",
    "prodigy": "it finds one lr for all tensors, where the plan has one for each",
    "momo_adam": "its step reads the loss, which no training script hands to it",
    "schedulefree_adamw": "it must be told when to train and when to evaluate, which no training script does",
    **dict.fromkeys(("lamb", "shampoo", "soap", "adam_atan2"), _NO_CLASS),
}  # fmt: skip


def _optimizer(o: Optimizer) -> dict[str, Any]:
    """What the optimizer's class is given, for all groups alike."""
    own: dict[str, Any] = {
        key: getattr(o, key)
        for key in ("momentum", "nesterov", "shape_factor")
        if key in READS[o.family]
    }
    own |= {"betas": [o.beta1, o.beta2]} if "beta1" in READS[o.family] else {}
    return {"class": CLASSES[o.family], **own, "max_grad_norm": o.clip}


def param_groups(
    transfer: Transfer,
    rows: Sequence[Planned],
    cannot: Sequence[str],
    multipliers: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Patterns with their settings (the first match wins), the optimizer, the schedule, what the config `cannot` hold, the evidence.

    `multipliers`: those of the forward pass, where the config they go with is none that `reading.read` knows.
    """
    t = transfer.target
    return {
        "schema": "scaletune.param_groups/1", **({"multipliers": dict(multipliers)} if multipliers else {}),
        "groups": grouped(rows),
        "optimizer": _optimizer(t.optimizer),
        "schedule": resolved(t.schedule, t.budget).model_dump(),
        "budget": {"tokens": t.budget.tokens, "batch_tokens": t.budget.batch_tokens, "steps": t.budget.steps, "seq_len": t.data.seq_len},
        "cannot": list(cannot),
        "evidence": transfer.evidence,
    }  # fmt: skip


def carried(
    target: Recipe,
    stack: str,
    kinds: Sequence[str] = ("constant", "linear", "cosine", "wsd"),
    shapes: Sequence[str] = ("linear",),
    families: Sequence[str] = ("adamw",),
) -> None:
    """UserError unless the stack, or loader.py, can build the target's optimizer and schedule."""
    allowed = {
        "optimizer.family": families,
        "schedule.kind": kinds,
        "schedule.decay_shape": shapes,
        "schedule.ema_half_life": (None,),
    }
    for path, values in allowed.items():
        section, key = path.split(".")
        if (got := getattr(getattr(target, section), key)) not in values:
            why = f" ({WHY_NOT[got]})" if path == "optimizer.family" and got in WHY_NOT else ""
            raise UserError(
                f"format {stack!r} carries `{path}` of {', '.join(map(repr, values))} alone, but got {got!r}{why}"
            )
    if target.optimizer.family == "muon" and target.model.family == "moe":
        raise UserError(
            f"format {stack!r} has torch's Muon, which takes matrices one by one: experts are stacked, so set another family"
        )
