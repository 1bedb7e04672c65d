"""Optimizers: param groups from a plan, the optimizer families of a recipe, and lr schedules.

Schedules only multiply the learning rates of the groups, so the ratios between tensors stay.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from scaletune.errors import UserError
from scaletune.models.own import OwnModel
from scaletune.optim.families import FAMILIES
from scaletune.optim.schedules import evaluation_weights as evaluation_weights
from scaletune.optim.schedules import multiplier as multiplier
from scaletune.optim.schedules import set_learning_rates as set_learning_rates
from scaletune.optim.schedules import weight_average as weight_average
from scaletune.optim.single import plain_optimizer
from scaletune.parametrizing.guard import GroupRate, check_ratios
from scaletune.recipe import Optimizer as Settings
from scaletune.recipe import resolve_schedule as resolve_schedule
from scaletune.rules import TensorPlan

GroupKey = tuple[str, float, float, float]
"""Family, lr, weight decay and eps."""


def _group_names(plan: Iterable[TensorPlan]) -> dict[GroupKey, list[str]]:
    """The names of the tensors of each group, in the order of the plan."""
    names: dict[GroupKey, list[str]] = {}
    for row in plan:
        names.setdefault((row.family, row.lr, row.weight_decay, row.eps), []).append(row.name)
    return names


def groups(model: nn.Module, plan: Iterable[TensorPlan]) -> list[dict[str, Any]]:
    """Param groups {params, family, lr, initial_lr, weight_decay, eps}, in the order of the plan.

    There is one group for each distinct combination of settings. A schedule multiplies
    `initial_lr`; writing an absolute lr would remove the ratios between groups. UserError if plan
    and model do not have the same tensors.
    """
    planned: Mapping[str, TensorPlan] = {row.name: row for row in plan}
    parameters = dict(model.named_parameters())
    if parameters.keys() != planned.keys():
        name = sorted(parameters.keys() ^ planned.keys())[0]
        owner = "model" if name in parameters else "plan"
        raise UserError(
            f"plan and model must have the same tensors, but `{name}` is only in the {owner}"
        )
    return [
        {
            "params": [parameters[name] for name in names],
            "family": family,
            "lr": lr,
            "initial_lr": lr,
            "weight_decay": weight_decay,
            "eps": eps,
        }
        for (family, lr, weight_decay, eps), names in _group_names(planned.values()).items()
    ]


def optimizer(model: nn.Module, plan: Iterable[TensorPlan], settings: Settings) -> Optimizer:
    """The optimizer family of the settings over the plan's groups.

    The trials of a stack (axis 0 of every parameter) do not affect each other. The tensors of a
    user's module have no such axis.
    """
    if isinstance(model, OwnModel):
        return plain_optimizer(groups(model, plan), settings)
    return FAMILIES[settings.family](groups(model, plan), settings)


def guard(opt: Optimizer, plan: Iterable[TensorPlan], when: str) -> None:
    """UserError unless the learning rates of the groups are in the plan's ratios, or all 0.

    The groups must come from `groups`. A scheduler that writes absolute values breaks the ratios,
    so check after warmup and at the end too. `when` describes the moment in the message.
    """
    planned = _group_names(plan)
    if len(planned) != len(opt.param_groups):
        raise UserError(
            f"the optimizer must have the plan's {len(planned)} groups,"
            f" but got {len(opt.param_groups)} {when}"
        )
    pairs = zip(planned.items(), opt.param_groups, strict=True)
    rates = [
        GroupRate(names[0], len(names), peak, float(group["lr"]))
        for ((_, peak, *_), names), group in pairs
    ]
    check_ratios(rates, when)
