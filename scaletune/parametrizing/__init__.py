"""`parametrize`: muP and other parametrizations for any `nn.Module`, as a `Plan`.

`shapes` finds which dimensions grow from the base model, `roles` gives each tensor a role,
`scaletune.rules` computes the scale factors, `init` decides how each tensor is initialised,
`attention` handles a head size that grows, and `apply` puts the `plan` on the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, Literal

from torch import nn

from scaletune.errors import UserError, nearest
from scaletune.parametrizing import attention, shapes
from scaletune.parametrizing.apply import branch_factors, readout_multiplier, takes_multiplier
from scaletune.parametrizing.attention import QueryMultiplier
from scaletune.parametrizing.guard import guard
from scaletune.parametrizing.init import initial_values
from scaletune.parametrizing.plan import Plan
from scaletune.parametrizing.roles import Override, TensorRole, assign_roles, read_overrides
from scaletune.parametrizing.row import Row
from scaletune.parametrizing.shapes import Dims, TensorUse
from scaletune.rules import Scale, TensorPlan, scale, shift
from scaletune.rules import depth as depth_rule
from scaletune.rules import weight_decay as decay_rule
from scaletune.rules.families import family_named
from scaletune.rules.forms import form_named

__all__ = ["Plan", "QueryMultiplier", "Row", "guard", "parametrize"]

COUPLED_L2 = (
    "Adam with weight_decay={:g} adds an L2 gradient that scales with width otherwise than the loss"
    ' gradient, so no setting transfers: use optimizer="adamw"'
)


@dataclass(frozen=True)
class BaseSettings:
    """The hyperparameters at the base size, for all tensors."""

    form: str
    optimizer: str
    alignment: str
    lr: float
    rest_lr: float
    weight_decay: float
    eps: float
    init_std: float | None
    alpha: float
    decay: str = "torch"
    init_gain: float | None = None
    keeps_values: bool = False


def parametrize(
    model: nn.Module,
    *,
    base: Any,
    form: str = "mup",
    optimizer: str = "adamw",
    lr: float = 1e-3,
    weight_decay: float = 0.0,
    eps: float = 1e-8,
    init_std: float | Literal["keep"] | None = None,
    overrides: Mapping[str, Any] | None = None,
    depth: tuple[Any, ...] | None = None,
    delta: Any = None,
    alignment: str = "full",
    seed: int = 0,
    apply: bool = True,
    rest_lr: float | None = None,
    queries: Mapping[str, float] | Sequence[str] = (),
    decay: str = "torch",
    init_gain: float | None = None,
) -> Plan:
    """Scales the hyperparameters of a base model to a wider or deeper model, tensor by tensor.

    It compares the shapes of `model` and `base`, gives every tensor a role, and computes its
    multiplier, initial std, learning rate, weight decay and eps (muP: arXiv:2203.03466). By default
    it also hooks the multipliers to the model and initialises its tensors in place.

    Args:
        model: The model to train, on a real device or on the meta device.
        base: The model for which the hyperparameters below are written: a model (also on the meta
            device), a callable or a config that builds one, shapes by tensor name, a `.bsh` file of
            the mup package, or "mup" for a model on which `mup.set_base_shapes` was called.
        form: Parametrization: "mup" (alias of Table 8), "mup_t3", "mup_t9", "sp", "ntk", ...
        optimizer: Optimizer family: "adamw", "sgd", "muon", "lion", ...
        lr: Peak learning rate at the base size.
        weight_decay: Weight decay at the base size. Vectors (biases, norm gains) get 0.
        eps: Epsilon of Adam and similar optimizers at the base size.
        init_std: Initial std of every matrix at the base size. None: the values that the model
            itself drew are rescaled, which works once, on a fresh model. "keep": they stay as they
            are.
        overrides: What shapes cannot show: {pattern of tensor names: role, or a dict with `role`,
            `fan_in`, `fan_out` (axes), `m_in`, `m_out` (ratios), `multiplier`, `init_std`, `lr`,
            `weight_decay`, `eps` (at the base size)}.
        depth: (alpha, patterns of the modules whose output is a residual branch). Each branch is
            multiplied by (depth / base depth)**-alpha; alpha is 0, 0.5 (depth-muP,
            arXiv:2310.02244) or 1 (CompleteP, arXiv:2505.01618).
        delta: A wider base, as in mup. It shows which dimensions grow when `model` has the size of
            the base.
        alignment: Assumption about updates and inputs, "full" or "none" (arXiv:2407.05872).
        seed: Seed of the initial values, used with `init_std`.
        apply: False: only compute the plan. Call `plan.attach` and `plan.initialise` later.
        rest_lr: Learning rate of the tensors that Muon or Shampoo leaves to AdamW; None: `lr`.
        queries: Patterns of the modules that compute the queries of attention, if the head size
            grows; as a mapping, with the share of their output that is queries.
        decay: "torch": a step shrinks weights by lr * weight_decay; "independent": by weight_decay
            at the peak learning rate.
        init_gain: Initial std init_gain / sqrt(fan-in) of every matrix except embedding tables, at
            the base size, in place of `init_std`.

    Returns:
        The plan. `print(plan)` shows every tensor; `plan.param_groups(model)` feeds an optimizer.

    Raises:
        UserError: A growth is not explained, a name or value is not valid, or the multiplier of a
            tensor cannot be applied. The message names the tensor.

    Example:
        >>> import scaletune as st
        >>> import torch
        >>> from torch import nn
        >>> def mlp(width):
        ...     hidden = nn.Linear(width, width)
        ...     return nn.Sequential(nn.Linear(8, width), nn.ReLU(), hidden, nn.Linear(width, 2))
        >>> model = mlp(256)
        >>> plan = st.parametrize(model, base=mlp(64), form="mup", optimizer="adamw", lr=1e-2)
        >>> {row.name: row.lr for row in plan.rows if row.name.endswith("weight")}
        {'0.weight': 0.01, '2.weight': 0.0025, '3.weight': 0.01}
        >>> plan["3.weight"].multiplier
        0.25
        >>> optimizer = torch.optim.AdamW(plan.param_groups(model))
    """
    alpha, *branches = depth or (0,)
    settings = BaseSettings(
        form,
        optimizer,
        alignment,
        lr,
        lr if rest_lr is None else rest_lr,
        weight_decay,
        eps,
        None if init_std == "keep" else init_std,
        alpha,
        decay,
        init_gain,
        init_std == "keep",
    )
    dims, m_depth, base = _compare_shapes(model, base, delta)
    uses, declared = shapes.tensor_uses(model), read_overrides(overrides or {}, dims)
    _check_settings(settings, declared.values())
    roles = assign_roles(dims, uses, declared)
    rows = tuple(
        _plan_tensor(name, dim, uses[name], roles[name], declared[name], settings, m_depth[name])
        for name, dim in dims.items()
    )
    if init_std == "keep":
        rows = tuple(replace(row, init_std=None, init_scale=1.0) for row in rows)
    elif base is None and init_std is None:
        rows = _keep_mup_values(rows, roles, settings)
    else:
        # init_gain is the std of tables; the factors of the rows give the others their own
        std = init_gain if init_std is None else init_std
        rows = initial_values(rows, uses, roles, declared, model, base, std)
    multipliers: tuple[QueryMultiplier, ...] = ()
    notes: tuple[str, ...] = ()
    if form_named(form).per_tensor:
        multipliers, notes = attention.query_multipliers(model, base, queries)
    plan = Plan(
        form=form,
        optimizer=optimizer,
        rows=rows,
        branches=tuple(branches),
        queries=multipliers,
        notes=notes,
    )
    _check_branches(plan, model)
    if apply:
        _apply(plan, model, seed)
    return plan


def _compare_shapes(
    model: nn.Module, base: Any, delta: Any
) -> tuple[dict[str, Dims], dict[str, Fraction], Any]:
    """Growth of each tensor's shape, depth ratio of each tensor, and the base as built.

    The base is None for a model on which `mup.set_base_shapes` was called.
    """
    if isinstance(base, str) and base == "mup":
        dims = shapes.read_infshapes(model)
        return dims, dict.fromkeys(dims, Fraction(1)), None
    base = shapes.build_base(base, model)
    delta = None if delta is None else shapes.build_base(delta, model)
    dims = shapes.shape_growth(model, base, delta)
    return dims, shapes.depth_ratios(list(dims), list(shapes.shapes_of(base))), base


def _keep_mup_values(
    rows: Sequence[Row], roles: Mapping[str, Sequence[TensorRole]], settings: BaseSettings
) -> tuple[Row, ...]:
    """Rows that keep the values mup drew (stds of Table 8), rescaled if the form has other stds."""
    table_8 = replace(settings, form="mup_t8")
    stds = {row.name: _scale(table_8, roles[row.name][0]).std for row in rows}
    return tuple(
        replace(row, init_std=None, init_scale=(row.init_std or 0.0) / stds[row.name])
        for row in rows
    )


def _check_branches(plan: Plan, model: nn.Module) -> None:
    """UserError unless a depth rule that has an effect names the ends of residual branches."""
    names = list(shapes.named_modules(model))
    for pattern in plan.branches:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"`depth` must name modules of the model, but `{pattern}` matches none"
                f"{nearest(pattern, names)}"
            )
    needed = any(row.branch != 1 for row in plan.rows)
    if needed and not branch_factors(model, plan.rows, plan.branches):
        raise UserError(
            "a depth rule multiplies residual branches, but `depth` names no module that ends one:"
            ' name them, as in depth=(1, "*.self_attn", "*.mlp")'
        )


def _apply(plan: Plan, model: nn.Module, seed: int) -> None:
    plan.attach(model)
    if not any(parameter.is_meta for parameter in model.parameters()):
        plan.initialise(model, seed)


def _check_settings(settings: BaseSettings, overrides: Iterable[Override]) -> None:
    """UserError unless the form, the optimizer family and all numbers are valid."""
    form_named(settings.form)
    family_named(settings.optimizer)
    for name in ("lr", "rest_lr", "eps"):
        _check_finite(name, getattr(settings, name), "greater than")
    for name in ("weight_decay", "init_std"):
        _check_finite(name, getattr(settings, name), "at least")
    decay = max([settings.weight_decay, *(each.weight_decay or 0.0 for each in overrides)])
    if settings.optimizer == "adam" and decay:
        raise UserError(COUPLED_L2.format(decay))


def _check_finite(name: str, value: Any, bound: str) -> None:
    if value is None:
        return
    number = isinstance(value, (int, float)) and math.isfinite(value)
    if not number or value < 0 or (value == 0 and bound == "greater than"):
        raise UserError(f"`{name}` must be {bound} 0 and finite, but got {value!r}")


# --- settings of one tensor -----------------------------------------------------------------------


def _plan_tensor(
    name: str,
    shape: Dims,
    uses: Sequence[TensorUse],
    roles: Sequence[TensorRole],
    override: Override,
    settings: BaseSettings,
    m_depth: Fraction,
) -> Row:
    """The settings at the base size times the form's factors.

    `init_std` of the row is the form's factor; `initial_values` turns it into a std.
    """
    scales = [_scale(settings, role) for role in roles]
    _check_tied(uses, roles, scales, settings)
    role, first = roles[0].role, scales[0]
    block = depth_rule(settings.alpha, float(m_depth), settings.optimizer)
    own = [
        readout_multiplier(use) if override.multiplier is None else override.multiplier
        for use in uses
    ]
    is_vector = role == "vec" or (role == "fin" and len(shape) < 2)
    decay = 0.0 if is_vector else settings.weight_decay
    base_lr = settings.lr if role in family_named(settings.optimizer).roles else settings.rest_lr
    lr = _default(override.lr, base_lr) * first.lr * block.lr
    decay_factor = decay_rule(first, settings.decay, settings.optimizer)
    if settings.decay == "independent":  # a step shrinks the weights by lr * weight_decay
        decay_factor /= lr
    planned = TensorPlan(
        name,
        role,
        float(roles[0].m_in),
        float(roles[0].m_out),
        multiplier=own[0] * first.multiplier,
        init_std=first.std * _gain_factor(settings, uses[0], roles[0], override),
        lr=lr,
        weight_decay=_default(override.weight_decay, decay) * decay_factor,
        eps=_default(override.eps, settings.eps) * first.eps * block.eps,
    )
    tied = {
        use.name: o * s.multiplier for use, o, s in zip(uses[1:], own[1:], scales[1:], strict=True)
    }
    planned = _without_stuck_multiplier(planned, uses, tied, settings)
    theta = planned.multiplier / (own[0] * first.multiplier)
    return Row(
        name=name,
        role=planned.role,
        shape=shape,
        m_in=planned.m_in,
        m_out=planned.m_out,
        multiplier=planned.multiplier,
        init_value=None,
        init_std=planned.init_std,
        init_scale=None,
        lr=planned.lr,
        weight_decay=planned.weight_decay,
        eps=planned.eps,
        tied=tied,
        branch=block.multiplier,
        damping=_damping(first, block, theta, settings.optimizer),
    )


def _check_tied(
    uses: Sequence[TensorUse],
    roles: Sequence[TensorRole],
    scales: Sequence[Scale],
    settings: BaseSettings,
) -> None:
    """UserError unless all uses of a tied tensor need the same lr and, if drawn, initial std."""
    form, first = settings.form, scales[0]
    same_std = settings.keeps_values or all(math.isclose(s.std, first.std) for s in scales)
    if same_std and all(math.isclose(s.lr, first.lr) for s in scales):
        return
    each = (f"`{use.name}` ({role.role})" for use, role in zip(uses, roles, strict=True))
    raise UserError(
        "a tied tensor needs a form in which its uses have the same std and lr (mup_t8, mup_t9),"
        f" but form={form!r} gives different ones to {' and '.join(each)}"
    )


def _gain_factor(
    settings: BaseSettings, use: TensorUse, role: TensorRole, override: Override
) -> float:
    """init_gain / sqrt(fan-in) over the init std of tables, at the base size; 1 for tables."""
    is_table = use.is_embedding or role.role in ("vec", "fin")
    if settings.init_gain is None or is_table or override.init_std is not None:
        return 1.0
    base_fan_in = role.fans[0] / float(role.m_in)
    return settings.init_gain / base_fan_in**0.5 / (settings.init_std or settings.init_gain)


def _damping(width: Scale, depth: Scale, theta: float, optimizer: str) -> tuple[float, float]:
    """Factors on the damping of both statistics.

    A tensor that is rewritten as theta * (W / theta) has gradients theta times as large.
    """
    kind = family_named(optimizer).damping
    rewritten = {None: (1.0, 1.0), "kfac": (1.0, theta**2), "shampoo": (theta**2, theta**2)}[kind]
    one, two = (w * d * r for w, d, r in zip(width.damping, depth.damping, rewritten, strict=True))
    return one, two


def _default(value: float | None, default: float) -> float:
    return default if value is None else value


def _scale(settings: BaseSettings, role: TensorRole) -> Scale:
    m_in, m_out = float(role.m_in), float(role.m_out)
    return scale(
        settings.form,
        role.role,
        m_in,
        m_out,
        family=settings.optimizer,
        alignment=settings.alignment,
        base_fans=(role.fans[0] / m_in, role.fans[1] / m_out),
    )


def _without_stuck_multiplier(
    planned: TensorPlan,
    uses: Sequence[TensorUse],
    tied: Mapping[str, float],
    settings: BaseSettings,
) -> TensorPlan:
    """The tensor without a multiplier, where no hook could apply it; else unchanged.

    The rewritten tensor trains exactly alike (arXiv:2011.14522).
    """
    factors = (planned.multiplier, *tied.values())
    stuck = [
        use.name
        for use, factor in zip(uses, factors, strict=True)
        if factor != 1 and not takes_multiplier(use)
    ]
    if not stuck:
        return planned
    if tied:
        raise UserError(
            f"`{stuck[0]}` is tied and needs a multiplier, but no hook can apply one to its module:"
            " choose a form without multipliers"
        )
    own_roles = family_named(settings.optimizer).roles
    family = settings.optimizer if planned.role in own_roles else "adamw"
    return shift(planned, 1 / planned.multiplier, family)
