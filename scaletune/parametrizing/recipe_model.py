"""The model of a recipe point with the plan of its tensors: from the zoo, or built by the user.

A model of the zoo has its plan from `counting`. The user's module is planned by `parametrize`: the
base model is the same build at `parametrization.base_width`, on the meta device. Initial values:

- With `parametrization.init_std` (or `init_gain`) every matrix is drawn as in the zoo: from
  N(0, std**2) with one random stream per tensor name. Tensors that start constant stay as they are
  (norm gains, a readout of zeros), and biases start at zero.
- Without them the module keeps the values that its constructor draws: with form "sp" untouched,
  with other forms rescaled by the form's factor over the base model (`parametrizing.init`).

What shapes cannot show, a module declares in an attribute `scaletune`, a dict with any of
"overrides" (as in `parametrize`), "branches" (patterns of the modules whose output is a residual
branch, for `depth_alpha` and `residual_multiplier`) and "queries".
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

from torch import Tensor, nn

from scaletune import counting, models
from scaletune.errors import UserError, nearest
from scaletune.models import own
from scaletune.models.own import OwnModel, OwnSize
from scaletune.parametrizing import apply, parametrize, shapes
from scaletune.parametrizing.plan import Plan
from scaletune.parametrizing.row import Row
from scaletune.recipe import Recipe
from scaletune.rules import FAMILIES, TensorPlan
from scaletune.rules.families import trained_by
from scaletune.rules.forms import form_named
from scaletune.zoo import OwnConfig

DECLARATION = "scaletune"
"""Attribute of the user's module with what shapes cannot show."""
DECLARED = ("overrides", "branches", "queries")


@dataclass(frozen=True)
class PlannedModel:
    """An initialised model, and the plan of its tensors by their names in it."""

    net: nn.Module
    plan: list[TensorPlan]


def build_planned(recipe: Recipe, vocab_size: int, *, text: bool = True) -> PlannedModel:
    """Builds, parametrizes and initialises the model of a recipe point.

    Args:
        recipe: A recipe point.
        vocab_size: Number of tokens or classes; 1 for a regression.
        text: Whether the inputs are tokens.

    Raises:
        UserError: The user's module cannot be built or parametrized.
    """
    if not isinstance(recipe.model, OwnConfig):
        plan = counting.plan_tensors(recipe, vocab_size)
        return PlannedModel(models.build(recipe, vocab_size), plan)
    check_supported(recipe)
    module = own.build_module(recipe, vocab_size, text=text)
    planned = plan_module(recipe, vocab_size, module, text=text)
    planned.initialise(planned.attach(module), recipe.seed)
    net = OwnModel(module, vocab_size)
    return PlannedModel(net, tensor_plans(planned, net, recipe))


def check_forward(net: OwnModel, inputs: Tensor, targets: Tensor) -> None:
    """UserError unless the module computes logits from these rows, with all of its multipliers.

    A module whose weight is used without calling it is not multiplied.
    """
    called: set[str] = set()
    with ExitStack() as hooks:
        hooked = {
            name: module
            for name, module in net.module.named_modules()
            if any(hook.factor != 1 for hook in apply.multiply_hooks(module))
        }
        for name, module in hooked.items():
            record = functools.partial(_record, called, name)
            hooks.callback(module.register_forward_pre_hook(record).remove)
        own.check_output(net, inputs, targets)
    if missing := hooked.keys() - called:
        raise UserError(
            f"the plan multiplies `{min(missing)}`, but the forward of"
            f" {type(net.module).__name__} does not call that module: call it (not only its"
            " weight), or choose a form without multipliers, such as mup_t3"
        )


def _record(called: set[str], name: str, *_: object) -> None:
    called.add(name)


def check_supported(recipe: Recipe) -> None:
    """UserError for settings that only models of the zoo have."""
    if recipe.training.z_loss:
        raise UserError(
            "`training.z_loss` needs a language model of the zoo, whose readout is known, but the"
            f" model is `{own.own_config(recipe).build}`"
        )
    if recipe.parametrization.attention_multiplier != 1:
        raise UserError(
            "`parametrization.attention_multiplier` must be 1 for `model.build`, whose attention"
            f" only its code knows, but got {recipe.parametrization.attention_multiplier}: use a"
            " key of [model] that the function reads"
        )


