"""The role and the width ratios of each tensor, read from how its shape grows.

A role says which of fan-in and fan-out grow with width. Overrides declare what shapes cannot show.
A growth that nothing explains is an error that names the tensor.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from fractions import Fraction
from typing import Any, get_args

from torch.nn.modules.conv import _ConvNd

from scaletune.errors import UserError, nearest
from scaletune.parametrizing.shapes import Axes, Dims, TensorUse, name_pattern
from scaletune.rules import Role


@dataclass(frozen=True)
class Override:
    """What a user declares about the tensors that match a pattern.

    None means: read it from the shapes, or use the value given to `parametrize`.
    """

    role: Role | None = None
    """Role of the tensor: "emb", "hid", "out", "vec" or "fin"."""

    fan_in: int | None = None
    """Axis of the fan-in: experts of shape (E, in, out) have fan_in 1 and fan_out 2."""

    fan_out: int | None = None
    """Axis of the fan-out."""

    m_in: float | None = None
    """Fan-in divided by the fan-in in the base model."""

    m_out: float | None = None
    """Fan-out divided by the fan-out in the base model."""

    multiplier: float | None = None
    """Forward multiplier at the base size."""

    init_std: float | None = None
    """Initial standard deviation at the base size."""

    lr: float | None = None
    """Learning rate at the base size."""

    weight_decay: float | None = None
    """Weight decay at the base size."""

    eps: float | None = None
    """Optimizer epsilon at the base size."""


@dataclass(frozen=True)
class TensorRole:
    """Role and width ratios of a tensor in one of its uses."""

    role: Role
    """Role in this use."""

    m_in: Fraction | float = Fraction(1)
    """Fan-in divided by the fan-in in the base model."""

    m_out: Fraction | float = Fraction(1)
    """Fan-out divided by the fan-out in the base model."""

    fans: tuple[int, int] = (1, 1)
    """(fan-in, fan-out) in the target model."""


MAY_BE_ZERO = ("fan_in", "fan_out", "init_std", "weight_decay")

# --- overrides ------------------------------------------------------------------------------------


def read_overrides(overrides: Mapping[str, Any], names: Iterable[str]) -> dict[str, Override]:
    """The override of each tensor. A later pattern has priority over an earlier one.

    Raises:
        UserError: A pattern matches no tensor, or a value is not valid.
    """
    names = list(names)
    result = dict.fromkeys(names, Override())
    for pattern, declared in overrides.items():
        matching = [name for name in names if fnmatchcase(name, pattern)]
        if not matching:
            raise UserError(
                f"an override must name a tensor of the model, but `{pattern}` matches none"
                f"{nearest(pattern, names)}"
            )
        values = _override_fields(pattern, declared)
        result |= {name: replace(result[name], **values) for name in matching}
    return result


def _override_fields(pattern: str, declared: Any) -> dict[str, Any]:
    """The fields of an override that is written as a role alone or as a table."""
    values = {"role": declared} if isinstance(declared, str) else dict(declared)
    known = [field.name for field in fields(Override)]
    for key, value in values.items():
        if key not in known:
            raise UserError(
                f"unknown key `{key}` in the override of `{pattern}`{nearest(key, known)}"
            )
        if key == "role":
            _check_role(pattern, value)
        else:
            _check_number(pattern, key, value)
    return values


def _check_role(pattern: str, role: Any) -> None:
    known = get_args(Role)
    if role not in known:
        raise UserError(
            f"`role` of `{pattern}` must be one of {', '.join(known)}, but got {role!r}"
            f"{nearest(str(role), known)}"
        )


def _check_number(pattern: str, key: str, value: Any) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or value < 0 or (value == 0 and key not in MAY_BE_ZERO):
        rule = "of at least 0" if key in MAY_BE_ZERO else "above 0"
        raise UserError(f"`{key}` of `{pattern}` must be a number {rule}, but got {value!r}")


# --- roles ----------------------------------------------------------------------------------------

USUAL_NAMES: tuple[tuple[str, Role], ...] = (
    # with a fixed number of key-value heads their fan-out does not grow
    ("*k_proj.weight", "hid"),
    ("*v_proj.weight", "hid"),
    # positions and class tokens that are bare parameters
    ("*pos*", "emb"),
    ("*embed*", "emb"),
    ("*token*", "emb"),
)
"""Roles by name, where shapes alone do not show them."""


def assign_roles(
    shapes: Mapping[str, Dims],
    uses: Mapping[str, list[TensorUse]],
    overrides: Mapping[str, Override],
) -> dict[str, list[TensorRole]]:
    """The role and ratios of each tensor in each of its uses.

    Raises:
        UserError: No shape grows, or a growth has no explanation. The message names the tensor.
    """
    if not any(base is not None for shape in shapes.values() for base, _ in shape):
        raise UserError(
            "base and model must differ in width, but all their shapes are equal: use a narrower"
            " base, or give `delta`, a wider model that shows which dimensions grow"
        )
    roles = {
        name: [_tensor_role(use, shape, overrides[name]) for use in uses[name]]
        for name, shape in shapes.items()
    }
    _check_growth(roles, shapes, uses, overrides)
    return roles


def _growth_ratios(shape: Dims) -> dict[int, Fraction]:
    """Ratio of each axis that grows."""
    return {i: Fraction(size, base) for i, (base, size) in enumerate(shape) if base is not None}


def _tensor_role(use: TensorUse, shape: Dims, override: Override) -> TensorRole:
    ratios = _growth_ratios(shape)
    axes = use.axes
    if override.fan_in is not None or override.fan_out is not None:
        axes = _declared_axes(use, shape, override)
    wide = [i for i, (_, size) in enumerate(shape) if size != 1 or i in ratios]
    if axes is None and len(wide) < 2:
        axes = (None, wide[0] if wide else 0)  # (1, 1, width): a vector
    role = override.role or _infer_role(use, shape, ratios, axes)
    m_in, m_out = _width_ratios(use, shape, ratios, axes, role)
    fans = (1, 1)
    if axes is not None and axes[0] is not None:
        taps = _kernel_size(use, shape)
        fans = (shape[axes[0]][1] * taps, shape[axes[1]][1] * taps)
    return TensorRole(role, override.m_in or m_in, override.m_out or m_out, fans)


def _width_ratios(
    use: TensorUse, shape: Dims, ratios: Mapping[int, Fraction], axes: Axes, role: Role
) -> tuple[Fraction, Fraction]:
    """(m_in, m_out). A hidden matrix with one fixed side (key-value heads, experts) uses the ratio
    of its other side for both.
    """
    if axes is None or axes[0] is None:
        if len(set(ratios.values())) > 1:
            raise UserError(
                f"`{use.name}` {_format_shape(shape)} grows by two different ratios: declare its"
                " axes `fan_in` and `fan_out` in `overrides`"
            )
        m = next(iter(ratios.values()), Fraction(1))
        return (m if role in ("hid", "out") else Fraction(1)), (Fraction(1) if role == "out" else m)
    m_in, m_out = (ratios.get(axis, Fraction(1)) for axis in axes if axis is not None)
    if role == "hid" and len(set(axes) & ratios.keys()) == 1:
        return (m_in, m_in) if axes[0] in ratios else (m_out, m_out)
    return m_in, m_out


def _kernel_size(use: TensorUse, shape: Dims) -> int:
    """Number of taps of a convolution's kernel; 1 for any other module."""
    return math.prod(size for _, size in shape[2:]) if isinstance(use.module, _ConvNd) else 1


