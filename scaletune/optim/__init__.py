"""Param groups from a plan, for any torch optimizer; the families of a recipe over them; schedules that only multiply their lr."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from scaletune.errors import UserError
from scaletune.optim.families import FAMILIES
from scaletune.optim.schedules import ema as ema
from scaletune.optim.schedules import judged as judged
from scaletune.optim.schedules import multiplier as multiplier
from scaletune.optim.schedules import set_share as set_share
from scaletune.parametrizing.guard import Held, hold
from scaletune.recipe import Optimizer as Settings
from scaletune.recipe import resolved as resolved
from scaletune.rules import Planned

Alike = tuple[str, float, float, float]


def _alike(plan: Iterable[Planned]) -> dict[Alike, list[str]]:
    """(family, lr, weight decay, eps) -> the tensors that share it: the groups, in the plan's order."""
    found: dict[Alike, list[str]] = {}
    for row in plan:
        found.setdefault((row.family, row.lr, row.weight_decay, row.eps), []).append(row.name)
    return found


def groups(model: nn.Module, plan: Iterable[Planned]) -> list[dict[str, Any]]:
    """Param groups {params, family, lr, initial_lr, weight_decay, eps}: one for each distinct setting of the plan, in the plan's order.

    A schedule multiplies `initial_lr`; writing an absolute lr would wipe the ratios. UserError on a tensor the plan does not explain.
    """
    planned: Mapping[str, Planned] = {row.name: row for row in plan}
    parameters = dict(model.named_parameters())
    if parameters.keys() != planned.keys():
        odd = sorted(parameters.keys() ^ planned.keys())[0]
        raise UserError(f"plan and model must name the same tensors, but `{odd}` is in one alone")
    return [
        {
            "params": [parameters[name] for name in names], "family": family,
            "lr": lr, "initial_lr": lr, "weight_decay": weight_decay, "eps": eps,
        }
        for (family, lr, weight_decay, eps), names in _alike(planned.values()).items()
    ]  # fmt: skip


def optimizer(model: nn.Module, plan: Iterable[Planned], settings: Settings) -> Optimizer:
    """The settings' family over the plan's groups; the trials of a stack, axis 0 of every parameter, do not see each other."""
    return FAMILIES[settings.family](groups(model, plan), settings)


def guard(opt: Optimizer, plan: Iterable[Planned], when: str) -> None:
    """UserError unless the lr of the groups, made by `groups`, stand in the plan's ratios; an lr of 0 throughout does. Changes nothing.

    `when` is what the sentence says of the moment. A scheduler that writes absolute values breaks them; ask after warmup and at the end too.
    """
    planned = _alike(plan)
    if len(planned) != len(opt.param_groups):
        raise UserError(
            f"the optimizer must have the plan's {len(planned)} groups, but got {len(opt.param_groups)} {when}"
        )
    pairs = zip(planned.items(), opt.param_groups, strict=True)
    hold(
        [
            Held(names[0], len(names), peak, float(group["lr"]))
            for ((_, peak, *_), names), group in pairs
        ],
        when,
    )
