"""What is checked: a family of models that can be built and trained at any width, depth and seed. One record for the zoo and for yours."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from scaletune import counting, data, models, optim, parametrizing
from scaletune.errors import UserError
from scaletune.optim.single import alone
from scaletune.parametrizing import Plan
from scaletune.recipe import LR_FREE, MUON, READS, Recipe, with_settings
from scaletune.recipe import Optimizer as Settings
from scaletune.rules import Role, caveats
from scaletune.rules.families import family_named


@dataclass(frozen=True)
class Run:
    """One model, initialised, with what trains it and the role of each tensor by name."""

    model: nn.Module
    optimizers: Sequence[Optimizer]
    roles: Mapping[str, Role]


@dataclass(frozen=True)
class Subject:
    """`start(width, depth, seed)` builds a run; `loss(model, batch)` is a scalar; `logits` where the readout's own output is not them."""

    start: Callable[[int, int, int], Run]
    batch: Callable[[int], Any]  # of a seed
    loss: Callable[[nn.Module, Any], Tensor]
    own: tuple[int, int]  # (width, depth) of what does not vary
    form: str
    family: str  # of the optimizer
    caveats: list[str]
    logits: Callable[[nn.Module, Any], Tensor] | None = None


@contextmanager
def steady(model: nn.Module, seed: int) -> Iterator[None]:
    """The same dropout whenever a step, or an observation, is repeated; the caller's random state is left alone."""
    devices = {
        parameter.device for parameter in model.parameters() if parameter.device.type == "cuda"
    }
    with torch.random.fork_rng(devices=list(devices)):
        torch.manual_seed(seed)
        yield


def scalar_loss(subject: Subject, model: nn.Module, batch: Any) -> Tensor:
    """The loss of one batch; UserError where it is no scalar with a gradient."""
    loss = subject.loss(model, batch)
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        got = (
            f"a tensor of shape {tuple(loss.shape)}"
            if isinstance(loss, Tensor)
            else type(loss).__name__
        )
        raise UserError(
            f"`loss(model, batch)` must be one number that has a gradient, but got {got}"
        )
    return loss


def trained(subject: Subject, run: Run, batch: Any, steps: Sequence[int]) -> Iterator[int]:
    """Train on one batch, learning rates as planned, no schedule and no clipping; stop after each of `steps` (0: before the first)."""
    for step in range(max(steps) + 1):
        if step:
            with steady(run.model, step):
                loss = scalar_loss(subject, run.model, batch)
                run.model.zero_grad()
                loss.backward()
            for opt in run.optimizers:
                opt.step(functools.partial(loss.detach().reshape, 1))  # type: ignore[arg-type]  # its loss, which MoMo steps by
        if step in steps:
            yield step


def several(made: Any) -> list[Optimizer]:
    return list(made) if isinstance(made, (list, tuple)) else [made]


# --- of a recipe -----------------------------------------------------------------------------------------------------


def of_recipe(recipe: Recipe) -> Subject:
    """The zoo's model of a recipe; batch and initial weights follow the seed."""
    corpus = data.load(recipe.data)
    rows = recipe.budget.batch_tokens // recipe.data.seq_len

    def start(width: int, depth: int, seed: int) -> Run:
        point = with_settings(recipe, {"width": width, "depth": depth, "seed": seed})
        model, plan = (
            models.build(point, corpus.vocab_size),
            counting.planned(point, corpus.vocab_size),
        )
        return Run(
            model,
            several(optim.optimizer(model, plan, point.optimizer)),
            {row.name: row.role for row in plan},
        )

    return Subject(
        start=start,
        batch=lambda seed: tuple(
            map(torch.from_numpy, corpus.batch(seed, 0, rows, recipe.data.seq_len))
        ),
        loss=lambda model, batch: model(*batch).sum(),
        logits=lambda model, batch: model(batch[0]),
        own=(recipe.model.width, recipe.model.depth),
        form=recipe.parametrization.form,
        family=recipe.optimizer.rule,
        caveats=caveats(recipe.parametrization.form, recipe.optimizer.rule),
    )


# --- of the user's own model -----------------------------------------------------------------------------------------


def of_model(
    build: Callable[..., nn.Module], *, batch: Any, loss: Callable[[nn.Module, Any], Tensor], base_width: int, other_width: int,
    base_depth: int | None = None, form: str = "mup", optimizer: str = "adamw", make: Callable[[Plan, nn.Module], Any] | None = None,
    logits: Callable[[nn.Module, Any], Tensor] | None = None, depth: tuple[Any, ...] | None = None, **settings: Any,
) -> Subject:  # fmt: skip
    """`build(width)`, or `build(width, depth)` where there is a `base_depth`, put through `parametrize` with `settings`.

    other_width: any that differs from the base, to see what grows. make: (plan, model) -> its optimizers, where ours do not do.
    """
    make = make or _maker(optimizer, settings.get("lr", 1e-3))

    def built(width: int, deep: int, seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            model = build(width) if base_depth is None else build(width, deep)
        if not isinstance(model, nn.Module):
            raise UserError(f"`build` must make a model, but it made {type(model).__name__}")
        return model

    def start(width: int, deep: int, seed: int) -> Run:
        model, origin = built(width, deep, seed), built(base_width, base_depth or deep, seed)
        delta = built(other_width, base_depth or deep, seed) if width == base_width else None
        plan = parametrizing.parametrize(
            model,
            base=origin,
            delta=delta,
            form=form,
            optimizer=optimizer,
            depth=depth,
            seed=seed,
            **settings,
        )
        return Run(model, several(make(plan, model)), {row.name: row.role for row in plan.rows})

    known = caveats(form, optimizer, settings.get("alignment", "full"))
    return Subject(
        start,
        lambda seed: batch,
        loss,
        (base_width, base_depth or 1),
        form,
        optimizer,
        known,
        logits,
    )


def _maker(rule: str, lr: float) -> Callable[[Plan, nn.Module], Any]:
    """The recipe family that `scaletune.rules` calls `rule`, at a recipe's defaults; SGD without momentum."""
    factors = {name: factor for factor, name in MUON.items()}
    family = "muon" if rule in factors else {"adam": "adamw"}.get(rule, rule)
    if family not in READS:
        family_named(rule)  # a name nobody knows is told the nearest
        raise UserError(
            f"`make(plan, model)` must say how to build optimizers of family {rule!r}: there is none of ours"
        )
    given = (
        {"shape_factor": factors[rule]}
        if rule in factors
        else {"momentum": 0.0, "nesterov": False}
        if family == "sgd"
        else {}
    )
    settings = Settings.model_validate(
        {"family": family, "lr": 1.0 if family in LR_FREE else lr, **given}
    )
    return lambda plan, model: alone(plan, model, settings)