def plan_module(recipe: Recipe, vocab_size: int, module: nn.Module, *, text: bool = True) -> Plan:
    """The plan of the user's module at a recipe point.

    Raises:
        UserError: A growth is not explained, or a setting is not supported.
    """
    p, o = recipe.parametrization, recipe.optimizer
    declared = declaration(module, recipe)
    branches = tuple(declared.get("branches", ()))
    if (p.depth_alpha or p.residual_multiplier != 1) and not branches:
        raise UserError(
            "`depth_alpha` and `residual_multiplier` multiply the residual branches, so the module"
            " of `model.build` must name them in an attribute, as in"
            ' scaletune = {"branches": ["*.attention", "*.mlp"]}'
        )
    keeps = recipe.keeps_own_init
    init_std: float | Literal["keep"] | None = p.init_std
    if keeps:
        init_std = "keep" if p.form == "sp" else None
    base, delta = base_modules(recipe, vocab_size, text, meta=init_std is not None)
    plan = parametrize(
        module,
        base=base,
        delta=delta,
        form=p.form,
        optimizer=o.rule,
        lr=o.lr,
        weight_decay=o.weight_decay,
        eps=o.eps,
        init_std=init_std,
        init_gain=p.init_gain,
        overrides=declared.get("overrides"),
        depth=(p.depth_alpha, *branches),
        seed=recipe.seed,
        apply=False,
        rest_lr=o.lr * o.rest_ratio,
        queries=declared.get("queries", ()),
        decay=o.decay,
    )
    _require_readout(plan, recipe)
    rows = _with_multipliers(plan.rows, module, recipe, branches)
    return replace(plan, rows=tuple(rows))


def _require_readout(plan: Plan, recipe: Recipe) -> None:
    """UserError if a form that scales the readout finds none."""
    if not form_named(plan.form).per_tensor:
        return
    if not any(row.role == "out" or row.tied for row in plan.rows):
        raise UserError(
            f"form {plan.form!r} scales the readout, but the module of"
            f" `{own.own_config(recipe).build}` has none: its readout must be a module such as"
            " nn.Linear, also where it shares the embedding's weight"
            " (head.weight = embedding.weight)"
        )


def declaration(module: nn.Module, recipe: Recipe) -> Mapping[str, Any]:
    """The module's attribute `scaletune`; {} without one."""
    declared, build = getattr(module, DECLARATION, {}), own.own_config(recipe).build
    if not isinstance(declared, Mapping):
        raise UserError(
            f"the attribute `scaletune` of the module of `{build}` must be a dict with"
            f" {', '.join(DECLARED)}, but got {type(declared).__name__}"
        )
    for name in declared:
        if name not in DECLARED:
            raise UserError(
                f"the attribute `scaletune` of the module of `{build}` has an unknown key"
                f" {name!r}{nearest(str(name), DECLARED)}"
            )
    return declared


def base_modules(
    recipe: Recipe, vocab_size: int, text: bool, meta: bool
) -> tuple[nn.Module, nn.Module | None]:
    """The base model and, where the target has its width, a wider one that shows what grows."""
    p, (_, depth) = recipe.parametrization, own.built_size(recipe)

    def build(width: int, meta: bool) -> nn.Module:
        own_depth = p.base_depth if p.depth_alpha and p.base_depth != depth else None
        size = OwnSize(width=width, depth=own_depth, seed=recipe.seed)
        return own.build_module(recipe, vocab_size, size, text=text, meta=meta)

    base = build(p.base_width, meta or recipe.model.width == p.base_width)
    wider = None if recipe.model.width != p.base_width else build(2 * p.base_width, True)
    return base, wider


def _with_multipliers(
    rows: Sequence[Row], module: nn.Module, recipe: Recipe, branches: Sequence[str]
) -> list[Row]:
    """The rows with the recipe's multipliers of embedding, logits and residual branches."""
    p = recipe.parametrization
    owns = {"emb": p.embedding_multiplier, "out": p.logits_multiplier}
    if owns == {"emb": 1, "out": 1} and p.residual_multiplier == 1:
        return list(rows)
    uses = shapes.tensor_uses(module)
    ends = [
        name
        for name in shapes.named_modules(module)
        if any(fnmatchcase(name, pattern) for pattern in branches)
    ]
    changed = []
    for row in rows:
        factor = owns.get(row.role, 1.0)
        if factor != 1 and not apply.takes_multiplier(uses[row.name][0]):
            raise UserError(
                "`embedding_multiplier` and `logits_multiplier` must be 1, because no hook can"
                f" multiply `{row.name}`, but got {factor}"
            )
        inside = any(row.name.startswith(f"{name}.") for name in ends)
        changed.append(
            replace(
                row,
                multiplier=row.multiplier * factor,
                tied={name: m * owns["out"] for name, m in row.tied.items()},
                branch=row.branch * (p.residual_multiplier if inside else 1.0),
            )
        )
    return changed


def tensor_plans(plan: Plan, net: nn.Module, recipe: Recipe) -> list[TensorPlan]:
    """The rows of a plan as what optimizers read, by the names of the tensors in `net`."""
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    tensors = shapes.named_tensors(net)
    return [
        TensorPlan(
            names[id(tensors[row.name])],
            row.role,
            row.m_in,
            row.m_out,
            multiplier=row.multiplier,
            init_std=row.init_std or 0.0,
            lr=row.lr,
            weight_decay=row.weight_decay,
            eps=tensor_eps(row, recipe),
            family=trained_by(plan.optimizer, row.role),
        )
        for row in plan.rows
    ]


def tensor_eps(row: Row, recipe: Recipe) -> float:
    """The eps of a tensor. Under Shampoo it is the damping of its statistics."""
    family = trained_by(recipe.optimizer.rule, row.role)
    if FAMILIES[family].damping == "shampoo":
        return recipe.optimizer.eps * row.damping[0]
    return row.eps
