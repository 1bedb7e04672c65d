"""Plain param groups from a plan, for any torch optimizer, and schedules as pure functions of the share of tokens seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from scaletune.errors import UserError
from scaletune.recipe import Optimizer as Settings
from scaletune.recipe import Schedule
from scaletune.rules import Planned


def groups(model: nn.Module, plan: Iterable[Planned]) -> list[dict[str, Any]]:
    """Param groups {params, lr, initial_lr, weight_decay, eps}: one for each distinct setting of the plan, in the plan's order.

    A schedule multiplies `initial_lr`; writing an absolute lr would wipe the ratios. UserError on a tensor the plan does not explain.
    """
    planned: Mapping[str, Planned] = {row.name: row for row in plan}
    parameters = dict(model.named_parameters())
    if parameters.keys() != planned.keys():
        odd = sorted(parameters.keys() ^ planned.keys())[0]
        raise UserError(f"plan and model must name the same tensors, but `{odd}` is in one alone")
    made: dict[tuple[float, ...], dict[str, Any]] = {}
    for name, row in planned.items():
        key = (row.lr, row.weight_decay, row.eps)
        fresh = {"params": [], "lr": row.lr, "initial_lr": row.lr, "weight_decay": row.weight_decay, "eps": row.eps}
        made.setdefault(key, fresh)["params"].append(parameters[name])
    return list(made.values())


def optimizer(model: nn.Module, plan: Iterable[Planned], settings: Settings) -> Optimizer:
    """AdamW over the plan's groups, fused."""
    return AdamW(groups(model, plan), betas=(settings.beta1, settings.beta2), fused=True)


def multiplier(schedule: Schedule, share: float) -> float:
    """Learning-rate multiplier at `share` in [0, 1] of the tokens seen: up linearly over `warmup`, then by kind down to `floor`.

    constant: 1.  linear, cosine: from the end of warmup to the last token.  wsd: 1, then linear over the last `decay`.
    """
    if share < schedule.warmup:
        return share / schedule.warmup
    if schedule.kind == "constant":
        return 1.0
    start = 1.0 - schedule.decay if schedule.kind == "wsd" else schedule.warmup
    down = min(1.0, max(0.0, (share - start) / max(1.0 - start, 1e-12)))
    shape = (1 + math.cos(math.pi * down)) / 2 if schedule.kind == "cosine" else 1 - down
    return schedule.floor + (1 - schedule.floor) * shape


def set_share(opt: Optimizer, schedule: Schedule, share: float) -> None:
    """Set every group's lr to its own peak times the multiplier."""
    now = multiplier(schedule, share)
    for group in opt.param_groups:
        group["lr"] = group["initial_lr"] * now
