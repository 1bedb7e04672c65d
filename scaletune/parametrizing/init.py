"""How each tensor is initialised: a constant, a normal draw, or the model's own values rescaled.

A model's own initial std depends on fan-in as fan_in**-e. e is 1/2 for PyTorch's defaults and 0 for
one std in all layers (models of Hugging Face). The std of the form then needs a factor m_in**e on
the model's own values. e is measured by comparing target and base, or, if the base has no values,
by comparing the target with the std that each of the two rules predicts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from scaletune.errors import UserError
from scaletune.parametrizing.roles import Override, TensorRole
from scaletune.parametrizing.row import Row
from scaletune.parametrizing.shapes import TensorUse, name_pattern, named_tensors, unwrap

CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True)
class InitialTensor:
    """A tensor of the target with what its initialisation depends on."""

    use: TensorUse
    """Its first use."""

    role: TensorRole
    """Its role in the first use."""

    target: Tensor
    """The tensor in the target model, possibly on the meta device."""

    base: Tensor | None
    """The tensor in the base model, if that has values."""

    hf_std: float | None
    """`config.initializer_range` of a Hugging Face model."""


def initial_values(
    rows: Sequence[Row],
    uses: Mapping[str, list[TensorUse]],
    roles: Mapping[str, list[TensorRole]],
    overrides: Mapping[str, Override],
    model: nn.Module,
    base: Any,
    init_std: float | None,
) -> tuple[Row, ...]:
    """The rows with `init_value`, `init_std` or `init_scale` set.

    On entry, `init_std` of each row is the form's factor on the std at the base size.
    """
    target = named_tensors(model)
    origin = named_tensors(base) if isinstance(base, nn.Module) else {}
    alike = {name_pattern(name): tensor for name, tensor in reversed(origin.items())}
    hf_std = getattr(getattr(unwrap(model), "config", None), "initializer_range", None)
    tensors = {
        name: InitialTensor(
            uses[name][0],
            roles[name][0],
            target[name],
            _with_values(origin.get(name, alike.get(name_pattern(name)))),
            hf_std,
        )
        for name in target
    }
    return tuple(_set_init(row, tensors, overrides[row.name].init_std, init_std) for row in rows)


def _with_values(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None or tensor.is_meta else tensor.detach()


def _set_init(
    row: Row,
    tensors: Mapping[str, InitialTensor],
    override: float | None,
    init_std: float | None,
) -> Row:
    tensor, factor = tensors[row.name], row.init_std or 0.0
    bare = replace(row, init_std=None)
    if override is not None:
        return replace(bare, init_std=override * factor)
    if (value := _constant(tensor, init_std)) is not None:
        return replace(bare, init_value=value)
    if init_std is not None and tensor.target.ndim > 1:
        return replace(bare, init_std=init_std * factor)
    if tensor.target.is_meta:
        return bare
    if init_std is not None:
        return replace(bare, init_scale=1.0)
    return replace(bare, init_scale=factor * _undo_own_rule(tensor, tensors))


def _constant(tensor: InitialTensor, init_std: float | None) -> float | None:
    """The value of a tensor that starts constant.

    It is read from the tensor. On the meta device a bias is 0 and a norm's gain is 1.
    """
    module, name = type(tensor.use.module).__name__, tensor.use.name.rpartition(".")[2]
    on_meta, is_vector = tensor.target.is_meta, tensor.target.ndim < 2
    values = tensor.base if on_meta else tensor.target.detach()
    if values is not None and values.numel() and values.min() == values.max():
        value = float(values.flatten()[0])
        if values.numel() > 1 or value in (0.0, 1.0):
            return value
    if is_vector and name.endswith("bias") and (init_std is not None or on_meta):
        return 0.0
    return 1.0 if on_meta and "norm" in module.lower() and name == "weight" else None


def _undo_own_rule(tensor: InitialTensor, tensors: Mapping[str, InitialTensor]) -> float:
    """m_in**e: the factor that gives the model's own values the std they have in the base.

    A bias follows the rule and the fan-in of its matrix.
    """
    if tensor.target.ndim < 2:
        matrix = tensors.get(f"{tensor.use.module_name}.weight")
        follows = isinstance(tensor.use.module, (nn.Linear, *CONVS))
        if matrix and matrix.target.ndim > 1 and follows:
            return _undo_own_rule(matrix, tensors)
        return 1.0
    m = float(tensor.role.m_in)
    if tensor.use.is_embedding or m == 1:
        return 1.0
    exponent = _compare_with_base(tensor, m) if tensor.base is not None else _compare_rules(tensor)
    return m**exponent


def _std(tensor: Tensor) -> float:
    return float(tensor.detach().double().std())


def _is_close(difference: float, n: int) -> bool:
    """Whether a difference of ln std is within the noise of a std estimated from n values."""
    return abs(difference) < 0.05 + 4 / math.sqrt(n)


def _compare_with_base(tensor: InitialTensor, m: float) -> float:
    """e in std ~ fan_in**-e from the values of target and base."""
    assert tensor.base is not None
    base, target = _std(tensor.base), _std(tensor.target)
    ratio = math.log(target / base) if base and target else 0.0
    e = min((0.0, 0.5), key=lambda e: abs(ratio + e * math.log(m)))
    if not _is_close(ratio + e * math.log(m), min(tensor.target.numel(), tensor.base.numel())):
        raise _unknown_rule(tensor)
    return e


def _compare_rules(tensor: InitialTensor) -> float:
    """e from the target alone: PyTorch's default std (3 * fan_in)**-1/2, or the config's std."""
    std, n = _std(tensor.target), tensor.target.numel()
    if std and _is_close(math.log(std * math.sqrt(3 * tensor.role.fans[0])), n):
        return 0.5
    if std and tensor.hf_std and _is_close(math.log(std / tensor.hf_std), n):
        return 0.0
    raise _unknown_rule(tensor)


def _unknown_rule(tensor: InitialTensor) -> UserError:
    return UserError(
        "`init_std` must be given if a model's own initialisation is neither PyTorch's default nor"
        f" one std for all layers, but `{tensor.use.name}` has std {_std(tensor.target):.4g}"
    )
