"""Tensors of a model, and the plan of each: multiplier, init std, lr, weight decay, eps.

A plan multiplies the values of a recipe by the factors of `generator`. Nothing is stored on
tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

from scaletune.errors import UserError
from scaletune.rules.families import FAMILIES, family_of, trained_by
from scaletune.rules.forms import Role, form_named
from scaletune.rules.generator import Scale, depth, scale, weight_decay


class BaseValues(Protocol):
    """What a plan reads of `scaletune.recipe.Parametrization`; values hold at the base width."""

    @property
    def form(self) -> str: ...

    @property
    def depth_alpha(self) -> float: ...

    @property
    def init_std(self) -> float: ...

    @property
    def init_gain(self) -> float | None: ...

    @property
    def embedding_multiplier(self) -> float: ...

    @property
    def logits_multiplier(self) -> float: ...


class OptimizerValues(Protocol):
    """What a plan reads of `scaletune.recipe.Optimizer`; values hold at the base width."""

    @property
    def rule(self) -> str: ...

    @property
    def lr(self) -> float: ...

    @property
    def weight_decay(self) -> float: ...

    @property
    def decay(self) -> str: ...

    @property
    def eps(self) -> float: ...

    @property
    def rest_ratio(self) -> float: ...


@dataclass(frozen=True)
class Tensor:
    """One parameter of a model, computed from its config."""

    name: str
    role: Role
    shape: tuple[int, ...]
    """(fan_out, fan_in) of a matrix, (width,) of a vector, (entries, width) of a table."""
    group: str
    """One of "embedding" (all that reads the input), "attention", "mlp", "router", "experts",
    "conv", "norm" and "head"."""
    in_block: bool = False
    """Whether it is inside a residual branch."""
    own_fans: tuple[int, int] | None = None
    """(fan_in, fan_out) where the shape does not give them: inputs, kernels, experts."""
    uses: float = 1.0
    """Rows that it multiplies per token or example: top_k / n_experts of an expert, positions of
    a kernel."""

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def looked_up(self) -> bool:
        """Whether it is a table: rows are looked up, not multiplied."""
        return self.role == "emb" and self.own_fans is None

    @property
    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out). A kernel's fan-in counts its entries; a table has (entries, width)."""
        if self.own_fans:
            return self.own_fans
        if self.role in ("vec", "fin"):
            return 1, self.size
        return (
            (self.shape[0], self.shape[1]) if self.role == "emb" else (self.shape[1], self.shape[0])
        )


@dataclass(frozen=True)
class TensorPlan:
    """The values of one tensor of the target, and the ratios that they come from."""

    name: str
    role: Role
    m_in: float
    """Fan-in over the fan-in of the base model."""
    m_out: float
    """Fan-out over the fan-out of the base model."""
    multiplier: float
    """Forward multiplier."""
    init_std: float
    """Standard deviation at init; 0 for vec and fin: gains start at one, biases at zero."""
    lr: float
    """Peak learning rate."""
    weight_decay: float
    """In PyTorch's convention: a step shrinks the weights by lr * weight_decay."""
    eps: float
    family: str = "adamw"
    """The optimizer family of the rule; "adamw" where the optimizer leaves the tensor to it."""


def plan(
    tensors: Sequence[Tensor],
    base: Sequence[Tensor],
    p: BaseValues,
    o: OptimizerValues,
    m_depth: float = 1.0,
) -> list[TensorPlan]:
    """The plan of each tensor, from the shapes of the target and of a base model of its depth.

    Args:
        tensors: The tensors of the target.
        base: The tensors of the base model, with the same names.
        p: Parametrization: form, init and multipliers at the base width.
        o: Optimizer: lr, weight decay and eps at the base width.
        m_depth: Depth of the target over the base depth.

    Returns:
        One plan per tensor, in the order of `tensors`.
    """
    base_by_name = {tensor.name: tensor for tensor in base}
    branch = depth(p.depth_alpha, m_depth, o.rule)
    pairs = ((tensor, base_by_name[tensor.name]) for tensor in tensors)
    return [
        _plan_tensor(tensor, base, p, o, branch if tensor.in_block else Scale())
        for tensor, base in pairs
    ]


def _plan_tensor(
    tensor: Tensor, base: Tensor, p: BaseValues, o: OptimizerValues, block: Scale
) -> TensorPlan:
    (fan_in, fan_out), (base_in, base_out) = tensor.fans, base.fans
    m_in, m_out = fan_in / base_in, fan_out / base_out
    s = scale(p.form, tensor.role, m_in, m_out, family=o.rule, base_fans=base.fans)
    random = tensor.role in ("emb", "hid", "out")
    multipliers = {"embedding": p.embedding_multiplier, "head": p.logits_multiplier}
    own = multipliers.get(tensor.group, 1.0) if random else 1.0
    std = p.init_std if p.init_gain is None or tensor.looked_up else p.init_gain / base_in**0.5
    family = trained_by(o.rule, tensor.role)
    lr = o.lr * s.lr * block.lr * (1.0 if family == o.rule else o.rest_ratio)
    # a step shrinks the weights by lr * weight_decay
    decay = weight_decay(s, o.decay, o.rule) / (lr if o.decay == "independent" else 1.0)
    return TensorPlan(
        tensor.name,
        tensor.role,
        m_in,
        m_out,
        multiplier=own * s.multiplier,
        init_std=std * s.std if random else 0.0,
        lr=lr,
        weight_decay=o.weight_decay * decay if random else 0.0,
        eps=o.eps * _eps(family, s, block),
        family=family,
    )


def _eps(family: str, s: Scale, block: Scale) -> float:
    """Factor on eps. Under Shampoo eps is the damping of its statistics."""
    if FAMILIES[family].damping == "shampoo":
        return s.damping[0] * block.damping[0]
    return s.eps * block.eps


def shift(row: TensorPlan, theta: float, family: str = "adamw") -> TensorPlan:
    """The tensor written as `multiplier * theta` times `W / theta`, trained identically.

    Under AdamW: lr / theta, weight_decay * theta, eps * theta (arXiv:2011.14522, derived). Exact
    without clipping: a global gradient norm is not invariant.
    """
    f = family_of(family, row.role)
    return replace(
        row,
        multiplier=row.multiplier * theta,
        init_std=row.init_std / theta,
        lr=row.lr / theta**f.multiplier,
        weight_decay=row.weight_decay * theta**f.decay_of_multiplier,
        eps=row.eps * theta**f.eps,
    )


def convert(row: TensorPlan, form: str, other: str, family: str = "adamw") -> TensorPlan:
    """Writes the plan of a tensor in another form: an exact shift by the ratio of multipliers.

    UserError unless a + b agree in every role: then both forms are one algorithm
    (arXiv:2011.14522; arXiv:2407.05872).
    """
    one, two = form_named(form), form_named(other)
    if one.algorithm != two.algorithm:
        raise UserError(
            "only forms that train identically can be converted, but"
            f" {form!r} and {other!r} train differently"
        )
    here, there = (scale(name, row.role, row.m_in, row.m_out) for name in (form, other))
    return shift(row, there.multiplier / here.multiplier, family)
