"""The optimizer families of a recipe for any module: its plain tensors are a stack of one trial."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from scaletune.optim.families import FAMILIES
from scaletune.optim.stacked import Groups
from scaletune.parametrizing import Plan
from scaletune.recipe import Optimizer as Settings
from scaletune.rules import ROLES
from scaletune.rules.families import trained_by


class PlainOptimizer(Optimizer):
    """An optimizer for stacks, over plain tensors.

    The inner optimizer has a view [1, ...] of each tensor, with the same storage.
    """

    def __init__(self, groups: Groups, make: Callable[[Groups], Optimizer]):
        super().__init__(groups, {})
        self.inner = make(
            [
                {**group, "params": [nn.Parameter(p.detach()[None]) for p in group["params"]]}
                for group in self.param_groups
            ]
        )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        for group, inner_group in zip(self.param_groups, self.inner.param_groups, strict=True):
            inner_group["lr"] = group["lr"]
            for p, view in zip(group["params"], inner_group["params"], strict=True):
                view.data, view.grad = p.detach()[None], None if p.grad is None else p.grad[None]
        return self.inner.step(closure)

    def state_dict(self) -> dict[str, Any]:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.inner.load_state_dict(state_dict)


ENTRYWISE = ("adamw", "sgd", "lion", "adam_atan2", "schedulefree_adamw")
"""Families that update each entry on its own, so they need no trial axis."""


def plain_optimizer(groups: Groups, settings: Settings) -> Optimizer:
    """The optimizer family of the settings over groups of plain tensors.

    A family that updates each entry on its own is the library's optimizer.
    """
    make = FAMILIES[settings.family]
    if settings.family in ENTRYWISE:
        return make(groups, settings)
    return PlainOptimizer(groups, lambda inner_groups: make(inner_groups, settings))


def build_plain_optimizer(plan: Plan, model: nn.Module, settings: Settings) -> Optimizer:
    """The optimizer family of the settings over the plan of a module."""
    groups = [
        {**group, "family": trained_by(plan.optimizer, role)}
        for role in ROLES
        for group in plan.param_groups(model, [role])
    ]
    return plain_optimizer(groups, settings)
