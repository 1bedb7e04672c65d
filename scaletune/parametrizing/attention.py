"""Attention logits in a model whose head size grows with width.

muP needs logits that scale as 1 / d_head (arXiv:2203.03466, App. B.1), but models use
d_head**-1/2. The missing factor multiplies the queries, in which the logits are linear, also with
rotary position embeddings. If the head size stays constant and the number of heads grows, nothing
has to change.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from torch import nn

from scaletune.errors import UserError, nearest
from scaletune.parametrizing.shapes import name_pattern, named_modules

HEAD_SIZES = ("head_dim", "attention_head_size", "head_size")
"""Attributes in which attention modules store their head size."""

SCALES = ("scaling", "scale", "softmax_scale")
"""Attributes in which attention modules store the scale of their logits."""

QUERY_MODULES = {"q_norm": 1.0, "q_proj": 1.0, "query": 1.0, "c_attn": 1 / 3}
"""Usual names of the child module that computes the queries, and the share of its output that is
queries (the first part). An earlier name has priority."""


@dataclass(frozen=True)
class QueryMultiplier:
    """A factor on the queries that a module computes."""

    module: str
    """Name of the module."""

    factor: float
    """Factor on the queries."""

    share: float = 1.0
    """Share of the output that is queries: the first part of the last dimension."""


def query_multipliers(
    model: nn.Module, base: Any, declared: Mapping[str, float] | Sequence[str] = ()
) -> tuple[tuple[QueryMultiplier, ...], tuple[str, ...]]:
    """The factors that make attention logits scale as 1 / d_head, and notes for the user.

    Args:
        model: The target model.
        base: The base model. If it is only shapes, nothing is multiplied.
        declared: Patterns of the modules that compute queries; as a mapping, with the share of
            their output that is queries.

    Returns:
        The multipliers, and a note if some attention modules have no known query module. Both are
        empty if no head size grows.
    """
    grown = {name: f for name, f in _missing_factors(model, base).items() if f != 1}
    shares = dict(declared) if isinstance(declared, Mapping) else dict.fromkeys(declared, 1.0)
    names = named_modules(model)
    for pattern in shares:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(
                f"`queries` must name modules of the model, but `{pattern}` matches none"
                f"{nearest(pattern, names)}"
            )
    queries = {name: _query_modules(names, name, f, shares) for name, f in grown.items()}
    unknown = [name for name, multipliers in queries.items() if not multipliers]
    return tuple(each for multipliers in queries.values() for each in multipliers), _note(unknown)


def _note(unknown: Sequence[str]) -> tuple[str, ...]:
    if not unknown:
        return ()
    return (
        f"the head size grows in {len(unknown)} attention modules (first: `{unknown[0]}`), but"
        " their logits are NOT scaled as 1 / d_head, because the module that computes the queries"
        ' is not known: name it, as in queries=("*.q_proj",), or keep the head size and use more'
        " heads",
    )


def _missing_factors(model: nn.Module, base: Any) -> dict[str, float]:
    """The factor that the logits of each attention module lack."""
    if not isinstance(base, nn.Module):
        return {}
    known = {name_pattern(n): m for n, m in named_modules(base).items() if _head_size(m)}
    return {
        name: _missing_factor(module, known[name_pattern(name)])
        for name, module in named_modules(model).items()
        if _head_size(module) and name_pattern(name) in known
    }


def _head_size(module: nn.Module) -> int:
    sizes = (getattr(module, name, None) for name in HEAD_SIZES)
    return next((size for size in sizes if isinstance(size, int)), 0)


def _logit_scale(module: nn.Module) -> float:
    """The scale that the module stores, or d_head**-1/2."""
    scales = (getattr(module, name, None) for name in SCALES)
    scale = next((scale for scale in scales if isinstance(scale, float)), None)
    return _head_size(module) ** -0.5 if scale is None else scale


def _missing_factor(module: nn.Module, base: nn.Module) -> float:
    """1 / (growth of the head size * growth of the module's own scale)."""
    factor = _head_size(base) / _head_size(module) * _logit_scale(base) / _logit_scale(module)
    return 1.0 if math.isclose(factor, 1.0) else factor


def _query_modules(
    modules: Mapping[str, nn.Module], name: str, factor: float, declared: Mapping[str, float]
) -> list[QueryMultiplier]:
    """Declared modules inside the attention module `name`, or the first one with a usual name."""
    inside = [child for child in modules if child.startswith(f"{name}.")]
    matching = [
        QueryMultiplier(child, factor, share)
        for child in inside
        for pattern, share in declared.items()
        if fnmatchcase(child, pattern)
    ]
    usual = [
        QueryMultiplier(f"{name}.{child}", factor, share)
        for child, share in QUERY_MODULES.items()
        if f"{name}.{child}" in inside
    ]
    return matching or usual[:1]
