"""`parametrize`: any `nn.Module` beside its base model -> a `Plan` of what every tensor gets, hooked and initialised.

`shapes` says what grew, `roles` what that makes of each tensor, `scaletune.rules` scales, `starting` looks at how tensors start, and
`applying` puts the `plan` on a model, `attention` sees to a softmax whose head size grows.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any

from torch import nn

from scaletune.errors import UserError, nearest
from scaletune.parametrizing import attention, roles, shapes
from scaletune.parametrizing.apply import branches, own_multiplier, takes_multiplier
from scaletune.parametrizing.attention import Queries
from scaletune.parametrizing.guard import guard
from scaletune.parametrizing.init import started
from scaletune.parametrizing.plan import Plan, Row
from scaletune.parametrizing.roles import Declared, Read
from scaletune.parametrizing.shapes import Dims, Use
from scaletune.rules import Planned, Scale, scale, shift
from scaletune.rules import depth as depth_rule
from scaletune.rules.families import family_named
from scaletune.rules.forms import form_named

__all__ = ["Plan", "Queries", "Row", "guard", "parametrize"]


@dataclass(frozen=True)
class Settings:
    """What is asked of every tensor at the base size."""

    form: str
    optimizer: str
    alignment: str
    lr: float
    rest_lr: float
    weight_decay: float
    eps: float
    init_std: float | None
    alpha: float


def parametrize(
    model: nn.Module, *, base: Any, form: str = "mup", optimizer: str = "adamw", lr: float = 1e-3, weight_decay: float = 0.0,
    eps: float = 1e-8, init_std: float | None = None, overrides: Mapping[str, Any] | None = None,
    depth: tuple[Any, ...] | None = None, delta: Any = None, alignment: str = "full", seed: int = 0, apply: bool = True,
    rest_lr: float | None = None, queries: Mapping[str, float] | Sequence[str] = (),
) -> Plan:  # fmt: skip
    """The plan of `model` from hyperparameters at the base size, put on the model: multipliers hooked, tensors initialised.

    base: a model (on the meta device too), a callable or config that builds one, shapes by name, a `.bsh` file, or "mup" for a model
    that `mup.set_base_shapes` prepared, which becomes an ordinary one. delta: as in mup, a wider base, where the target may be the base.
    init_std: every matrix's at the base size; None multiplies what the model itself drew, which is asked of a fresh model, once.
    overrides: {pattern of names: role, or a table of `roles.Declared`'s fields}. depth: (alpha, patterns of the modules whose output
    is a residual branch): branch ~ m_depth**-alpha (arXiv:2505.01618). rest_lr: of the tensors that Muon and its like leave to AdamW
    (None: `lr`). queries: see `attention.queries`, where heads grow in size. apply=False, or a model on meta: only plan; then
    `plan.attach(model)` and, once materialised, `plan.initialise(model, seed)`.
    """
    alpha, *ends = depth or (0,)
    asked = Settings(
        form,
        optimizer,
        alignment,
        lr,
        lr if rest_lr is None else rest_lr,
        weight_decay,
        eps,
        init_std,
        alpha,
    )
    grown, m_depth, base = _grown(model, base, delta)
    used, declared = shapes.uses(model), roles.declarations(overrides or {}, grown)
    _checked(asked, declared.values())
    read = roles.roles(grown, used, declared)
    rows = tuple(
        _row(name, grown[name], used[name], read[name], declared[name], asked, m_depth[name])
        for name in grown
    )
    rows = (
        _kept(rows, read, asked)
        if base is None and init_std is None
        else started(rows, used, read, declared, model, base, init_std)
    )
    softmax, notes = (
        attention.queries(model, base, queries) if form_named(form).per_tensor else ((), ())
    )
    plan = Plan(
        form=form,
        optimizer=optimizer,
        rows=rows,
        branches=tuple(ends),
        queries=softmax,
        notes=notes,
    )
    _branches_named(plan, model)
    if apply:
        _put_on(plan, model, seed)
    return plan


def _grown(
    model: nn.Module, base: Any, delta: Any
) -> tuple[dict[str, Dims], dict[str, Fraction], Any]:
    """Growth of each tensor's shape, growth of the depth it lies in, and the base as built: None for a model that mup prepared."""
    if isinstance(base, str) and base == "mup":
        grown = shapes.prepared(model)
        return grown, dict.fromkeys(grown, Fraction(1)), None
    base = shapes.built(base, model)
    grown = shapes.growth(model, base, None if delta is None else shapes.built(delta, model))
    return grown, shapes.depths(list(grown), list(shapes.shapes_of(base))), base


def _kept(
    rows: Sequence[Row], read: Mapping[str, Sequence[Read]], asked: Settings
) -> tuple[Row, ...]:
    """A model that mup initialised keeps its tensors: it holds Table 8's stds, rescaled where the form asks for another."""
    table_8 = {
        row.name: _scale(replace(asked, form="mup_t8"), read[row.name][0]).std for row in rows
    }
    return tuple(
        replace(row, init_std=None, init_scale=(row.init_std or 0.0) / table_8[row.name])
        for row in rows
    )


def _branches_named(plan: Plan, model: nn.Module) -> None:
    """UserError unless a depth rule that does something knows which modules end residual branches."""
    names = list(shapes.modules(model))
    for pattern in plan.branches:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"`depth` must name modules of the model, but `{pattern}` names none{nearest(pattern, names)}"
            )
    if any(row.branch != 1 for row in plan.rows) and not branches(plan, model):
        raise UserError(
            'a depth rule multiplies residual branches: name the modules that end them, as in depth=(1, "*.self_attn", "*.mlp")'
        )


