"""The guard: a run's learning rates still stand in the ratios they were planned in. Ask at the start, after warmup, at the end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from scaletune.errors import UserError
from scaletune.parametrizing.shapes import named

if TYPE_CHECKING:
    from scaletune.parametrizing.plan import Plan


@dataclass(frozen=True)
class Held:
    """A group of tensors: the first one's name, how many, the lr it was made with and the one it has now."""

    name: str
    tensors: int
    peak: float
    lr: float


def hold(groups: Sequence[Held], when: str) -> None:
    """UserError unless every group's lr is one multiple of its peak; an lr of 0 throughout is."""
    first = groups[0]
    for group in groups[1:]:
        if not math.isclose(group.lr * first.peak, first.lr * group.peak, rel_tol=1e-6):
            raise UserError(
                f"a schedule must multiply the plan's learning rates, but {when} the group of `{group.name}` ({group.tensors} tensors) has"
                f" {group.lr / first.lr if first.lr else math.inf:.4g} times the lr of `{first.name}`,"
                f" where the plan has {group.peak / first.peak:.4g}"
            )


def guard(optimizers: Any, plan: Plan, model: nn.Module, when: str) -> None:
    """UserError unless every optimizer's groups stand in the plan's ratios and together train each tensor once. Changes nothing.

    optimizers: one, or several that share the model (Muon and AdamW), each of which may follow a schedule of its own.
    """
    optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
    names = {id(parameter): name for name, parameter in named(model).items()}
    trained = [
        id(parameter)
        for opt in optimizers
        for group in opt.param_groups
        for parameter in group["params"]
    ]
    for each, name in names.items():
        if trained.count(each) != 1:
            raise UserError(
                f"the optimizer must train every tensor of the plan once, but `{name}` {trained.count(each)} times {when}"
            )
    for opt in optimizers:
        groups = [
            Held(name, 1, plan[name].lr, float(group["lr"]))
            for group in opt.param_groups
            for name in (
                names[id(parameter)] for parameter in group["params"] if id(parameter) in names
            )
        ]
        hold(groups, when)