def _declared_axes(use: TensorUse, shape: Dims, override: Override) -> tuple[int, int]:
    """Both axes, from the override or, where it declares only one, from the module's layout."""
    fan_in, fan_out = use.axes or (None, None)
    fan_in = fan_in if override.fan_in is None else override.fan_in
    fan_out = fan_out if override.fan_out is None else override.fan_out
    if fan_in is None or fan_out is None or fan_in == fan_out or max(fan_in, fan_out) >= len(shape):
        raise UserError(
            f"`{use.name}` needs two different axes `fan_in` and `fan_out` below {len(shape)}, but"
            f" got {fan_in} and {fan_out}"
        )
    return fan_in, fan_out


def _infer_role(use: TensorUse, shape: Dims, ratios: Mapping[int, Fraction], axes: Axes) -> Role:
    """The role that follows from which of fan-in and fan-out grow."""
    if not ratios:
        return "fin"
    usual = next((role for pattern, role in USUAL_NAMES if fnmatchcase(use.name, pattern)), None)
    if axes is None:
        return _infer_without_layout(use, shape, ratios, usual)
    if odd := sorted(ratios.keys() - set(axes)):
        raise _unexplained(use.name, shape, f"its dimension {odd[0]} grows", "hid")
    if use.is_embedding and axes[0] in ratios:
        raise _unexplained(use.name, shape, "its vocabulary grows", "emb")
    if axes[0] is None:
        return "vec"
    if axes[0] in ratios:
        return "hid" if axes[1] in ratios or usual == "hid" else "out"
    return "emb"