def _put_on(plan: Plan, model: nn.Module, seed: int) -> None:
    plan.attach(model)
    if not any(parameter.is_meta for parameter in model.parameters()):
        plan.initialise(model, seed)


def _checked(asked: Settings, declared: Iterable[Declared]) -> None:
    """UserError unless form, family and numbers are such that a plan exists."""
    form_named(asked.form)
    family_named(asked.optimizer)
    for name, low in (
        ("lr", False),
        ("rest_lr", False),
        ("weight_decay", True),
        ("eps", False),
        ("init_std", True),
    ):
        value = getattr(asked, name)
        if value is not None and not (
            isinstance(value, (int, float))
            and math.isfinite(value)
            and (value > 0 or (low and value == 0))
        ):
            raise UserError(
                f"`{name}` must be {'at least' if low else 'greater than'} 0 and finite, but got {value!r}"
            )
    decay = max([asked.weight_decay, *(said.weight_decay or 0.0 for said in declared)])
    if asked.optimizer == "adam" and decay:
        raise UserError(COUPLED.format(decay))


COUPLED = (
    "Adam with weight_decay={:g} adds an L2 gradient that scales with width otherwise than the loss gradient, so no setting transfers: "
    'use optimizer="adamw"'
)


# --- a tensor's settings ---------------------------------------------------------------------------------------------


def _row(
    name: str,
    shape: Dims,
    used: Sequence[Use],
    read: Sequence[Read],
    said: Declared,
    asked: Settings,
    m_depth: Fraction,
) -> Row:
    """The generator's factors on the settings at the base size. A tied tensor must be initialised and trained alike in all its uses."""
    scales = [_scale(asked, each) for each in read]
    if not all(
        math.isclose(s.std, scales[0].std) and math.isclose(s.lr, scales[0].lr) for s in scales
    ):
        others = " and ".join(
            f"`{use.name}` ({each.role})" for use, each in zip(used, read, strict=True)
        )
        raise UserError(
            f"a tied tensor needs a form in which its uses share std and lr (mup_t8, mup_t9), but form={asked.form!r}: {others}"
        )
    first, block = scales[0], depth_rule(asked.alpha, float(m_depth), asked.optimizer)
    own = [own_multiplier(use) if said.multiplier is None else said.multiplier for use in used]
    decay = (
        0.0
        if read[0].role == "vec" or (read[0].role == "fin" and len(shape) < 2)
        else asked.weight_decay
    )
    base_lr = asked.lr if read[0].role in family_named(asked.optimizer).roles else asked.rest_lr
    plain = Planned(
        name, read[0].role, float(read[0].m_in), float(read[0].m_out), multiplier=own[0] * first.multiplier, init_std=first.std,
        lr=_or(said.lr, base_lr) * first.lr * block.lr, weight_decay=_or(said.weight_decay, decay) * first.weight_decay,
        eps=_or(said.eps, asked.eps) * first.eps * block.eps,
    )  # fmt: skip
    tied = {
        use.name: o * s.multiplier for use, o, s in zip(used[1:], own[1:], scales[1:], strict=True)
    }
    plain = _hookable(plain, used, tied, asked)
    return Row(
        name=name, role=plain.role, shape=shape, m_in=plain.m_in, m_out=plain.m_out, multiplier=plain.multiplier, init_value=None,
        init_std=plain.init_std, init_scale=None, lr=plain.lr, weight_decay=plain.weight_decay, eps=plain.eps, tied=tied,
        branch=block.multiplier, damping=_damping(first, block, plain.multiplier / (own[0] * first.multiplier), asked.optimizer),
    )  # fmt: skip


def _damping(width: Scale, depth: Scale, theta: float, optimizer: str) -> tuple[float, float]:
    """Factors on the damping of both statistics; of a tensor rewritten as theta * (W / theta) gradients are theta times what they were."""
    kind = family_named(optimizer).damping
    rewritten = {None: (1.0, 1.0), "kfac": (1.0, theta**2), "shampoo": (theta**2, theta**2)}[kind]
    one, two = (w * d * r for w, d, r in zip(width.damping, depth.damping, rewritten, strict=True))
    return one, two


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def _scale(asked: Settings, read: Read) -> Scale:
    m_in, m_out = float(read.m_in), float(read.m_out)
    fans = (read.fans[0] / m_in, read.fans[1] / m_out)
    return scale(
        asked.form,
        read.role,
        m_in,
        m_out,
        family=asked.optimizer,
        alignment=asked.alignment,
        base_fans=fans,
    )


def _hookable(
    plain: Planned, used: Sequence[Use], tied: Mapping[str, float], asked: Settings
) -> Planned:
    """The row as it is, or, where no hook can multiply the tensor, the same written without multiplier (arXiv:2011.14522, exact)."""
    factors = (plain.multiplier, *tied.values())
    stuck = [
        use.name
        for use, factor in zip(used, factors, strict=True)
        if factor != 1 and not takes_multiplier(use)
    ]
    if not stuck:
        return plain
    if tied:
        raise UserError(
            f"`{stuck[0]}` needs a multiplier that no hook can apply where it is: choose a form without one"
        )
    family = asked.optimizer if plain.role in family_named(asked.optimizer).roles else "adamw"
    return shift(plain, 1 / plain.multiplier, family)
