"""Tensors, and what each one gets: the generator's factors put on a recipe's values. Nothing is stored on a tensor."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from scaletune.errors import UserError
from scaletune.rules.families import FAMILIES, family_of, trained_by
from scaletune.rules.forms import Role, form_named
from scaletune.rules.generator import Scale, depth, scale, weight_decay

if TYPE_CHECKING:
    from scaletune.recipe import Optimizer, Parametrization


@dataclass(frozen=True)
class Tensor:
    """One parameter of a model, as its config alone tells: shape (fan_out, fan_in), (width,), or of a table (entries, width)."""

    name: str
    role: Role
    shape: tuple[int, ...]
    group: str  # "embedding" (all that reads the input) | "attention" | "mlp" | "router" | "experts" | "conv" | "norm" | "head"
    in_block: bool = False
    own_fans: tuple[int, int] | None = (
        None  # (fan_in, fan_out) where the shape does not tell: inputs, kernels, experts
    )
    uses: float = 1.0  # rows it multiplies a token or an example: top_k / n_experts of an expert, places of a kernel

    @property
    def size(self) -> int:
        size = 1
        for n in self.shape:
            size *= n
        return size

    @property
    def looked_up(self) -> bool:
        """Whether it is a table, whose rows are taken and not multiplied."""
        return self.role == "emb" and self.own_fans is None

    @property
    def fans(self) -> tuple[int, int]:
        """(fan_in, fan_out), a kernel's entries in the fan-in. A table's fan-out is its width."""
        if self.own_fans:
            return self.own_fans
        if self.role in ("vec", "fin"):
            return 1, self.size
        return (
            (self.shape[0], self.shape[1]) if self.role == "emb" else (self.shape[1], self.shape[0])
        )


@dataclass(frozen=True)
class Planned:
    """What one tensor of the target gets: absolute values, and the ratios they came from."""

    name: str
    role: Role
    m_in: float
    m_out: float
    multiplier: float
    init_std: float  # 0 for vec and fin: gains start at one, biases at zero
    lr: float
    weight_decay: float
    eps: float
    family: str = "adamw"  # whose rule this is: AdamW's where the optimizer leaves the tensor to it


def plan(
    tensors: Sequence[Tensor],
    base: Sequence[Tensor],
    p: Parametrization,
    o: Optimizer,
    m_depth: float = 1.0,
) -> list[Planned]:
    """Parameter name -> multiplier, init std, lr, weight decay, eps, from shapes of the target and of a base model with its layers."""
    named = {tensor.name: tensor for tensor in base}
    in_block = depth(p.depth_alpha, m_depth, o.rule)
    return [
        _planned(tensor, named[tensor.name], p, o, in_block if tensor.in_block else Scale())
        for tensor in tensors
    ]


def _planned(
    tensor: Tensor, base: Tensor, p: Parametrization, o: Optimizer, block: Scale
) -> Planned:
    (fan_in, fan_out), (base_in, base_out) = tensor.fans, base.fans
    m_in, m_out = fan_in / base_in, fan_out / base_out
    s = scale(p.form, tensor.role, m_in, m_out, family=o.rule, base_fans=base.fans)
    random = tensor.role in ("emb", "hid", "out")
    own = (
        {"embedding": p.embedding_multiplier, "head": p.logits_multiplier}.get(tensor.group, 1.0)
        if random
        else 1.0
    )
    std = p.init_std if p.init_gain is None or tensor.looked_up else p.init_gain / base_in**0.5
    family = trained_by(o.rule, tensor.role)
    lr = o.lr * s.lr * block.lr * (1.0 if family == o.rule else o.rest_ratio)
    decay = weight_decay(s, o.decay, o.rule) / (
        lr if o.decay == "independent" else 1.0
    )  # every step shrinks by lr * weight_decay
    return Planned(
        tensor.name, tensor.role, m_in, m_out,
        multiplier=own * s.multiplier,
        init_std=std * s.std if random else 0.0,
        lr=lr,
        weight_decay=o.weight_decay * decay if random else 0.0,
        eps=o.eps * _eps(family, s, block),
        family=family,
    )  # fmt: skip


def _eps(family: str, s: Scale, block: Scale) -> float:
    """Factor on eps, which under Shampoo is the damping of its statistics."""
    return (
        s.damping[0] * block.damping[0]
        if FAMILIES[family].damping == "shampoo"
        else s.eps * block.eps
    )


def shift(row: Planned, theta: float, family: str = "adamw") -> Planned:
    """The same tensor written as `multiplier * theta` over `W / theta`: the optimizer trains it identically (arXiv:2011.14522, derived).

    Under AdamW lr / theta, weight_decay * theta, eps * theta. Exact up to clipping: a global gradient norm is not invariant.
    """
    f = family_of(family, row.role)
    return replace(
        row, multiplier=row.multiplier * theta, init_std=row.init_std / theta,
        lr=row.lr / theta**f.multiplier, weight_decay=row.weight_decay * theta**f.decay_of_multiplier, eps=row.eps * theta**f.eps,
    )  # fmt: skip


def convert(row: Planned, form: str, other: str, family: str = "adamw") -> Planned:
    """A tensor planned in one form, in another: an exact shift, by the ratio of their multipliers at the same base values.

    UserError unless a + b agree in every role, and so the two are one algorithm (arXiv:2011.14522; arXiv:2407.05872).
    """
    one, two = form_named(form), form_named(other)
    if one.acts != two.acts:
        raise UserError(
            f"forms must be one algorithm in other words to be converted, but {form!r} and {other!r} train differently"
        )
    here, there = (scale(name, row.role, row.m_in, row.m_out) for name in (form, other))
    return shift(row, there.multiplier / here.multiplier, family)
