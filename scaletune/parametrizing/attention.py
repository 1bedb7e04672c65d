"""The softmax where the head size grows: its logits need 1 / d_head, where models have the root of it (arXiv:2203.03466, App. B).

The factor goes on what gives the queries, in which the logits are linear, rotary positions and all. With the head size kept and more
heads there is nothing to do.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from scaletune.errors import UserError, nearest
from scaletune.parametrizing.shapes import modules, skeleton

SIZES = (
    "head_dim",
    "attention_head_size",
    "head_size",
)  # attributes that attention modules keep their head size in
SCALES = ("scaling", "scale", "softmax_scale")
CUSTOMARY = {
    "q_norm": 1.0,
    "q_proj": 1.0,
    "query": 1.0,
    "c_attn": 1 / 3,
}  # child that gives the queries: the first share of its output


@dataclass(frozen=True)
class Queries:
    """A module whose output holds queries in its first `share`: those are multiplied by `factor`."""

    module: str
    factor: float
    share: float = 1.0


def queries(
    model: nn.Module, base: Any, declared: Mapping[str, float] | Sequence[str] = ()
) -> tuple[tuple[Queries, ...], tuple[str, ...]]:
    """What must be multiplied so that attention logits go as 1 / d_head, and a note on modules of which nothing says where queries are.

    declared: patterns of the modules that give queries, with their share of the output where it is not all of it. Nothing is
    multiplied when no head grew, or when `base` is shapes alone.
    """
    grown = {name: factor for name, factor in _grown(model, base).items() if factor != 1}
    shares = dict(declared) if isinstance(declared, Mapping) else dict.fromkeys(declared, 1.0)
    for pattern in shares:
        if not any(fnmatchcase(name, pattern) for name in modules(model)):
            raise UserError(
                f"`queries` must name modules of the model, but `{pattern}` names none{nearest(pattern, modules(model))}"
            )
    found = {name: _givers(model, name, factor, shares) for name, factor in grown.items()}
    return tuple(each for givers in found.values() for each in givers), _unmet(
        [name for name in found if not found[name]]
    )


def _unmet(names: Sequence[str]) -> tuple[str, ...]:
    if not names:
        return ()
    return (
        f"the head size grows in {len(names)} modules, `{names[0]}` first, whose softmax is NOT made to go as 1 / d_head: name the modules"
        ' that give their queries, as in queries=("*.q_proj",), or keep the head size and have more heads',
    )


def _grown(model: nn.Module, base: Any) -> dict[str, float]:
    """Attention module -> the factor its logits lack: 1 / (growth of the head size * growth of its own scale)."""
    if not isinstance(base, nn.Module):
        return {}
    known = {skeleton(name): module for name, module in modules(base).items() if _size(module)}
    return {
        name: _lacking(module, known[skeleton(name)])
        for name, module in modules(model).items()
        if _size(module) and skeleton(name) in known
    }


def _size(module: nn.Module) -> int:
    return next((size for name in SIZES if isinstance(size := getattr(module, name, None), int)), 0)


def _scale(module: nn.Module) -> float:
    """The module's own scale of the logits; d_head**-1/2 when it does not say."""
    said = next(
        (scale for name in SCALES if isinstance(scale := getattr(module, name, None), float)), None
    )
    return _size(module) ** -0.5 if said is None else said


def _lacking(module: nn.Module, base: nn.Module) -> float:
    factor = _size(base) / _size(module) * _scale(base) / _scale(module)
    return 1.0 if math.isclose(factor, 1.0) else factor


def _givers(
    model: nn.Module, name: str, factor: float, declared: Mapping[str, float]
) -> list[Queries]:
    inside = [child for child in modules(model) if child.startswith(f"{name}.")]
    said = [
        Queries(child, factor, share)
        for child in inside
        for pattern, share in declared.items()
        if fnmatchcase(child, pattern)
    ]
    custom = [
        Queries(f"{name}.{child}", factor, share)
        for child, share in CUSTOMARY.items()
        if f"{name}.{child}" in inside
    ]
    return said or custom[:1]
