"""The models that a check trains: built at any width, depth and seed, from a recipe or by the user.

`recipe_target` builds models of the zoo, `model_target` the user's own models.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaletune import data, optim, parametrizing
from scaletune.errors import UserError
from scaletune.models.own import OwnModel
from scaletune.optim.single import build_plain_optimizer
from scaletune.parametrizing import Plan, shapes
from scaletune.parametrizing.recipe_model import build_planned
from scaletune.recipe import LR_FREE, MUON_RULES, OPTIMIZER_SETTINGS, Recipe, with_settings
from scaletune.recipe import Optimizer as Settings
from scaletune.rules import Role, caveats
from scaletune.rules.families import family_named


@dataclass(frozen=True)
class CheckRun:
    """One initialised model with the optimizers that train it."""

    model: nn.Module
    """The model."""

    optimizers: Sequence[Optimizer]
    """Its optimizers: several where they share the model."""

    roles: Mapping[str, Role]
    """Role of each tensor by name."""


@dataclass(frozen=True)
class CheckTarget:
    """A family of models that a check trains, with its data and loss."""

    start: Callable[[int, int, int], CheckRun]
    """Builds a run for (width, depth, seed)."""

    batch: Callable[[int], Any]
    """The batch for a seed."""

    loss: Callable[[nn.Module, Any], Tensor]
    """Scalar loss of (model, batch)."""

    own: tuple[int, int]
    """(width, depth) of the dimension that does not vary."""

    form: str
    """Parametrization."""

    family: str
    """Optimizer family."""

    caveats: list[str]
    """Known limits of the rules for this form and family."""

    logits: Callable[[nn.Module, Any], Tensor] | None = None
    """Logits of (model, batch), where they are not the output of the readout module."""


@contextmanager
def fixed_randomness(model: nn.Module, seed: int) -> Iterator[None]:
    """Makes dropout the same in every repetition, and restores the caller's random state."""
    devices = {
        parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"
    }
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def scalar_loss(target: CheckTarget, model: nn.Module, batch: Any) -> Tensor:
    """The loss of one batch. UserError unless it is one number with a gradient."""
    loss = target.loss(model, batch)
    if isinstance(loss, Tensor) and loss.numel() == 1 and loss.requires_grad:
        return loss
    got = type(loss).__name__
    if isinstance(loss, Tensor):
        got = f"a tensor of shape {tuple(loss.shape)}"
        got += "" if loss.requires_grad else " without gradient"
    raise UserError(f"`loss(model, batch)` must be one number that has a gradient, but got {got}")


def train_steps(
    target: CheckTarget, run: CheckRun, batch: Any, steps: Sequence[int]
) -> Iterator[int]:
    """Trains on one batch and yields after each step in `steps` (0: before training).

    Learning rates are the plan's; there is no schedule and no gradient clipping.
    """
    for step in range(max(steps) + 1):
        if step:
            with fixed_randomness(run.model, step):
                loss = scalar_loss(target, run.model, batch)
                run.model.zero_grad()
                loss.backward()
            closure = functools.partial(loss.detach().reshape, 1)  # MoMo reads the loss
            for opt in run.optimizers:
                opt.step(closure)  # type: ignore[arg-type]
        if step in steps:
            yield step


def as_list(optimizers: Any) -> list[Optimizer]:
    return list(optimizers) if isinstance(optimizers, (list, tuple)) else [optimizers]


# --- a recipe -------------------------------------------------------------------------------------


def recipe_target(recipe: Recipe) -> CheckTarget:
    """The model of a recipe. Batch and initial weights depend on the seed."""
    corpus = data.load(recipe.data)
    rows = recipe.budget.batch_tokens // recipe.data.seq_len

    def start(width: int, depth: int, seed: int) -> CheckRun:
        # an own model may take no depth, which is then not stated either
        sizes = {"width": width} | ({"depth": depth} if depth != recipe.model.depth else {})
        point = with_settings(recipe, {**sizes, "seed": seed})
        planned = build_planned(point, corpus.vocab_size, text=not corpus.features)
        model, plan = planned.net, planned.plan
        optimizers = as_list(optim.optimizer(model, plan, point.optimizer))
        names = {id(p): name for name, p in shapes.named_tensors(model).items()}
        plain = {name: names[id(p)] for name, p in model.named_parameters()}
        return CheckRun(model, optimizers, {plain[row.name]: row.role for row in plan})

    return CheckTarget(
        start=start,
        batch=lambda seed: tuple(
            map(torch.from_numpy, corpus.batch(seed, 0, rows, recipe.data.seq_len))
        ),
        loss=lambda model, batch: model(*batch).sum(),
        logits=_logits,
        own=(recipe.model.width, recipe.model.depth),
        form=recipe.parametrization.form,
        family=recipe.optimizer.rule,
        caveats=caveats(recipe.parametrization.form, recipe.optimizer.rule),
    )


