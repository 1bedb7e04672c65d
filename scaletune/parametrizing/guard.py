"""`guard` checks that the learning rates of a run still have the ratios of its plan.

Call it at the start, after warmup and at the end: a scheduler that writes absolute learning rates
destroys the ratios.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import nn

from scaletune.errors import UserError
from scaletune.parametrizing.shapes import named_tensors

if TYPE_CHECKING:
    from scaletune.parametrizing.plan import Plan


@dataclass(frozen=True)
class GroupRate:
    """The learning rate of one group of tensors."""

    name: str
    """Name of the group's first tensor."""

    tensors: int
    """Number of tensors in the group."""

    peak: float
    """Learning rate in the plan."""

    lr: float
    """Current learning rate."""


def check_ratios(groups: Sequence[GroupRate], when: str) -> None:
    """UserError unless all groups have the same ratio lr / peak. An lr of 0 in all groups passes.

    `when` ends up in the message: "after warmup".
    """
    first = groups[0]
    for group in groups[1:]:
        if not math.isclose(group.lr * first.peak, first.lr * group.peak, rel_tol=1e-6):
            ratio = group.lr / first.lr if first.lr else math.inf
            raise UserError(
                f"a schedule must multiply the plan's learning rates, but {when} the group of"
                f" `{group.name}` ({group.tensors} tensors) has {ratio:.4g} times the lr of"
                f" `{first.name}`, but {group.peak / first.peak:.4g} times in the plan: use a"
                " schedule that multiplies each group's `initial_lr`"
            )


def guard(optimizers: Any, plan: Plan, model: nn.Module, when: str) -> None:
    """Checks that the optimizers train every tensor once, at the plan's ratios of learning rates.

    It changes nothing.

    Args:
        optimizers: One optimizer, or a list of those that share the model (Muon and AdamW), each
            of which may follow its own schedule.
        plan: The plan of the model.
        model: The model.
        when: The moment, for the message: "after warmup".

    Raises:
        UserError: A tensor is not trained, or trained twice, or the ratios are wrong.
    """
    optimizers = list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]
    names = {id(parameter): name for name, parameter in named_tensors(model).items()}
    trained = [
        id(parameter)
        for opt in optimizers
        for group in opt.param_groups
        for parameter in group["params"]
    ]
    for each, name in names.items():
        if (times := trained.count(each)) != 1:
            raise UserError(
                "the optimizers must train every tensor of the plan exactly once, but"
                f" `{name}` is trained {times} times {when}"
            )
    for opt in optimizers:
        check_ratios(
            [
                GroupRate(names[id(p)], 1, plan[names[id(p)]].lr, float(group["lr"]))
                for group in opt.param_groups
                for p in group["params"]
                if id(p) in names
            ],
            when,
        )