def _infer_without_layout(
    use: TensorUse, shape: Dims, ratios: Mapping[int, Fraction], usual: Role | None
) -> Role:
    """The role of a tensor whose axes are not known.

    It is hidden if two dimensions grow by the same ratio; else its name decides.
    """
    if len(ratios) > 2:
        raise UserError(
            f"`{use.name}` {_format_shape(shape)} grows in {len(ratios)} dimensions: declare its"
            " role, `fan_in` and `fan_out` in `overrides`"
        )
    if len(ratios) == 2 and len(set(ratios.values())) == 1:
        return "hid"
    if len(ratios) == 1 and usual == "emb" and len(shape) - 1 in ratios:
        return "emb"
    raise UserError(
        f"`{use.name}` {_format_shape(shape)} belongs to a {type(use.module).__name__}, whose"
        f" layout is not known: declare its role, as in overrides={{{use.name!r}: 'hid'}}"
    )


def _check_growth(
    roles: Mapping[str, list[TensorRole]],
    shapes: Mapping[str, Dims],
    uses: Mapping[str, list[TensorUse]],
    overrides: Mapping[str, Override],
) -> None:
    """UserError unless each ratio of a fan-out is also the ratio of some fan-in, and vice versa.

    Tensors with a declared role or fan-in are not checked.
    """
    each = [role for tensor_roles in roles.values() for role in tensor_roles]
    fan_ins = {role.m_in for role in each if role.role in ("hid", "out")} | {1}
    fan_outs = {role.m_out for role in each if role.role in ("hid", "emb")} | {1}
    readouts = _repeated_readouts(roles)
    vocabularies = {
        shapes[name][use.axes[0] or 0]
        for name in roles
        for use in uses[name]
        if use.is_embedding and use.axes
    }
    for name, tensor_roles in roles.items():
        if overrides[name].role or overrides[name].fan_in is not None:
            continue
        shape = shapes[name]
        for use, role in zip(uses[name], tensor_roles, strict=True):
            if role.role == "hid" and use.axes:
                fan_out = shape[use.axes[1]]
                if fan_out in vocabularies and fan_out[0] is not None:
                    raise _unexplained(use.name, shape, "the vocabulary grows", "out")
            if name_pattern(use.name) in readouts:
                raise UserError(
                    f"`{use.name}` {_format_shape(shape)} looks like a readout inside a block:"
                    f" declare its role, `out` or `hid`, as in overrides={{{use.name!r}: 'hid'}}"
                )
            _check_ratios(use.name, role, shape, fan_outs, fan_ins)


def _check_ratios(
    name: str, role: TensorRole, shape: Dims, fan_outs: set[Any], fan_ins: set[Any]
) -> None:
    """UserError unless the ratios of a tensor also occur on the other side of some tensor."""
    out, into = float(role.m_out), float(role.m_in)
    if role.role in ("hid", "emb") and role.m_out not in fan_ins:
        growth = f"its fan-out grows by {out:g}, but no tensor's fan-in grows by {out:g}"
        raise _unexplained(name, shape, growth, "out")
    if role.role in ("hid", "out") and role.m_in not in fan_outs:
        growth = f"its fan-in grows by {into:g}, but no tensor's fan-out grows by {into:g}"
        raise _unexplained(name, shape, growth, "emb")
    if role.role == "vec" and role.m_out not in fan_outs | fan_ins:
        growth = f"it grows by {out:g}, but no matrix grows by {out:g}"
        raise _unexplained(name, shape, growth, "vec")


def _repeated_readouts(roles: Mapping[str, list[TensorRole]]) -> set[str]:
    """Name patterns with several tensors, all of them readouts: no model has one in every block."""
    kinds: dict[str, list[str]] = {}
    for name, tensor_roles in roles.items():
        kinds.setdefault(name_pattern(name), []).append(tensor_roles[0].role)
    return {pattern for pattern, kind in kinds.items() if len(kind) > 1 and set(kind) == {"out"}}


def _format_shape(shape: Dims) -> str:
    """(32 -> 64, 10): base size and size."""
    sizes = (f"{base} -> {size}" if base is not None else f"{size}" for base, size in shape)
    return f"({', '.join(sizes)})"


def _unexplained(name: str, shape: Dims, growth: str, likely: Role) -> UserError:
    return UserError(
        f"`{name}` {_format_shape(shape)}: {growth}. Correct the base if this is a mistake;"
        f" otherwise declare the role, as in overrides={{{name!r}: {likely!r}}}"
    )