def _logits(model: nn.Module, batch: Any) -> Tensor:
    """The logits of a batch. A user's module may need the targets to compute all of them."""
    return model.logits(*batch) if isinstance(model, OwnModel) else model(batch[0])


# --- the user's own model -------------------------------------------------------------------------


def model_target(
    build: Callable[..., nn.Module],
    *,
    batch: Any,
    loss: Callable[[nn.Module, Any], Tensor],
    base_width: int,
    other_width: int,
    base_depth: int | None = None,
    form: str = "mup",
    optimizer: str = "adamw",
    make: Callable[[Plan, nn.Module], Any] | None = None,
    logits: Callable[[nn.Module, Any], Tensor] | None = None,
    depth: tuple[Any, ...] | None = None,
    **settings: Any,
) -> CheckTarget:
    """The user's models, parametrized by `parametrize` with `settings`.

    Args:
        build: `build(width)`, or `build(width, depth)` if `base_depth` is given.
        batch: The batch to train on.
        loss: Scalar loss of (model, batch).
        base_width: Width at which the hyperparameters are written.
        other_width: Any other width: it shows which dimensions grow.
        base_depth: Depth at which the hyperparameters are written.
        form: Parametrization.
        optimizer: Optimizer family.
        make: (plan, model) -> optimizer or optimizers; None: the recipe family at its defaults.
        logits: Logits of (model, batch).
        depth: As in `parametrize`.
        settings: Other arguments of `parametrize`.
    """
    make = make or _default_optimizer(optimizer, settings.get("lr", 1e-3))

    def build_seeded(width: int, depth: int, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(width) if base_depth is None else build(width, depth)
        if not isinstance(model, nn.Module):
            raise UserError(f"`build` must return a model, but it returned {type(model).__name__}")
        return model

    def start(width: int, deep: int, seed: int) -> CheckRun:
        model = build_seeded(width, deep, seed)
        base = build_seeded(base_width, base_depth or deep, seed)
        delta = None
        if width == base_width:
            delta = build_seeded(other_width, base_depth or deep, seed)
        plan = parametrizing.parametrize(
            model,
            base=base,
            delta=delta,
            form=form,
            optimizer=optimizer,
            depth=depth,
            seed=seed,
            **settings,
        )
        roles = {row.name: row.role for row in plan.rows}
        return CheckRun(model, as_list(make(plan, model)), roles)

    return CheckTarget(
        start=start,
        batch=lambda seed: batch,
        loss=loss,
        own=(base_width, base_depth or 1),
        form=form,
        family=optimizer,
        caveats=caveats(form, optimizer, settings.get("alignment", "full")),
        logits=logits,
    )


def _default_optimizer(rule: str, lr: float) -> Callable[[Plan, nn.Module], Any]:
    """The recipe family for the rule's name, at a recipe's defaults; SGD without momentum."""
    factors = {name: factor for factor, name in MUON_RULES.items()}
    family = "muon" if rule in factors else {"adam": "adamw"}.get(rule, rule)
    if family not in OPTIMIZER_SETTINGS:
        family_named(rule)  # an unknown name raises an error with the nearest one
        raise UserError(
            f"`make(plan, model)` must be given for optimizer family {rule!r}, because scaletune"
            " has no optimizer of that family"
        )
    options: dict[str, Any] = {}
    if rule in factors:
        options = {"shape_factor": factors[rule]}
    elif family == "sgd":
        options = {"momentum": 0.0, "nesterov": False}
    settings = Settings.model_validate(
        {"family": family, "lr": 1.0 if family in LR_FREE else lr, **options}
    )
    return lambda plan, model: build_plain_optimizer(plan, model, settings)
