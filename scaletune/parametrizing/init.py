"""How each tensor starts: a constant put back, a draw of known std, or the model's own draw rescaled by the law it follows.

A model's own std answers to fan-in as fan_in**-e, e = 1/2 (PyTorch's default) or 0 (one std for all, as Hugging Face's models have); the
form's std then takes a factor std * m_in**e. e is read off target and base, or off the target beside what those two laws would give.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from scaletune.errors import UserError
from scaletune.parametrizing.plan import Row
from scaletune.parametrizing.roles import Declared, Read
from scaletune.parametrizing.shapes import Use, named, unwrapped


@dataclass(frozen=True)
class Start:
    """A tensor of the target and, where it has values, of the base."""

    use: Use
    read: Read
    target: Tensor
    base: Tensor | None
    range: float | None  # `config.initializer_range` of a Hugging Face model


def started(
    rows: Sequence[Row], used: Mapping[str, list[Use]], read: Mapping[str, list[Read]], declared: Mapping[str, Declared],
    model: nn.Module, base: Any, init_std: float | None,
) -> tuple[Row, ...]:  # fmt: skip
    """The rows, whose `init_std` is yet the form's factor on the std, with what initialising does to each tensor."""
    target, origin = named(model), named(base) if isinstance(base, nn.Module) else {}
    own = getattr(getattr(unwrapped(model), "config", None), "initializer_range", None)
    starts = {
        name: Start(used[name][0], read[name][0], target[name], _real(origin.get(name)), own)
        for name in target
    }
    return tuple(_started(row, starts, declared[row.name].init_std, init_std) for row in rows)


def _real(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.is_meta else tensor.detach()


def _started(
    row: Row, starts: Mapping[str, Start], said: float | None, init_std: float | None
) -> Row:
    start, factor = starts[row.name], row.init_std or 0.0
    bare = replace(row, init_std=None)
    if said is not None:
        return replace(bare, init_std=said * factor)
    if (value := _constant(start, init_std)) is not None:
        return replace(bare, init_value=value)
    if init_std is not None and start.target.ndim > 1:
        return replace(bare, init_std=init_std * factor)
    if start.target.is_meta:
        return bare
    return replace(
        bare, init_scale=1.0 if init_std is not None else factor * _undone(start, starts)
    )


def _constant(start: Start, init_std: float | None) -> float | None:
    """The value of a tensor that starts constant: as found, or on the meta device by kind: a bias 0, a norm's gain 1."""
    kind, name = type(start.use.module).__name__, start.use.name.rpartition(".")[2]
    tensor = start.base if start.target.is_meta else start.target.detach()
    if tensor is not None and tensor.numel() and tensor.min() == tensor.max():
        value = float(tensor.flatten()[0])
        if tensor.numel() > 1 or value in (0.0, 1.0):
            return value
    if (
        start.target.ndim < 2
        and name.endswith("bias")
        and (init_std is not None or start.target.is_meta)
    ):
        return 0.0
    return 1.0 if start.target.is_meta and "norm" in kind.lower() and name == "weight" else None


def _undone(start: Start, starts: Mapping[str, Start]) -> float:
    """m_in**e: what takes the model's own std back to the base's. A bias follows its matrix's law and fan-in."""
    if start.target.ndim < 2:
        matrix = starts.get(f"{start.use.module_name}.weight")
        return (
            _undone(matrix, starts)
            if matrix
            and matrix.target.ndim > 1
            and isinstance(start.use.module, (nn.Linear, *CONVS))
            else 1.0
        )
    m = float(start.read.m_in)
    if start.use.looks_up or m == 1:
        return 1.0
    return m ** (_against_base(start, m) if start.base is not None else _against_laws(start))


CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def _std(tensor: Tensor) -> float:
    return float(tensor.detach().double().std())


def _near(off: float, n: int) -> bool:
    """Whether two stds, one estimated from n values, agree up to the noise of that."""
    return abs(off) < 0.05 + 4 / math.sqrt(n)


def _against_base(start: Start, m: float) -> float:
    """e in std ~ fan_in**-e from the two models' own tensors."""
    assert start.base is not None
    ratio = (
        math.log(_std(start.target) / _std(start.base))
        if _std(start.base) and _std(start.target)
        else 0.0
    )
    e = min((0.0, 0.5), key=lambda e: abs(ratio + e * math.log(m)))
    if not _near(ratio + e * math.log(m), min(start.target.numel(), start.base.numel())):
        raise _unknown(start)
    return e


def _against_laws(start: Start) -> float:
    """e from the target alone: PyTorch's default std (3 * fan_in)**-1/2, or the config's one std."""
    std, n = _std(start.target), start.target.numel()
    if std and _near(math.log(std * math.sqrt(3 * start.read.fans[0])), n):
        return 0.5
    if std and start.range and _near(math.log(std / start.range), n):
        return 0.0
    raise _unknown(start)


def _unknown(start: Start) -> UserError:
    return UserError(
        f"`init_std` must be given where a model's own initialisation follows no law we know, but `{start.use.name}` has std {_std(start.target):.4g}"
    )
