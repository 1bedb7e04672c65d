"""Plain param groups from a plan, for any torch optimizer, and schedules as pure functions of the share of tokens seen."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import AdamW, Optimizer

from scaletune.errors import UserError
from scaletune.parametrizing.guarding import Held, hold
from scaletune.recipe import Optimizer as Settings
from scaletune.recipe import Schedule
from scaletune.rules import Planned


def _alike(plan: Iterable[Planned]) -> dict[tuple[float, float, float], list[str]]:
    """(lr, weight decay, eps) -> the tensors that share it: the groups, in the plan's order."""
    found: dict[tuple[float, float, float], list[str]] = {}
    for row in plan:
        found.setdefault((row.lr, row.weight_decay, row.eps), []).append(row.name)
    return found


def groups(model: nn.Module, plan: Iterable[Planned]) -> list[dict[str, Any]]:
    """Param groups {params, lr, initial_lr, weight_decay, eps}: one for each distinct setting of the plan, in the plan's order.

    A schedule multiplies `initial_lr`; writing an absolute lr would wipe the ratios. UserError on a tensor the plan does not explain.
    """
    planned: Mapping[str, Planned] = {row.name: row for row in plan}
    parameters = dict(model.named_parameters())
    if parameters.keys() != planned.keys():
        odd = sorted(parameters.keys() ^ planned.keys())[0]
        raise UserError(f"plan and model must name the same tensors, but `{odd}` is in one alone")
    return [
        {"params": [parameters[name] for name in names], "lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "eps": eps}
        for (lr, weight_decay, eps), names in _alike(planned.values()).items()
    ]


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


def guard(opt: Optimizer, plan: Iterable[Planned], when: str) -> None:
    """UserError unless the lr of the groups, made by `groups`, stand in the plan's ratios; an lr of 0 throughout does. Changes nothing.

    `when` is what the sentence says of the moment. A scheduler that writes absolute values breaks them; ask after warmup and at the end too.
    """
    planned = _alike(plan)
    if len(planned) != len(opt.param_groups):
        raise UserError(f"the optimizer must have the plan's {len(planned)} groups, but got {len(opt.param_groups)} {when}")
    hold(
        [
            Held(names[0], len(names), peak, float(g["lr"]))
            for ((peak, *_), names), g in zip(planned.items(), opt.param_groups, strict=True)
        ],
        when,
    )
